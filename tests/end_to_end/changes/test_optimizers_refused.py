"""Optimizers that pages cannot work with are refused; hooks and copies of those that they can."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw
from small_runs import (
    assert_closed,
    assert_equal,
    assert_untouched,
    batches,
    built,
    config,
    train,
    train_plain,
)  # fmt: skip
from torch import nn

import offload
from offload.assembly import parts

# ---- optimizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda model: torch.optim.AdamW(model.parameters(), fused=True), "the optimizer is a AdamW; give a factory"),
        (
            lambda model: lambda parameters: None,
            "the optimizer's factory returns a NoneType, not a torch.optim.Optimizer",
        ),
        (
            lambda model: lambda: adamw(model.parameters()),
            "factory cannot be called with the model's parameters: too many positional arguments; give a",
        ),
        (lambda model: torch.optim.AdamW, "AdamW: fused=None rounds otherwise"),
        (
            lambda model: lambda p: torch.optim.AdamW(built().parameters(), fused=True),
            r"the optimizer has a parameter of shape \(128, 128\) that is not the model's",
        ),
        (lambda model: lambda p: torch.optim.LBFGS(p), "LBFGS does not run on pages"),
    ],
)
def test_an_optimizer_that_is_not_what_runs_on_pages_is_refused(
    optimizer: Callable[[nn.Module], Any], message: str, tmp_path: Path
) -> None:
    model = built()
    with pytest.raises(ValueError, match=message) as caught:
        offload.prepare(model, optimizer(model), config(tmp_path))
    assert "\n" not in str(caught.value)
    assert_untouched(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.param_groups[0].update(amsgrad=True), "AdamW: amsgrad=True is not supported"),
        (lambda o: o.param_groups[1].update(lr=torch.tensor(0.1)), "AdamW: a tensor lr is not supported"),
        (
            lambda o: o.param_groups[0]["params"].append(nn.Parameter(torch.zeros(2))),
            "parameters of a paged optimizer cannot be added",
        ),
        (lambda o: o.param_groups.pop(), "parameters of a paged optimizer cannot be added or taken out"),
    ],
)
def test_groups_that_become_what_does_not_run_on_pages_are_refused_at_the_step(
    change: Callable[[Any], object], message: str, engine: offload.Engine
) -> None:
    train(engine, 1)
    engine.backward(engine(*batches(1)[0]))
    change(engine.optimizer)
    with pytest.raises(ValueError, match=message):
        engine.optimizer.step()


def test_states_of_an_optimizer_that_is_not_fused_are_refused_whole(engine: offload.Engine) -> None:
    plain = built()
    optimizer = torch.optim.AdamW(adamw(plain.parameters()).param_groups, fused=False)
    train_plain(plain, optimizer, 1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["fused"] = False
    with pytest.raises(ValueError, match="AdamW: fused=False rounds otherwise"):
        engine.optimizer.load_state_dict(saved)
    assert not engine.optimizer.state_dict()["state"] and engine.optimizer.param_groups[0]["fused"]


def test_an_engine_that_fails_after_it_has_rounded_the_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise offload.BudgetError("no room", 1)

    raw = config(tmp_path) | {"model": {"factory": "unused:unused", "dtype": "bf16"}}
    with monkeypatch.context() as patched, pytest.raises(offload.BudgetError, match="no room") as caught:
        patched.setattr(parts, "make_updater", refuse)
        offload.initialize(built(), raw)
    assert caught.value.__notes__ == [
        "the model's parameters have been rounded to torch.bfloat16, as model.dtype asks for; build it anew"
    ]
    model = built()
    with pytest.raises(offload.BudgetError, match="lock-free") as caught:
        offload.initialize(model, config(tmp_path, mode="lock-free"))
    assert not hasattr(caught.value, "__notes__")
    assert_untouched(model)


def test_a_commit_that_does_not_say_fused_goes_on(tmp_path: Path) -> None:
    with offload.initialize(built(), config(tmp_path)) as engine:
        train(engine, 2)
        for group in engine.optimizer.param_groups:
            group["fused"] = None
        engine.save()
        expected = engine.model.state_dict()
    with offload.initialize(built(), config(tmp_path)) as engine:
        resumed = engine.resume()
        assert resumed is not None and not resumed.changed
        assert all(torch.equal(value, expected[name]) for name, value in engine.model.state_dict().items())
        assert engine.optimizer.param_groups[0]["fused"] is True
        train(engine, 1)
    assert_closed(engine)


@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps])
def test_an_optimizer_over_pages_is_not_copied(copying: Callable[[Any], object], engine: offload.Engine) -> None:
    with pytest.raises(
        RuntimeError, match=r"an optimizer over pages cannot be copied or pickled; use optimizer.state_dict\(\)"
    ):
        copying(engine.optimizer)


def test_hooks_of_the_optimizer_and_batch_norms_of_an_average_are_those_of_plain_torch(tmp_path: Path) -> None:
    called: list[str] = []
    plain, model = (nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    data = [torch.randn(8, 16) for _ in range(3)]
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        engine.optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        engine.optimizer.register_step_post_hook(lambda *_: called.append("after"))
        optimizer = adamw(plain.parameters())
        engine.backward(model(data[0]).square().mean())
        engine.step()
        plain(data[0]).square().mean().backward()
        optimizer.step()
        for one in (model, plain):
            torch.optim.swa_utils.update_bn(data, one)
        assert called == ["before", "after"]
        assert_equal(model, plain)
    assert_closed(engine)
