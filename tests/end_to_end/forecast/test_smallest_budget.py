"""The smallest budget is known from the factory alone; with it a model is built and trains, with a page less it is
refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_shapes import MODELS as SHAPES
from pairwise import each_value
from parity import adamw
from small_runs import PAGE_BYTES, assert_closed, assert_untouched, built, config
from tiny_models import CASES, GPT, Case
from torch import Tensor, nn

import offload
from offload.budget.need import check_model
from offload.config_loading import load_config
from offload.parameters.optimizer_template import optimized_by


class Many(nn.Module):
    """Layers that share units, and parameters of its own, which come last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(20))
        self.scale = nn.Parameter(torch.ones(64))
        self.spare = nn.Linear(64, 64)
        del self.spare

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return F.cross_entropy(x * self.scale, y)


class LateTie(GPT):
    """What is largest was built and is then not needed."""

    def __init__(self) -> None:
        super().__init__()
        assert self.head is not None
        self.head = nn.Linear(128, 1024)
        self.head = None
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128)) for _ in range(2))


MODELS = {**CASES, "many": Case(Many, "vectors"), "late_tie": Case(LateTie, "tokens")}
#: What a step is made of: configuration changes and the micro-batches that go with them.
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without states": {},
    "clipped": {"clip_norm": 0.5},
    "accumulated": {"accumulation": 2},
    "16 bits": {"dtype": "bf16"},
    "16 bits, clipped, accumulated": {"dtype": "bf16", "clip_norm": 0.5, "accumulation": 2},
}


def raw(folder: Path, ram: int, *, dtype: str = "fp32", **update: Any) -> dict[str, Any]:
    """A configuration."""
    return config(folder, ram=ram, **update) | {"model": {"factory": "unused:unused", "dtype": dtype}}


