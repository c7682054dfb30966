"""Lanes that share one rate: by hand, and what must hold of any of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier
from scheduler.planning.machine import Machine, SharedRate
from scheduler.planning.task import Lane, Task, load_task, store_task
from scheduler.planning.trace import Op, OpKind
from scheduler.simulation.lane_queues import SimulatedWait
from scheduler.simulation.lanes import NS, SimulatedLanes

READ, WRITE = Lane.SSD_READ, Lane.SSD_WRITE
DISK = frozenset((READ, WRITE))
MS = NS // 1000
OP = Op((OpKind.FORWARD, 0), "op", (), 0.001)


def machine(read: float, write: float, together: float | None) -> Machine:
    """A page of one byte; rates in bytes a millisecond."""
    shared = () if together is None else (SharedRate(DISK, together * 1e3),)
    return Machine(1, {Tier.HOST: 8}, {READ: read * 1e3, WRITE: write * 1e3}, shared)


def load(n_bytes: int) -> Task:
    return load_task(TensorId(1), n_bytes, FrameId(0), 0, 0)


def store(n_bytes: int) -> Task:
    return store_task(TensorId(2), n_bytes, 0)


def test_two_lanes_take_turns_at_a_shared_rate_until_one_is_over() -> None:
    # 2 bytes a ms together: both get 1 until the store of 4 is over at 4 ms; then the load has 2 for its other 4.
    lanes = SimulatedLanes(machine(2, 2, 2))
    lanes.started = []
    lanes.start(0, load(8), ())
    lanes.start(1, store(4), ())
    assert lanes.finish() == 6 * MS
    assert [(run.number, run.begun_ns, run.ended_ns) for run in lanes.started] == [(0, 0, 6 * MS), (1, 0, 4 * MS)]
    assert lanes.busy_ns[READ] == 6 * MS and lanes.busy_ns[WRITE] == 4 * MS


def test_what_comes_later_slows_down_what_is_under_way() -> None:
    # The load is alone for 1 ms (2 of its 6 bytes); then it shares with 2 bytes stored, for 2 ms; the last 2 take 1 ms.
    lanes = SimulatedLanes(machine(2, 2, 2))
    lanes.start(0, load(6), ())
    lanes.perform(OP, 0, ())
    lanes.start(1, store(2), ())
    lanes.perform(OP, 1, (0,))
    assert lanes.waits == [SimulatedWait(1, "op", 0.003, TensorId(1), READ)] and lanes.now_ns == 5 * MS


def test_what_a_slow_lane_cannot_use_is_the_others() -> None:
    slowed = machine(9, 1, 4).slowed((READ, WRITE))
    assert slowed == {READ: pytest.approx(3 / 4)}  # of the 4 that it has alone
    assert machine(9, 1, 4).rate(READ) == 4000 and machine(9, 1, 4).rate(WRITE) == 1000
    assert machine(9, 1, 4).slowed((READ,)) == machine(9, 1, None).slowed((READ, WRITE)) == {}
    assert machine(1, 1, 4).slowed((READ, WRITE)) == {}


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=12),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_no_more_moves_than_the_shared_rate_and_nothing_idles(
    tasks: list[tuple[bool, int, int]], together: float
) -> None:
    """With both lanes able to use all of it, the time until all is over is that of the bytes, and of the pauses in
    which there was nothing to do."""
    lanes = SimulatedLanes(machine(3, 3, together))
    free_s = 0.0
    for run, (reads, n_bytes, pause_ms) in enumerate(tasks):
        lanes.perform(Op((OpKind.FORWARD, 0), "op", (), pause_ms / 1e3), 0, ())
        lanes.start(run, load(n_bytes) if reads else store(n_bytes), ())
        free_s = max(free_s, lanes.now_ns / NS) + n_bytes / (together * 1e3)
    assert lanes.finish() / NS == pytest.approx(free_s, abs=1e-6)
