"""Paged parameters are parameters: what torch's users do with them works, or says why it does not."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw, compare
from small_runs import (
    RAM_BYTES,
    assert_closed,
    assert_equal,
    built,
    engine_of,
    train,
    train_plain,
)  # fmt: skip
from tiny_models import GPT
from torch import Tensor, nn

import offload
from scheduler.planning.trace import OpKind


def gpt(engine: offload.Engine) -> GPT:
    """The engine's model."""
    assert isinstance(engine.model, GPT)
    return engine.model


def assert_released(model: nn.Module) -> None:
    """No parameter is bound, and no page is held for one."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, offload.PagedParameter), name
        place = parameter._place
        with torch._C.DisableTorchFunctionSubclass():
            assert not place.bound and parameter.data_ptr() == place.placeholder.data_ptr(), name
        place.binder.driver.mover.collect_leases()
        assert not place.unit.parameters.held, name


# ---- what they look like -------------------------------------------------------------------------------------------


def test_a_released_parameter_still_says_what_it_is(engine: offload.Engine) -> None:
    plain = built()
    engine.drain()
    for (name, mine), (other, expected) in zip(engine.model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and isinstance(mine, nn.Parameter)
        for look in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "nbytes", "layout", "grad"):
            assert getattr(mine, look) == getattr(expected, look), look
        for ask in ("numel", "size", "dim", "element_size", "is_floating_point", "__len__"):
            assert getattr(mine, ask)() == getattr(expected, ask)(), ask
        assert mine in {mine}
    assert_released(engine.model)


def test_tied_weights_stay_one_parameter(tmp_path: Path) -> None:
    class Tied(GPT):
        def __init__(self) -> None:
            super().__init__()
            assert self.head is not None
            self.head.weight = self.tok.weight

    torch.manual_seed(7)
    model = Tied()
    plain = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    with engine_of(model, tmp_path) as engine:
        assert model.head is not None and model.head.weight is model.tok.weight
        assert [name for name, _ in model.named_parameters()] == names
        with offload.gathered(model.head), torch.no_grad():
            model.head.weight.mul_(0.5)
        with torch.no_grad():
            plain.tok.weight.mul_(0.5)
        train(engine, 4)
        train_plain(plain, adamw(plain.parameters()), 4)
        assert_equal(model, plain)
    assert_closed(engine)


# ---- reading and writing them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 4], ids=["untrained", "planned"])
def test_what_is_written_inside_gathered_is_there_after_it_and_nothing_stays_bound(
    steps: int, engine: offload.Engine
) -> None:
    model, plain = gpt(engine), built()
    train(engine, steps)
    engine.drain()
    train_plain(plain, adamw(plain.parameters()), steps)
    name = "blocks.0.up"
    with offload.gathered(model.get_submodule(name)), torch.no_grad():
        for mine, expected in zip(*(m.get_submodule(name).parameters() for m in (model, plain)), strict=True):
            assert mine.data_ptr() and torch.equal(mine, expected)
            mine[0] += 1
            expected[0] += 1
    assert_released(model)
    with offload.gathered([model.tok.weight, plain.tok.weight]), torch.no_grad():
        model.tok.weight[3, 1:4] = plain.tok.weight[3, 1:4] = torch.tensor([1.0, 2.0, 3.0])
    assert_released(model)
    assert_equal(model, plain)


def test_gathering_more_than_fits_is_refused_and_changes_nothing(engine: offload.Engine) -> None:
    with (
        pytest.raises(offload.BudgetError, match="Set memory.ram to at least") as caught,
        offload.gathered(engine.model),
    ):
        raise AssertionError("it does not fit")
    assert caught.value.smallest_bytes > RAM_BYTES
    assert_released(engine.model)
    assert_equal(engine.model, built())


def test_data_is_set_by_copying_and_keeps_its_shape(engine: offload.Engine) -> None:
    model, values = gpt(engine), torch.randn(128, 128)
    model.tok.weight.data = values
    kept = values.clone()
    values.zero_()
    assert torch.equal(model.tok.weight, kept)
    with pytest.raises(
        RuntimeError, match=r"tok\.weight: \.data of shape \(2, 3\) for a paged parameter of shape \(128, 128\)"
    ):
        model.tok.weight.data = torch.zeros(2, 3)
    assert torch.equal(model.tok.weight, kept)
    model.tok.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.tok.weight, torch.empty(128, 128).normal_(generator=torch.Generator().manual_seed(3)))
    assert_released(model)


@pytest.mark.parametrize(
    "fill",
    [
        "normal_",
        "uniform_",
        "zeros_",
        "ones_",
        "eye_",
        "xavier_uniform_",
        "xavier_normal_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "trunc_normal_",
        "orthogonal_",
    ],
)
def test_initialisation_in_place_draws_what_it_draws_in_plain_torch(fill: str, engine: offload.Engine) -> None:
    results = []
    for model in (gpt(engine), built()):
        torch.manual_seed(5)
        for block in model.blocks:
            assert isinstance(block.up, nn.Linear)
            assert getattr(nn.init, fill)(block.up.weight) is block.up.weight
        results.append((model.state_dict()["blocks.1.up.weight"], torch.get_rng_state()))
    assert all(torch.equal(mine, expected) for mine, expected in zip(*results, strict=True))
    assert_released(engine.model)


# ---- saving and loading --------------------------------------------------------------------------------------------


def test_state_dict_is_plain_a_copy_and_loads_back(engine: offload.Engine) -> None:
    plain = built()
    train_plain(plain, adamw(plain.parameters()), 3)
    saved = engine.model.state_dict()
    assert all(type(value) is Tensor and not value.requires_grad for value in saved.values())
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    assert str(engine.model.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    assert_equal(engine.model, plain)
    with pytest.raises(RuntimeError, match="size mismatch for tok.weight"):
        engine.model.load_state_dict(plain.state_dict() | {"tok.weight": torch.zeros(2, 2)})
    assert_equal(engine.model, plain)
    train(engine, 4)
    assert all(
        torch.equal(value, expected)
        for value, expected in zip(saved.values(), built().state_dict().values(), strict=True)
    )


def test_training_goes_on_after_a_state_dict_that_raised(engine: offload.Engine) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not today")

    plain = built()
    hook = engine.model.register_state_dict_post_hook(refuse)
    hook_first = next(iter(engine.model._state_dict_hooks))
    engine.model._state_dict_hooks.move_to_end(hook.id, last=False)
    assert next(iter(engine.model._state_dict_hooks)) != hook_first, "it must raise before the engine's own hook"
    with pytest.raises(ValueError, match="not today"):
        engine.model.state_dict()
    hook.remove()
    train(engine, 4)
    train_plain(plain, adamw(plain.parameters()), 4)
    assert_equal(engine.model, plain)
    plan = engine.debug.driver.follower.plan
    assert plan is not None and any(kind is OpKind.FORWARD for kind, _ in plan.keys), "forward passes were not traced"


@pytest.mark.parametrize("source", ["engine", "plain"])
def test_training_goes_on_in_a_new_engine_from_saved_states(source: str, tmp_path: Path) -> None:
    plain = built()
    plain_optimizer = adamw(plain.parameters())
    train_plain(plain, plain_optimizer, 4)
    with engine_of(built(), tmp_path) as first:
        train(first, 4)
        compare(plain, plain_optimizer, first.model, first.optimizer, "saved")
        saved: list[dict[str, Any]] = [first.model.state_dict(), first.optimizer.state_dict()]
    if source == "plain":
        saved = copy.deepcopy([plain.state_dict(), plain_optimizer.state_dict()])
    with engine_of(GPT(), tmp_path, start="step") as second:
        second.model.load_state_dict(saved[0])
        second.optimizer.load_state_dict(saved[1])
        compare(plain, plain_optimizer, second.model, second.optimizer, "loaded")
        train(second, 4)
        train_plain(plain, plain_optimizer, 4)
        compare(plain, plain_optimizer, second.model, second.optimizer, "trained on")
    assert_closed(second)


@pytest.mark.parametrize(
    "pickling",
    [
        pytest.param(pickle.dumps, id="pickle"),
        pytest.param(lambda model: torch.save(model, io.BytesIO()), id="torch.save"),
        pytest.param(lambda model: pickle.dumps(model.tok.weight), id="one parameter"),
    ],
)
def test_pickling_the_model_itself_says_what_to_use(
    pickling: Callable[[nn.Module], Any], engine: offload.Engine
) -> None:
    with pytest.raises(RuntimeError, match=r"cannot be pickled.*; use model\.state_dict\(\)"):
        pickling(engine.model)
    train(engine, 2)
