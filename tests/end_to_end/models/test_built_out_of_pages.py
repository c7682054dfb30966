"""Whatever a model's construction does with its modules and weights: the units, the values and the training are those
of a plain build."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cross_references import check_mover
from pairwise import each_value
from parity import adamw, compare
from small_runs import assert_closed, assert_equal, built, config
from tiny_models import CASES, GPT
from torch import Tensor, nn

import offload
from optim.unit import UnitIndex

WIDE = 300


def drawn(module: nn.Module) -> None:
    """As transformers' models initialise theirs, before they tie them."""
    for parameter in module.parameters(recurse=False):
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)


class TiedLate(GPT):
    """The head is drawn anew, as the last thing that happens to it, and then tied away."""

    def __init__(self) -> None:
        super().__init__()
        assert self.head is not None
        self.apply(drawn)
        nn.init.normal_(self.head.weight)
        self.head.weight = self.tok.weight


class TiedThreeWays(TiedLate):
    """A third name for the embedding, in a module of its own that was drawn, too."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(128, 128, bias=False)
        drawn(self.again)
        self.again.weight = self.tok.weight


class Untied(GPT):
    """Tied first, and then given weights of their own again."""

    def __init__(self) -> None:
        super().__init__()
        assert self.head is not None
        self.head.weight = self.tok.weight
        self.head.weight = nn.Parameter(self.tok.weight.detach().clone())


class TiedAroundABias(nn.Module):
    """What stays of a module whose weight is tied away, and of another whose weight is replaced, was in units with
    these."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, WIDE), nn.Linear(64, WIDE), nn.Linear(WIDE, 10)
        drawn(self.second)
        self.second.weight = self.first.weight
        self.third.weight = nn.Parameter(torch.randn(10, WIDE))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.third(F.gelu(self.first(x)) + self.second(x)), y)


class OutOfOrder(nn.Module):
    """Parts that are made in another order than they stand in, small and large, with parameters of the whole's own."""

    def __init__(self) -> None:
        super().__init__()
        last = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
        large = nn.Sequential(nn.Linear(64, WIDE), nn.GELU(), nn.Linear(WIDE, 64))
        self.small = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 64))
        self.large, self.last = large, last

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.small:
            x = x + F.gelu(layer(x)) * self.scale
        return F.cross_entropy(self.last(self.large(x)), y)


class Rebuilding(OutOfOrder):
    """Builds parts and drops them, and survives one whose constructor fails."""

    class Failing(nn.Module):
        """Fails when half of it is there."""

        def __init__(self) -> None:
            super().__init__()
            self.half = nn.Linear(64, WIDE)
            raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        try:
            self.extra = self.Failing()
        except NotImplementedError:
            self.extra = nn.Linear(64, WIDE)
        self.extra = nn.Linear(64, 64)
        del self.small[2]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(self.extra(x), y)


BUILDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tied_late": (TiedLate, "gpt"),
    "tied_three_ways": (TiedThreeWays, "gpt"),
    "untied": (Untied, "gpt"),
    "tied_around_a_bias": (TiedAroundABias, "borrower"),
    "out_of_order": (OutOfOrder, "borrower"),
    "rebuilding": (Rebuilding, "borrower"),
    **{name: (case.build, name) for name, case in CASES.items()},
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(7)
    return build()


def layout(index: UnitIndex) -> list[Any]:
    """All that a commit, a plan or a budget can see of units."""
    return [
        (
            unit.index,
            unit.name,
            unit.dtype,
            [(slot.name, slot.shape, slot.offset, slot.order, slot.group) for slot in unit.slots],
            [(part.begin, part.end) for part in unit.slices],
        )
        for unit in index.units
    ]


