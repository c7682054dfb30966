"""Many steps of lock-free mode while each thread is held up at random: the bound holds, and every bit follows."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from lockfree_run import Run, Scale, running

from optim.unit import Unit

#: A layer is the smallest that is a unit of its own. Its states and master fill three frames, of which the
#: round has nine.
TINY = Scale(92, 7, 1_240_000)
LONGEST_S = 0.002


class Delays:
    """Holds a thread up now and then: gives way, or sleeps for up to `LONGEST_S`."""

    def __init__(self, seed: int, share: float) -> None:
        self._random = random.Random(seed)
        self._share = share

    def maybe(self) -> None:
        """Hold the calling thread up, or do not."""
        if self._random.random() < self._share:
            time.sleep(self._random.choice((0.0, self._random.random() * LONGEST_S)))


def delay_the_updater(run: Run, delays: Delays) -> None:
    """At any of its points, outside the lock of the gates."""
    passed = run.gates.thread._gate

    def gate(point: str, unit: Unit) -> None:
        passed(point, unit)
        delays.maybe()

    run.gates.thread._gate = gate


def delay_the_disk(run: Run, delays: Delays) -> None:
    """Before a copy that has been made is reported, on the I/O thread, where nothing is locked."""
    files: Any = run.engine.debug.mover.files
    for name in ("read", "write"):

        def begin(
            route: Any,
            buffer: memoryview,
            done: Any,
            *,
            move: Any = getattr(files, name),  # noqa: B008 - bound in each round
            **more: Any,
        ) -> None:
            def late(error: BaseException | None) -> None:
                delays.maybe()
                done(error)

            move(route, buffer, late, **more)

        setattr(files, name, begin)


@pytest.mark.parametrize("steps", [150, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("max_staleness", [1, 4])
def test_many_steps_with_delays_at_random(max_staleness: int, steps: int, tmp_path: Path) -> None:
    with running(tmp_path, max_staleness, TINY) as run:
        ops = run.gates.thread.follower.plan.keys
        streamed = {task.tensor for task in run.gates.thread.follower.plan.stores}
        assert not run.resident and len(streamed) == 2 * len(set(ops)), "parameters, states and masters are to stream"
        run.warm_up()
        run.gates.hold("chosen")
        run.step(2)
        assert run.gates.waits == []
        run.gates.open()  # There is one merged parcel at least, whatever the delays make of the rest.
        delay_the_updater(run, Delays(1, 0.02))
        delay_the_disk(run, Delays(2, 0.02))
        training = Delays(3, 0.2)
        while len(run.steps) < steps:
            run.step()  # The history looks at the bound at every first use.
            training.maybe()
        run.assert_replayed()
        assert all(run.clock(unit) == (steps, steps, steps) for unit in run.units)
        assert run.engine.stats().dropped_gradients == run.engine.stats().dropped_steps == 0
        merged = {
            later - earlier for ends in run.history.published.values() for earlier, later in zip([0, *ends], ends)
        }
        assert 2 <= max(merged) <= max_staleness + 1