def momentum_free(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer without states."""
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.01, fused=True)


def train(case: Case, settings: dict[str, Any], optimizer: Callable[..., Any], *, deferred: bool) -> None:
    """Build, and make enough steps for a plan."""
    torch.manual_seed(7)
    if deferred:
        with offload.deferred_init(settings):
            model = case.build()
    else:
        model = case.build()
    bf16 = settings["model"]["dtype"] == "bf16"
    generator = torch.Generator().manual_seed(11)
    with offload.initialize(model, settings, optimizer) as engine:
        for _ in range(4):
            for _ in range(settings["update"].get("accumulation", 1)):
                x, y = case.batch(generator)
                for _ in range(case.passes):
                    engine(x.bfloat16() if bf16 and x.is_floating_point() else x, y).backward()
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        assert engine.stats().planned_steps == 2
    assert_closed(engine)


def refused(case: Case, settings: dict[str, Any], optimizer: Callable[..., Any], *, deferred: bool) -> int:
    """The smallest budget that the error names."""
    with pytest.raises(offload.BudgetError) as caught:
        train(case, settings, optimizer, deferred=deferred)
    return caught.value.smallest_bytes


@each_value(name=[name for name in MODELS if name != "borrower"], step=tuple(STEPS))
def test_the_smallest_budget_works_and_a_page_less_does_not(name: str, step: str, tmp_path: Path) -> None:
    case, optimizer = MODELS[name], momentum_free if step == "without states" else adamw
    need = offload.smallest_budget(case.build, optimizer, raw(tmp_path, PAGE_BYTES, **STEPS[step]))
    for deferred in (True, False):
        train(case, raw(tmp_path, need.smallest_bytes, **STEPS[step]), optimizer, deferred=deferred)
    less = raw(tmp_path, need.smallest_bytes - PAGE_BYTES, **STEPS[step])
    assert refused(case, less, optimizer, deferred=True) == need.smallest_bytes
    if name != "late_tie":  # What it drops is paged while it is built; a plain build has it outside the budget.
        assert refused(case, less, optimizer, deferred=False) == need.smallest_bytes


@each_value(name=["gpt", "tied", "many"], step=["plain", "clipped", "16 bits"], page=[PAGE_BYTES, "auto"])
def test_lock_free_updates_work_in_the_smallest_budget_and_not_with_a_byte_less(
    name: str, step: str, page: int | str, tmp_path: Path
) -> None:
    case, settings = MODELS[name], raw(tmp_path, PAGE_BYTES, **STEPS[step], mode="lock-free")
    settings["memory"]["page"] = page
    smallest = offload.smallest_budget(case.build, adamw, settings).smallest_bytes
    for deferred in (True, False):
        settings["memory"]["ram"] = smallest
        train(case, settings, adamw, deferred=deferred)
        for less in (smallest - 1, max(smallest // 2, 1 << 20)):
            settings["memory"]["ram"] = less
            with pytest.raises(offload.BudgetError, match="keep the gradients of the whole model in RAM") as caught:
                train(case, settings, adamw, deferred=deferred)
            assert caught.value.smallest_bytes == smallest


@pytest.mark.parametrize("name", SHAPES)
def test_published_models_need_the_same_whether_built_plainly_or_out_of_pages(name: str, tmp_path: Path) -> None:
    class Leaf(nn.Module):
        def __init__(self, shapes: tuple[tuple[int, ...], ...]) -> None:
            super().__init__()
            for number, shape in enumerate(shapes):
                self.register_parameter(f"p{number}", nn.Parameter(torch.empty(shape)))

    def build() -> nn.Module:
        """Parts in an order of their own: the last third is made first, and put in its place at the end."""
        leaves = SHAPES[name]()
        model, late = nn.Module(), nn.ModuleList(Leaf(shapes) for shapes in leaves[2 * len(leaves) // 3 :])
        model.early = nn.ModuleList(Leaf(shapes) for shapes in leaves[: 2 * len(leaves) // 3])
        model.late = late
        return model

    settings = config(tmp_path, ram=1 << 40) | {"memory": {"ram": 1 << 40}}
    need = offload.smallest_budget(build, adamw, settings)
    with torch.device("meta"):
        plain = build()
    with pytest.raises(offload.BudgetError) as caught:
        check_model(
            plain,
            optimized_by(adamw(plain.parameters())),
            2,
            load_config(config(tmp_path) | {"memory": {"ram": "64KiB"}}),
        )
    assert caught.value.smallest_bytes == need.smallest_bytes


def test_a_view_kept_by_the_model_needs_more_and_the_first_step_says_how_much_so_far(tmp_path: Path) -> None:
    case = MODELS["borrower"]
    need = offload.smallest_budget(case.build, adamw, raw(tmp_path, PAGE_BYTES))
    smallest, named = need.smallest_bytes, []
    while True:
        try:
            train(case, raw(tmp_path, smallest, clip_norm=0.5), adamw, deferred=True)
            break
        except offload.BudgetError as error:
            assert "held by views in use" in str(error) and f"at least {error.smallest_bytes} bytes" in str(error)
            assert error.smallest_bytes > smallest
            smallest = error.smallest_bytes
            named.append(smallest)
    assert named


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_it_names_the_unit_and_its_bytes(tmp_path: Path) -> None:
    need = offload.smallest_budget(GPT, None, config(tmp_path))
    assert (need.unit, need.unit_bytes) == ("blocks.0.up", (128 * 512 + 512) * 4)
    assert offload.smallest_budget(GPT, adamw, config(tmp_path, ram=64 << 20)) == need, "whatever the budget is now"
    assert not (tmp_path / "pages").exists()


def test_pages_and_optimizer_count(tmp_path: Path) -> None:
    def smallest(optimizer: Any, page: int | str = PAGE_BYTES) -> int:
        settings = config(tmp_path)
        settings["memory"]["page"] = page
        return offload.smallest_budget(GPT, optimizer, settings).smallest_bytes

    assert smallest({"name": "sgd", "momentum": 0.0}) < smallest({"name": "sgd"}) < smallest(None)
    assert smallest({"name": "sgd", "momentum": 0.0}) == smallest(momentum_free)
    assert smallest(None, "1MiB") == 3 << 20 and smallest(None, "auto") == smallest(None)


def test_a_model_larger_than_memory_costs_nothing(tmp_path: Path) -> None:
    def large() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(1 << 16, 1 << 16)) for _ in range(50)))  # 800 GiB.

    need = offload.smallest_budget(large, None, config(tmp_path) | {"memory": {"ram": "64KiB"}})
    assert need.unit.startswith("0.0.weight[") and 2 * need.unit_bytes < need.smallest_bytes < 2.2 * need.unit_bytes


# ---- what the factory does -------------------------------------------------------------------------------------------


def test_random_numbers_go_on_as_if_nothing_had_been_built(tmp_path: Path) -> None:
    def drawing() -> nn.Module:
        torch.manual_seed(1)
        np.random.seed(2)
        random.seed(3)
        torch.rand(5, device="cpu")
        return GPT()

    def numbers() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(17)
    expected = numbers()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(17)
    offload.smallest_budget(drawing, None, config(tmp_path))
    assert numbers() == expected


def test_a_factory_that_fails_on_meta_says_why_and_draws_nothing(tmp_path: Path) -> None:
    def looking() -> nn.Module:
        random.random()
        layer = nn.Linear(4, 4)
        assert float(layer.weight.detach().sum()) == 0
        return layer

    before = random.getstate()
    with pytest.raises(
        offload.FactoryError, match=r"cannot be built on torch's meta device: RuntimeError: Tensor\.item\(\)"
    ):
        offload.smallest_budget(looking, None, config(tmp_path))
    assert random.getstate() == before


def test_parameters_made_elsewhere_end_the_building_at_once(tmp_path: Path) -> None:
    made = []

    def elsewhere() -> nn.Module:
        model = nn.ModuleList()
        for _ in range(5):
            made.append(nn.Linear(4, 4, device="cpu"))
            model.append(made[-1])
        return model

    with pytest.raises(offload.FactoryError, match="meta device: weight is made on cpu all the same"):
        offload.smallest_budget(elsewhere, None, config(tmp_path))
    assert len(made) == 1
    with pytest.raises(offload.FactoryError, match="weight is made on cpu"):
        offload.smallest_budget(lambda: nn.Linear(4, 4, device="cpu"), None, config(tmp_path))


def test_what_no_budget_helps_against_is_said(tmp_path: Path) -> None:
    def nothing() -> Any:
        return None

    with pytest.raises(ValueError, match="returns a NoneType, not a torch.nn.Module"):
        offload.smallest_budget(nothing, None, config(tmp_path))
    with pytest.raises(ValueError, match="no floating-point parameters to page"):
        offload.smallest_budget(
            lambda: nn.Embedding.from_pretrained(torch.ones(2, 2).int()), momentum_of_all, config(tmp_path)
        )
    with pytest.raises(ValueError, match="RMSprop does not run on pages"):
        offload.smallest_budget(GPT, torch.optim.RMSprop, config(tmp_path))


def momentum_of_all(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer with everything it is given."""
    return torch.optim.SGD(parameters, lr=0.1)


def test_inside_deferred_init_it_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="smallest_budget inside deferred_init"),
        offload.deferred_init(config(tmp_path)),
    ):
        offload.smallest_budget(GPT, None, config(tmp_path))
    assert_untouched(built())


@pytest.mark.parametrize(("given", "said"), [(lambda: nn.Linear(4, 4), "a Linear"), (lambda: 7, "a int")])
def test_what_is_no_factory_is_refused_in_one_line(given: Callable[[], Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"^the model's factory is {said}; give a callable that builds the model, such as lambda"
    ):
        offload.smallest_budget(given(), adamw, config(tmp_path))
