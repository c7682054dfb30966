"""Units that the plan never moves are bound between uses: torch computes with them as with ordinary parameters, and
whatever somebody does with one of them has the effect that it has in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bound_runs import AT, STEPS, Model, Run, adamw, assert_alike, bound_early, sgd
from torch import Tensor, nn

from scheduler.execution.driver import Driver

pytestmark = pytest.mark.usefixtures(bound_early.__name__)


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_bound_steps_ask_for_no_pages(optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = Run(tmp_path, optimizer), Run(None, optimizer)
    assert ours.train(0, AT) == plain.train(0, AT)
    assert ours.is_bound and ours.engine.debug.binder.bindings.saves_plainly

    def refuse(*_: Any) -> None:
        raise AssertionError("an op")

    with monkeypatch.context() as patched:
        patched.setattr(Driver, "begin", refuse)
        assert ours.train(AT) == plain.train(AT)
    assert ours.engine.stats().deviations == 0 and ours.engine.stats().steps == STEPS
    assert_alike(ours, plain)


@pytest.mark.parametrize("update", [{"clip_norm": 0.1}, {"start": "step"}])
def test_units_whose_updates_wait_for_the_step_are_bound(update: dict[str, Any], tmp_path: Path) -> None:
    ours, plain = Run(tmp_path, update=update), Run(None)
    plain.clip_norm = update.get("clip_norm")
    assert ours.train(0, AT) == plain.train(0, AT)
    assert ours.is_bound
    assert ours.train(AT) == plain.train(AT)
    assert ours.is_bound and ours.engine.stats().deviations == 0
    for run in (ours, plain):
        _mul(run)
    assert ours.train(STEPS, STEPS + 2) == plain.train(STEPS, STEPS + 2)
    assert_alike(ours, plain)


def _mul(run: Run) -> None:
    with torch.no_grad():
        run.model.up.weight.mul_(0.5)


def _data(run: Run) -> None:
    run.model.up.weight.data.mul_(0.5)


def _assign_data(run: Run) -> None:
    run.model.up.weight.data = run.model.up.weight.data * 0.5


def _view(run: Run) -> None:
    with torch.no_grad():
        run.model.up.weight[1].zero_()


def _kept_view(run: Run) -> None:
    run.kept = run.model.up.weight.detach()[2:4]  # type: ignore[attr-defined]
    run.kept.fill_(0.25)  # type: ignore[attr-defined]


def _numpy(run: Run) -> None:
    run.model.norm.weight.detach().numpy()[:] = 0.5


def _init(run: Run) -> None:
    torch.manual_seed(3)
    nn.init.normal_(run.model.down.weight)


def _load(run: Run) -> None:
    run.model.load_state_dict({name: value * 0.5 for name, value in run.values().items()})


def _state_dicts(run: Run) -> None:
    run.model.state_dict()
    run.optimizer.state_dict()


def _evaluate(run: Run) -> None:
    run.model.eval()
    with torch.no_grad():
        run.loss(99)
    run.model.train()


def _halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def _hook(run: Run) -> None:
    run.model.up.weight.register_post_accumulate_grad_hook(_halve)


def _tensor_hook(run: Run) -> None:
    run.model.up.weight.register_hook(lambda gradient: gradient * 0.5)


def _lr(run: Run) -> None:
    run.optimizer.param_groups[0]["lr"] = 1e-3


def _freeze(run: Run) -> None:
    run.model.norm.weight.requires_grad_(False)


def _own_gradient(run: Run) -> None:
    run.model.norm.bias.grad = torch.ones(40)


def _recompute(run: Run) -> None:
    run.model.recomputes = True


def _graph_lives(run: Run) -> None:
    run.kept = run.loss(77)  # type: ignore[attr-defined]


def _profile(run: Run) -> None:
    if run.engine is not None:
        with run.engine.profile(Path(run.engine.config.ssd.paths[0]).parent / "profile"):
            run.train(50, 52)
    else:
        run.train(50, 52)


def _commit(run: Run) -> None:
    if run.engine is not None:
        run.engine.save(wait=False)


def _skipped(run: Run) -> None:
    run.loss(5)
    run.optimizer.zero_grad()


ACTIONS: dict[str, Callable[[Run], None]] = {
    action.__name__.strip("_"): action
    for action in (
        _mul, _data, _assign_data, _view, _kept_view, _numpy, _init, _load, _state_dicts, _evaluate, _hook,
        _tensor_hook, _lr, _freeze, _own_gradient, _recompute, _graph_lives, _profile, _commit, _skipped,
    )
}  # fmt: skip


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_what_users_do_between_steps_has_its_effect(action: Callable[[Run], None], tmp_path: Path) -> None:
    ours, plain = Run(tmp_path), Run(None)
    assert ours.train(0, AT) == plain.train(0, AT)
    assert ours.is_bound
    action(ours)
    action(plain)
    assert ours.train(AT) == plain.train(AT)
    assert_alike(ours, plain)


@pytest.mark.parametrize("edit", [_mul, _data, _kept_view])
def test_masters_of_16_bit_parameters_are_updated_and_edited(edit: Callable[[Run], None], tmp_path: Path) -> None:
    results = []
    for binds in (True, False):
        run = Run(tmp_path / str(binds), model=Model().bfloat16())
        if not binds:
            run.engine.debug.binder.bindings._units.clear()
        losses = run.train(0, AT)
        assert run.is_bound is binds
        edit(run)
        results.append((losses + run.train(AT), run.values()))
        run.close()
    (losses, values), (expected_losses, expected) = results
    assert losses == expected_losses
    assert all(torch.equal(values[name], expected[name]) for name in expected)
