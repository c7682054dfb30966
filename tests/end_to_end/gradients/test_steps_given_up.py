"""Steps with fewer or more backward passes, steps given up, and gradients that are computed outside of a backward
pass."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import full_product
from parity import compare
from small_runs import assert_closed
from torch import Tensor, nn
from user_loops import fused, gradients, losses, mlp

import offload

RAM = {"memory": {"ram": "8MiB", "page": "64KiB"}}
SSD = {"memory": {"ram": 8 * (64 << 10), "page": "64KiB"}}
DEVICE = {"device": "cpu-emulated", "memory": {"ram": "2MiB", "page": "64KiB", "device": "512KiB"}}


def pair(folder: Path, where: dict[str, Any], **update: Any) -> tuple[nn.Module, Any, nn.Module, Any]:
    """A plain model with its optimizer, and a paged one."""
    plain = mlp()
    model, optimizer = offload.prepare(
        copy.deepcopy(plain),
        fused,
        {**where, "ssd": {"paths": [str(folder / "pages")], "threads": 2}, "update": update},
    )
    return plain, fused(plain.parameters()), model, optimizer


def passes(model: nn.Module, optimizer: torch.optim.Optimizer, counts: tuple[int, ...]) -> None:
    """Steps of so many backward passes each."""
    batches = losses(model, sum(counts))
    for count in counts:
        for loss in itertools.islice(batches, count):
            (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "mode", [{}, {"clip_norm": 1e6}, {"start": "step"}, {"mode": "lock-free", "max_staleness": 0}], ids=str
)
@pytest.mark.parametrize("counts", [(2, 2, 1, 2), (3, 1, 1, 2, 3), (4, 1, 4)], ids=str)
def test_steps_with_fewer_passes_than_those_before(
    counts: tuple[int, ...], mode: dict[str, Any], tmp_path: Path
) -> None:
    plain, plain_optimizer, model, optimizer = pair(tmp_path, RAM if "mode" in mode else SSD, **mode)
    passes(plain, plain_optimizer, counts)
    passes(model, optimizer, counts)
    compare(plain, plain_optimizer, model, optimizer, "in the end")
    assert_closed(optimizer.engine)


def test_steps_with_fewer_passes_of_an_engine(tmp_path: Path) -> None:
    """The last step of an epoch is made by the optimizer, when there are no more batches; the next one begins anew."""
    plain, plain_optimizer, model, optimizer = pair(tmp_path, SSD, accumulation=3)
    engine = optimizer.engine
    made = []
    for _epoch in range(2):
        for loss, same in zip(losses(model, 5), losses(plain, 5), strict=True):
            engine.backward(loss)
            made.append(engine.step())
            (same / 3).backward()
            if made[-1]:
                plain_optimizer.step()
                plain_optimizer.zero_grad()
        for its in (optimizer, plain_optimizer):
            its.step()
            its.zero_grad()
    assert made == [False, False, True, False, False] * 2
    compare(plain, plain_optimizer, model, optimizer, "in the end")
    assert_closed(engine)


def test_a_step_with_more_passes_than_any_before_is_given_up_by_name(tmp_path: Path) -> None:
    plain, plain_optimizer, model, optimizer = pair(tmp_path, SSD)
    passes(plain, plain_optimizer, (1, 1))
    passes(model, optimizer, (1, 1))
    with pytest.raises(
        offload.StaleGradientError,
        match=r'as many as any step before had.*update\.start = "step".*engine\.abandon_step\(\)',
    ):
        passes(model, optimizer, (2,))
    optimizer.engine.abandon_step()
    assert gradients(model) == []
    # All updates of that step had been made; plain PyTorch makes them, too.
    for loss in losses(plain, 1):
        (loss / 2).backward()
    plain_optimizer.step()
    plain_optimizer.zero_grad()
    passes(plain, plain_optimizer, (1, 1))
    passes(model, optimizer, (1, 1))
    compare(plain, plain_optimizer, model, optimizer, "in the end")
    assert_closed(optimizer.engine)


# ---- errors in mid-backward -----------------------------------------------------------------------------------------


class Breaking(torch.autograd.Function):
    """Passes everything through, or fails in its backward."""

    error: type[BaseException] | None = None

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        if Breaking.error is not None:
            raise Breaking.error("in mid-backward")
        return gradient


class Fragile(nn.Module):
    """Half of it is behind the place that breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = mlp()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.whole[4:](Breaking.apply(self.whole[:4](x)))  # type: ignore[no-untyped-call]
        return result


