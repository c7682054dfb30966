"""Whoever looks at gradients or changes them gets what plain PyTorch gives him, or one line that says what to set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import each_value, full_product
from parity import compare
from small_runs import assert_closed
from torch import nn
from user_loops import LOOPS, Loop, fused, losses, mlp

import offload

#: Where parameters, gradients and states are: all in RAM, mostly on SSD, on a device, some of them at home there.
PLACES: dict[str, dict[str, Any]] = {
    "ram": {"memory": {"ram": "16MiB", "page": "64KiB"}},
    "ssd": {"memory": {"ram": 8 * (64 << 10), "page": "64KiB"}},
    "device": {"device": "cpu-emulated", "memory": {"ram": "2MiB", "page": "64KiB", "device": "512KiB"}},
    "home": {"device": "cpu-emulated", "memory": {"ram": "4MiB", "page": "64KiB", "device": "4MiB"}},
}


def config(folder: Path, place: str, **update: Any) -> dict[str, Any]:
    return {**PLACES[place], "ssd": {"paths": [str(folder / "pages")], "threads": 2}, "update": update}


def check(loop: Loop, folder: Path, place: str, **update: Any) -> None:
    """Run a loop on both, and compare every bit of parameters, states and what the loop saw."""
    plain = mlp()
    model, optimizer = offload.prepare(copy.deepcopy(plain), fused, config(folder, place, **update))
    engine: offload.Engine = optimizer.engine  # type: ignore[attr-defined]
    plain_optimizer = fused(plain.parameters())
    try:
        expected, found = loop(plain, plain_optimizer), loop(model, optimizer)
        assert len(found) == len(expected)
        assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))
        compare(plain, plain_optimizer, model, optimizer, "in the end")
    finally:
        assert_closed(engine)


@each_value(name=tuple(LOOPS), place=tuple(PLACES))
def test_everything_works_where_updates_wait_for_the_step(name: str, place: str, tmp_path: Path) -> None:
    check(LOOPS[name], tmp_path, place, start="step")


#: Loops that first do something unlike their first step when an update has been made of what it needs.
REFUSED = {"never cleared": "call optimizer.zero_grad() after each step", "skipping": "engine.abandon_step()"}


@each_value(name=tuple(LOOPS), place=["ram", "ssd", "device"])
def test_otherwise_it_works_too_or_says_what_to_set(name: str, place: str, tmp_path: Path) -> None:
    if name not in REFUSED:
        check(LOOPS[name], tmp_path, place)
        return
    with pytest.raises((RuntimeError, offload.StaleGradientError)) as caught:
        check(LOOPS[name], tmp_path, place)
    message = str(caught.value)
    assert (
        'set update.start = "step" in the configuration' in message and REFUSED[name] in message and "\n" not in message
    )


@pytest.mark.parametrize("start", ["auto", "step"])
@pytest.mark.parametrize(
    "name",
    ["torch.autograd.grad", "edits", "grad = None", "clip_grad_norm_", "logging", "cleared before backward", "zeros"],
)
def test_steps_that_touch_gradients_follow_a_plan(name: str, start: str, tmp_path: Path) -> None:
    model, optimizer = offload.prepare(mlp(), fused, config(tmp_path, "ssd", start=start))
    engine: offload.Engine = optimizer.engine  # type: ignore[attr-defined]
    LOOPS[name](model, optimizer)
    before = engine.stats()
    LOOPS[name](model, optimizer)
    since = engine.stats().since(before)
    assert (since.steps, since.planned_steps, since.deviations) == (4, 4, 0)
    assert_closed(engine)


#: What needs a gradient after its step, when the updater has it.
LATE = ("torch.autograd.grad", "logging", "never cleared")


@pytest.mark.parametrize("start", ["auto", "step"])
@pytest.mark.parametrize("name", LOOPS)
def test_lock_free_updates_give_the_same_or_say_what_to_set(name: str, start: str, tmp_path: Path) -> None:
    update = {"mode": "lock-free", "max_staleness": 0, "start": start}
    try:
        check(LOOPS[name], tmp_path, "ram", **update)
    except (RuntimeError, offload.OffloadError) as error:
        # Zeros are made when the loop has a graph, and so old parameters, in use: there is room for that with "step".
        assert name in LATE or (start == "auto" and name in (*REFUSED, "zeros, then unused"))
        assert 'set update.start = "step" in the configuration' in str(error) and "\n" not in str(error)


# ---- hooks -----------------------------------------------------------------------------------------------------------


def halve(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * 0.5


def clamp(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.clamp_(-0.02, 0.02)


def replace(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = parameter.grad * 0.5


def drop(parameter: torch.Tensor) -> None:
    if parameter.ndim == 1:
        parameter.grad = None


HOOKS: dict[str, Callable[[torch.Tensor], object]] = {
    "tensor hook": lambda parameter: parameter.register_hook(halve),
    "post-accumulate hook": lambda parameter: parameter.register_post_accumulate_grad_hook(clamp),  # type: ignore[no-untyped-call]
    "one that replaces": lambda parameter: parameter.register_post_accumulate_grad_hook(replace),  # type: ignore[no-untyped-call]
    "one that drops": lambda parameter: parameter.register_post_accumulate_grad_hook(drop),  # type: ignore[no-untyped-call]
}


@full_product(
    name=tuple(HOOKS),
    registered=["before", "after", "in the middle"],
    update=[{}, {"start": "step"}, {"clip_norm": 0.5}, {"mode": "lock-free", "max_staleness": 0}],
)
def test_hooks_see_and_change_what_plain_torchs_do(
    name: str, registered: str, update: dict[str, Any], tmp_path: Path
) -> None:
    plain = mlp()
    model, plain_optimizer = copy.deepcopy(plain), fused(plain.parameters())
    seen: dict[int, list[torch.Tensor]] = {id(plain): [], id(model): []}

    def register(module: nn.Module) -> None:
        for parameter in module.parameters():
            HOOKS[name](parameter)
            log = seen[id(module)]
            parameter.register_post_accumulate_grad_hook(
                lambda p, log=log: log.append(p.grad.clone() if p.grad is not None else torch.zeros(()))
            )  # type: ignore[no-untyped-call]

    if registered == "before":
        register(plain)
        register(model)
    model, optimizer = offload.prepare(model, fused, config(tmp_path, "ram" if "mode" in update else "ssd", **update))
    if registered == "after":
        register(plain)
        register(model)
    for step in range(4):
        if registered == "in the middle" and step == 2:
            register(plain)
            register(model)
        for module, its in ((plain, plain_optimizer), (model, optimizer)):
            for loss in losses(module, 2):
                loss.backward()
            if "clip_norm" in update and module is plain:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            its.step()
            its.zero_grad()
    assert len(seen[id(plain)]) == len(seen[id(model)]) > 0
    assert all(torch.equal(*pair) for pair in zip(seen[id(plain)], seen[id(model)], strict=True))
    compare(plain, plain_optimizer, model, optimizer, "in the end")
    assert_closed(optimizer.engine)  # type: ignore[attr-defined]


def test_a_hook_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(_: torch.Tensor) -> None:
        raise ZeroDivisionError("in the hook")

    for start in ("auto", "step"):
        plain = mlp()
        plain_optimizer = fused(plain.parameters())
        model, optimizer = offload.prepare(copy.deepcopy(plain), fused, config(tmp_path / start, "ssd", start=start))
        for step, (loss, same) in enumerate(zip(losses(model), losses(plain), strict=True)):
            if step == 0:
                for module, one in ((model, loss), (plain, same)):
                    handle = module[4].weight.register_post_accumulate_grad_hook(fail)
                    with pytest.raises(ZeroDivisionError):
                        one.backward()
                    handle.remove()
                optimizer.zero_grad()
                plain_optimizer.zero_grad()
                continue
            for one, its in ((loss, optimizer), (same, plain_optimizer)):
                one.backward()
                its.step()
                its.zero_grad()
        compare(plain, plain_optimizer, model, optimizer, "in the end")
        assert_closed(optimizer.engine)  # type: ignore[attr-defined]
