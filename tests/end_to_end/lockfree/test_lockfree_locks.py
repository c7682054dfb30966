"""No lock of ours is held while the training thread computes, while the updater computes, or while bytes are read or
written; those that steps take have names and are counted."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lockfree_run import STREAMING, Run, running
from torch import Tensor

from optim.unit import Unit
from pagemem.process.wait_lock import WaitLock, counted


class Held:
    """Looks whether the calling thread has one of some locks.

    Attributes:
        looks: how often, by what was going on; found: what was going on with which lock held.
    """

    def __init__(self, locks: list[WaitLock]) -> None:
        self.looks: dict[str, int] = {}
        self.found: list[tuple[str, str, str]] = []
        self._locks = locks

    def look(self, what: str) -> None:
        """On whichever thread."""
        self.looks[what] = self.looks.get(what, 0) + 1
        thread = threading.current_thread().name
        self.found += [(what, lock.name, thread) for lock in self._locks if lock._is_owned()]  # type: ignore[attr-defined]


def watched(run: Run, patch: pytest.MonkeyPatch) -> Held:
    """Has the run look whenever something is computed, or goes to the disk or comes from there."""
    held = Held([run.engine.debug.mover.changed, run.gates.updater.lock])

    def slices(point: str, unit: Unit) -> None:
        if point == "slice":
            held.look("an update is made")

    run.gates.on_pass = slices
    for layer in run.model.layers:
        layer.register_forward_hook(lambda *_: held.look("a layer computes"))
        layer.register_forward_hook(lambda _m, _i, y: note_backward(y, held))
    for name in ("preadv", "pwritev"):
        patch.setattr(os, name, looking(held, name, getattr(os, name)))
    return held


def note_backward(made: Tensor, held: Held) -> None:
    """Have the backward of what a layer made look, too."""
    made.register_hook(lambda _: held.look("its backward computes"))


def looking(held: Held, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """A call that is looked at."""

    def call(*args: Any) -> Any:
        held.look(what)
        return real(*args)

    return call


def test_no_lock_is_held_in_compute_or_io_and_each_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path, 2, STREAMING) as run:
        run.warm_up()
        held = watched(run, monkeypatch)
        with counted(*held._locks) as uses:
            run.step(6)
            run.engine.drain()
        assert held.found == []
        assert held.looks.keys() >= {"an update is made", "a layer computes", "its backward computes", "preadv"}
        assert uses.keys() == {"host pages", "updates"}
        for use in uses.values():
            assert use.acquisitions > 0 and 0 < use.longest_hold_s <= use.held_s
        # A unit's ops, its loads and stores and its publication take a lock a few times each, and nothing polls.
        assert sum(use.acquisitions for use in uses.values()) < 6 * len(run.units) * 150
