"""Whoever looks at gradients or changes them gets what plain PyTorch gives him, or one line that says what to set."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import compare
from small_runs import assert_closed
from user_loops import LOOPS, Loop, fused, losses, mlp
from torch import nn

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


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LOOPS)
def test_everything_works_where_updates_wait_for_the_step(name: str, place: str, tmp_path: Path) -> None:
    check(LOOPS[name], tmp_path, place, start="step")


#: Loops that first do something unlike their first step when an update has been made of what it needs.
REFUSED = {"never cleared": "call optimizer.zero_grad() after each step", "skipping": "engine.abandon_step()"}


@pytest.mark.parametrize("place", ["ram", "ssd", "device"])
@pytest.mark.parametrize("name", LOOPS)
def test_otherwise_it_works_too_or_says_what_to_set(name: str, place: str, tmp_path: Path) -> None:
    if name not in REFUSED:
        check(LOOPS[name], tmp_path, place)
        return
    with pytest.raises((RuntimeError, offload.StaleGradientError)) as caught:
        check(LOOPS[name], tmp_path, place)
    message = str(caught.value)
    assert 'set update.start = "step" in the configuration' in message and REFUSED[name] in message and "\n" not in message
