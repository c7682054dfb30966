"""Lock-free training under schedules that hypothesis draws: what the updater does, and when, is part of the example.

Between two actions the updater stands still, at a gate or at rest. It moves when an action moves it, and when the
training thread waits for it, and then just as far as that needs. So an example runs the same way every time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings
from lockfree_run import RESIDENT, Run, Scale, running
from updater_gates import ANY, POINTS, TIMEOUT_S

#: Each layer is a unit of one slice; parameters come and go, and states, too. Smaller than `STREAMING`.
SMALL = Scale(92, 7, 1_240_000)
LOOK_S = 0.1


class Steps:
    """Moves the updater of a run, step by step; takes over whatever would let it go on otherwise."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._gates, self._thread = run.gates, run.gates.thread
        self._await_rest = self._gates._await_progress
        #: Steps that a unit may miss now; who waits for one that misses no more waits for nothing.
        self.allowed = 0
        self._thread.await_progress = self._await  # type: ignore[method-assign]
        self._thread.paused = self._paused  # type: ignore[method-assign]
        self._rest()

    def move_to(self, *points: tuple[str, str]) -> None:
        """Have the updater go on to the first of these points and units that it comes to, or until nothing is left to
        do."""
        self._release(set(points))
        deadline_s = time.monotonic() + TIMEOUT_S
        with self._gates._changed:
            # An updater that fails tells nobody who waits here, so it is looked at every now and then.
            while not self._gates._changed.wait_for(self._has_stopped, LOOK_S) and time.monotonic() < deadline_s:
                pass
            came = self._has_stopped()
        self._thread.check()
        assert came, f"the updater did not come to {points}: {self._gates.passed[-5:]}"
        if self._gates._standing is None:
            self._rest()

    def end(self) -> None:
        """Let the updater go where it likes."""
        del self._thread.await_progress, self._thread.paused
        self._release(set())

    def _release(self, held: set[tuple[str, str]]) -> None:
        with self._gates._changed:
            self._gates._held = held
            self._gates._standing = None
            self._gates._changed.notify_all()
        with self._thread._progress:
            self._thread._pausing = False
            self._thread._progress.notify_all()

    def _has_stopped(self) -> bool:
        if self._gates._standing is not None or self._thread.failure is not None:
            return True
        done = all(box.clock.applied == box.clock.produced for box in self._run.boxes.values())
        # What is published last is told before the updater comes to the gate.
        return done and (not self._gates.passed or self._gates.passed[-1][0] == "published")

    def _rest(self) -> None:
        """Have the updater rest at the end of the unit that it is at."""
        with self._thread._progress:
            self._thread._pausing = True
        self._gates.open()
        self._thread._work.set()
        self._await_rest(lambda: self._thread._resting)

    def _await(self, ready: Callable[[], bool]) -> None:
        wanted = self._thread._wanted
        if wanted is not None and not ready():
            assert wanted.clock.produced - wanted.clock.applied > self.allowed, f"nothing made {wanted.unit.name} wait"
        while not ready():
            self.move_to(("published", ANY))

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self._rest()
        yield


Action = tuple[str, ...]


def actions(n_units: int) -> st.SearchStrategy[list[Action]]:
    """Steps, moves of the updater to a point of one unit, and now and then something else."""
    units = [f"layers.{number}" for number in range(n_units)]
    step = st.just(("step",))
    move = st.tuples(st.just("move"), st.sampled_from(POINTS), st.sampled_from(units))
    others = st.sampled_from([("next",), ("finish",), ("evaluate",), ("drain",), ("rest",)])
    return st.lists(st.one_of(step, step, move, move, others), min_size=16, max_size=40)


def perform(run: Run, steps: Steps, max_staleness: int, action: Action) -> None:
    """Do one action and check what must hold after it."""
    kind, *where = action
    if kind == "step":
        steps.allowed = max_staleness
        run.step()
        steps.allowed = 0
    elif kind == "move":
        steps.move_to((where[0], where[1]))
    elif kind == "next":
        steps.move_to(*((point, ANY) for point in POINTS))
    elif kind == "finish":
        steps.move_to()
        assert all(run.clock(unit)[:2] == (len(run.steps), len(run.steps)) for unit in run.units)
    elif kind == "rest":
        # What a background commit begins with: states and parameters of the same updates, though not of all steps.
        with run.gates.updater.consistent(whole=False):
            assert all(applied == adopted for _, applied, adopted in map(run.clock, run.units))
    else:
        if kind == "drain":
            run.engine.drain()
        else:
            evaluate(run)
        assert all(run.clock(unit) == (len(run.steps),) * 3 for unit in run.units)


def evaluate(run: Run) -> None:
    """Use every parameter outside a step."""
    run.model.eval()
    with torch.no_grad():
        run.model(torch.ones(1, run.width), torch.ones(1, run.width))
    run.model.train()


@pytest.mark.parametrize("examples", [10, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("scale", [RESIDENT, SMALL], ids=["all_in_ram", "streaming"])
def test_every_schedule_keeps_the_bound_and_gives_what_it_says(scale: Scale, examples: int) -> None:
    # Making a failing schedule smaller would take longer than a test may.
    @settings(max_examples=examples, phases=[Phase.explicit, Phase.generate])
    @given(max_staleness=st.integers(0, 3), plan=actions(scale.depth))
    def follow(max_staleness: int, plan: list[Action]) -> None:
        with tempfile.TemporaryDirectory() as folder, running(Path(folder), max_staleness, scale) as run:
            assert run.resident is (scale is RESIDENT)
            steps = Steps(run)
            try:
                for action in plan:
                    perform(run, steps, max_staleness, action)
            finally:
                steps.end()
            run.assert_replayed()

    follow()