def train(case: str, *pairs: tuple[nn.Module, torch.optim.Optimizer], steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        batch = CASES[case].batch(generator)
        for model, optimizer in pairs:
            model(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()


@each_value(name=tuple(BUILDS), dtype=["fp32", "bf16"])
def test_units_values_and_training_are_those_of_a_plain_build(name: str, dtype: str, tmp_path: Path) -> None:
    build, case = BUILDS[name]
    settings = config(tmp_path) | {"model": {"factory": "unused:unused", "dtype": dtype}}
    plain = seeded(build)
    with offload.initialize(
        copy.deepcopy(plain), settings | {"ssd": {"paths": [str(tmp_path / "other")]}}, adamw
    ) as engine:
        expected = layout(engine.debug.store.index)
    torch.manual_seed(7)
    with offload.deferred_init(settings):
        model = build()
    with offload.initialize(model, settings, adamw) as engine:
        assert layout(engine.debug.store.index) == expected
        assert all(isinstance(parameter, offload.PagedParameter) for parameter in model.parameters())
        assert_equal(model, plain.to(getattr(torch, "bfloat16" if dtype == "bf16" else "float32")))
        mover = engine.debug.mover
        kept = {
            engine_tensor.id
            for unit in engine.debug.units
            for engine_tensor in (
                unit.parameters,
                *(t for part in unit.slices for t in (part.states, part.master) if t is not None),
            )
        }
        assert set(mover.tensors) == kept, "what the model does not use has given its pages back"
        check_mover(mover)
        if dtype == "fp32":
            optimizer = adamw(plain.parameters())
            train(case, (plain, optimizer), (model, engine.optimizer))
            compare(plain, optimizer, model, engine.optimizer, "in the end")
    assert_closed(engine)


@pytest.mark.parametrize("first", ["plain", "deferred"])
def test_a_run_goes_on_from_a_commit_however_its_model_was_built(first: str, tmp_path: Path) -> None:
    def engine_of(how: str) -> offload.Engine:
        if how == "plain":
            return offload.initialize(seeded(TiedLate), config(tmp_path), adamw)
        torch.manual_seed(7)
        with offload.deferred_init(config(tmp_path)):
            model = TiedLate()
        return offload.initialize(model, config(tmp_path), adamw)

    plain = seeded(TiedLate)
    optimizer = adamw(plain.parameters())
    with engine_of(first) as engine:
        train("gpt", (plain, optimizer), (engine.model, engine.optimizer))
        engine.save()
    with engine_of("deferred" if first == "plain" else "plain") as engine:
        assert engine.resume() is not None
        train("gpt", (plain, optimizer), (engine.model, engine.optimizer))
        compare(plain, optimizer, engine.model, engine.optimizer, "in the end")
    assert_closed(engine)


def test_the_budget_holds_while_units_are_made_anew(tmp_path: Path) -> None:
    need = offload.smallest_budget(TiedAroundABias, adamw, config(tmp_path))
    settings = config(tmp_path, ram=need.smallest_bytes)
    with offload.deferred_init(settings) as store:
        model = TiedAroundABias()
    with offload.initialize(model, settings, adamw):
        assert store.budget.peak_bytes <= need.smallest_bytes


def test_what_was_built_beside_the_model_says_that_its_pages_are_gone(tmp_path: Path) -> None:
    with offload.deferred_init(config(tmp_path)):
        spare = nn.Sequential(nn.Linear(WIDE, WIDE))
        model = built()
    with (
        offload.initialize(model, config(tmp_path), adamw),
        pytest.raises(
            RuntimeError, match=r"Sequential\.0\.weight.* was built under deferred_init, but is not part of the model"
        ) as caught,
    ):
        spare(torch.ones(1, WIDE))
    assert "\n" not in str(caught.value)


def test_a_view_taken_while_the_model_was_built_is_refused_before_anything_changes(tmp_path: Path) -> None:
    with offload.deferred_init(config(tmp_path)):
        model = built()
        view = model.blocks[0].up.weight.detach()[0]
    with pytest.raises(
        ValueError, match=r"a view of blocks\.0\.up\.weight, taken while .* is still in use .*; delete or clone it"
    ) as caught:
        offload.initialize(model, config(tmp_path), adamw)
    assert "\n" not in str(caught.value)
    del view
    with offload.initialize(model, config(tmp_path), adamw):
        assert_equal(model, built())