def halves(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values before and behind the place that breaks."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    front = {name: value for name, value in state.items() if int(name.split(".")[1]) < 4}
    return front, {name: value for name, value in state.items() if name not in front}


@full_product(
    where={"ram": RAM, "ssd": SSD, "device": DEVICE},
    update=[{}, {"start": "step"}, {"clip_norm": 0.5}, {"mode": "lock-free", "max_staleness": 0}],
    give_up=["abandon_step", "zero_grad"],
    error=[ZeroDivisionError, KeyboardInterrupt],
)
def test_after_an_error_in_mid_backward_the_step_is_given_up_and_training_goes_on(
    where: dict[str, Any], update: dict[str, Any], give_up: str, error: type[BaseException], tmp_path: Path
) -> None:
    if "mode" in update and where is not RAM:
        pytest.skip("lock-free updates of so small a budget, or with a device, are refused")
    settings = {**where, "ssd": {"paths": [str(tmp_path / "pages")], "threads": 2}, "update": update}
    model, optimizer = offload.prepare(Fragile(), fused, settings)
    engine: offload.Engine = optimizer.engine  # type: ignore[attr-defined]
    eager = "start" not in update and "clip_norm" not in update
    passes(model, optimizer, (1, 1))
    front, back = halves(model)
    Breaking.error = error
    try:
        with pytest.raises(error, match="in mid-backward"):
            passes(model, optimizer, (1,))
    finally:
        Breaking.error = None
    if give_up == "zero_grad" and not (eager and where is DEVICE):
        if eager:
            with pytest.raises(
                RuntimeError, match=r"zero_grad\(\) without step\(\).*engine\.abandon_step\(\) gives this step up"
            ):
                optimizer.zero_grad()
            engine.abandon_step()
        else:
            optimizer.zero_grad()
    else:
        engine.abandon_step()
    front_now, back_now = halves(model)
    assert all(torch.equal(value, front[name]) for name, value in front_now.items()), "these had no gradient"
    if not eager:
        assert all(torch.equal(value, back[name]) for name, value in back_now.items()), "no update was made"
    elif where is not DEVICE:  # There, some gradients are still on their way.
        assert not any(torch.equal(value, back[name]) for name, value in back_now.items()), (
            "updates that were made stay"
        )
    # What comes after equals plain PyTorch from there on.
    plain = Fragile()
    plain.load_state_dict(model.state_dict())
    plain_optimizer = fused(plain.parameters())
    plain_optimizer.load_state_dict(optimizer.state_dict())
    for one, its in ((plain, plain_optimizer), (model, optimizer)):
        for loss in losses(one, 3):
            loss.backward()
            if "clip_norm" in update and one is plain:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            its.step()
            its.zero_grad()
    compare(plain, plain_optimizer, model, optimizer, "in the end")
    assert_closed(engine)


def test_a_step_that_is_given_up_leaves_the_plan_as_it_is(tmp_path: Path) -> None:
    _, _, model, optimizer = pair(tmp_path, SSD, start="step")
    passes(model, optimizer, (1,) * 5)
    engine = optimizer.engine
    before = engine.stats()
    next(losses(model)).backward()
    optimizer.zero_grad()
    passes(model, optimizer, (1,) * 3)
    since = engine.stats().since(before)
    assert (since.steps, since.planned_steps, since.deviations) == (3, 3, 0)
    assert_closed(engine)


# ---- gradients from elsewhere ---------------------------------------------------------------------------------------


def pipeline(model: nn.Module, optimizer: Any, engine: offload.Engine | None) -> None:
    """Gradients of inputs first, those of weights later, layer by layer, two micro-batches a step: as a runtime of
    pipelines does."""
    parameters = list(model.parameters())
    batches = losses(model, 8)
    for _ in range(4):
        for number in range(2):
            found = torch.autograd.grad(next(batches), parameters)
            for parameter, gradient in zip(parameters, found, strict=True):
                if engine is None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                elif number == 0:
                    engine.add_gradient(parameter, gradient)
                else:
                    engine.gradient_ready(parameter, gradient)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "update", [{}, {"start": "step"}, {"clip_norm": 1e6}, {"mode": "lock-free", "max_staleness": 0}], ids=str
)
@pytest.mark.parametrize("where", [RAM, SSD, DEVICE], ids=["ram", "ssd", "device"])
def test_gradients_that_are_computed_outside_of_a_backward_pass(
    where: dict[str, Any], update: dict[str, Any], tmp_path: Path
) -> None:
    if "mode" in update and where is not RAM:
        pytest.skip("lock-free updates of so small a budget, or with a device, are refused")
    plain, plain_optimizer, model, optimizer = pair(tmp_path, where, **update)
    pipeline(plain, plain_optimizer, None)
    pipeline(model, optimizer, optimizer.engine)
    compare(plain, plain_optimizer, model, optimizer, "in the end")
    assert_closed(optimizer.engine)


def test_a_unit_is_updated_as_soon_as_all_of_its_gradients_are_said_to_be_final(tmp_path: Path) -> None:
    _, _, model, optimizer = pair(tmp_path, RAM)
    engine: offload.Engine = optimizer.engine
    weight, bias = model[0].weight, model[0].bias
    before = model.state_dict()["0.weight"]
    unit = weight._place.unit
    engine.gradient_ready(weight, torch.ones(weight.shape))
    assert not unit.updated, "the bias is to come"
    engine.gradient_ready(bias)
    assert unit.updated, "in the first step, too, which nothing foretells"
    with pytest.raises(RuntimeError, match="0.weight is used between backward and step"):
        model.state_dict()
    with pytest.raises(offload.StaleGradientError, match="0.weight: a gradient arrived after the update"):
        engine.add_gradient(weight, torch.ones(weight.shape))
    optimizer.step()
    assert not torch.equal(model.state_dict()["0.weight"], before)
    assert_closed(engine)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_what_is_no_gradient_of_a_paged_parameter_is_refused(tmp_path: Path) -> None:
    _, _, model, optimizer = pair(tmp_path, RAM)
    engine: offload.Engine = optimizer.engine
    asked: list[tuple[Callable[[], None], str]] = [
        (
            lambda: engine.add_gradient(model[0].weight, torch.ones(3)),
            r"0\.weight: a gradient of shape \(3,\) and torch\.float32 for a parameter of \(128, 128\)",
        ),
        (lambda: engine.gradient_ready(model[0].bias, torch.ones(128).double()), "torch.float64"),
        (lambda: engine.gradient_ready(nn.Parameter(torch.ones(3))), "not one that the engine has in pages"),
    ]
    for ask, message in asked:
        with pytest.raises(ValueError, match=message):
            ask()
    with pytest.raises(ValueError, match="create_graph=True"):
        next(losses(model)).backward(create_graph=True)
    assert any(unit.live_views for unit in engine.debug.units), "autograd keeps what it has not come to"
    engine.abandon_step()
    assert not any(unit.live_views for unit in engine.debug.units)
    passes(model, optimizer, (1, 1))
    assert_closed(engine)
