"""Unusual passes: frozen weights, graphs used twice, edits in between, checkpointed regions, other people's hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from parity import adamw, compare
from small_runs import assert_closed, assert_equal, batches, built, engine_of, train
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import offload

Pass = Callable[[nn.Module, tuple[Tensor, Tensor]], None]


@contextmanager
def side_by_side(
    tmp_path: Path, one_pass: Pass, steps: int = 5, **update: str
) -> Iterator[tuple[nn.Module, offload.Engine]]:
    """Train plain PyTorch and an engine by the same passes; when the block, the last look, is over, they are
    compared."""
    plain = built()
    optimizer = adamw(plain.parameters())
    with engine_of(built(), tmp_path, **update) as engine:
        for batch in batches(steps):
            for model, its in ((plain, optimizer), (engine.model, engine.optimizer)):
                one_pass(model, batch)
                its.step()
                its.zero_grad()
        yield plain, engine
        compare(plain, optimizer, engine.model, engine.optimizer, "in the end")
    assert_closed(engine)


def test_a_graph_may_be_used_twice(tmp_path: Path) -> None:
    def twice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        loss: Tensor = model(*batch)
        torch.autograd.backward([loss], retain_graph=True)
        torch.autograd.backward([loss * 2])

    with side_by_side(tmp_path, twice):
        pass


def test_weights_frozen_and_thawed_in_training_are_left_alone_and_taken_up_again(tmp_path: Path) -> None:
    steps = {"plain": 0, "engine": 0}

    def freezing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        who = "engine" if isinstance(next(model.parameters()), offload.PagedParameter) else "plain"
        steps[who] += 1
        if steps[who] in (3, 7):
            model.get_submodule("blocks.0").requires_grad_(steps[who] == 7)
        torch.autograd.backward([model(*batch)])

    with side_by_side(tmp_path, freezing, steps=10) as (_, engine):
        assert engine.stats().steps == 10


@pytest.mark.parametrize("gathering", [False, True])
def test_an_edit_between_forward_and_backward_is_an_error_and_not_a_wrong_gradient(
    gathering: bool, tmp_path: Path
) -> None:
    with engine_of(built(), tmp_path) as engine:
        train(engine, 3)
        weight = engine.model.get_parameter("blocks.1.up.weight")
        loss = engine(*batches(1)[0])
        engine.drain()
        if gathering:
            with offload.gathered([weight]), torch.no_grad():
                weight.mul_(2)
        else:
            weight.data.mul_(2)
        with pytest.raises(
            RuntimeError, match=r"blocks\.1\.up has been updated or edited since it was saved.*version \d+, now \d+"
        ):
            engine.backward(loss)
    del loss
    assert_closed(engine)


# ---- hooks of others -----------------------------------------------------------------------------------------------


class _Watch(torch.autograd.Function):
    """The identity, through memory whose end can be seen."""

    made: ClassVar[list[weakref.ref[memoryview]]] = []

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        memory = memoryview(bytearray(x.numel() * x.element_size()))
        _Watch.made.append(weakref.ref(memory))
        return torch.frombuffer(memory, dtype=x.dtype).view_as(x).copy_(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient

    @classmethod
    def living(cls) -> int:
        """How many of the activations made since the last call are still kept."""
        made, cls.made = cls.made, []
        return sum(ref() is not None for ref in made)


class _Regions(nn.Module):
    """Three regions, each with an activation that its second layer's backward needs."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.regions = nn.ModuleList(nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for region in self.regions:
            assert isinstance(region, nn.ModuleList)

            def run(y: Tensor, first: nn.Module = region[0], second: nn.Module = region[1]) -> Tensor:
                found: Tensor = second(_Watch.apply(first(y)))  # type: ignore[no-untyped-call]
                return found

            x = checkpoint(run, x, use_reentrant=False) if self.recompute else run(x)
        return x.sin().mean()


@pytest.mark.parametrize("paged", [False, True], ids=["plain", "engine"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_checkpointed_region_keeps_none_of_its_activations(recompute: bool, paged: bool, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model, plain = _Regions(recompute), _Regions(False)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 64)
    engine = engine_of(model, tmp_path) if paged else None
    plain(x).backward()
    _Watch.living()
    loss = model(x)
    assert _Watch.living() == (0 if recompute else 3)
    loss.backward()
    if engine is not None:
        optimizer = adamw(plain.parameters())
        optimizer.step()
        engine.optimizer.step()
        del loss
        assert_equal(model, plain)
        assert_closed(engine)


def test_activations_kept_elsewhere_by_save_on_cpu_give_the_same_bits(tmp_path: Path) -> None:
    def saving(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        with save_on_cpu():
            loss = model(*batch)
        loss.backward()

    with side_by_side(tmp_path, saving):
        pass


def test_hooks_around_the_model_get_the_activations_but_not_the_weights(tmp_path: Path) -> None:
    got: dict[bool, list[torch.Size]] = {False: [], True: []}

    def hooked(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        paged = isinstance(next(model.parameters()), offload.PagedParameter)

        def pack(saved: Tensor) -> Tensor:
            got[paged].append(saved.shape)
            return saved.clone()

        with saved_tensors_hooks(pack, lambda packed: packed):
            loss = model(*batch)
        loss.backward()

    with side_by_side(tmp_path, hooked, steps=3):
        hidden = torch.Size((2, 16, 512))
        assert got[False].count(hidden) > 0
        assert got[True].count(hidden) == got[False].count(hidden)
        assert torch.Size((512, 128)) not in got[True]
