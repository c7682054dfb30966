"""Follows a plan on paper: when each op and each move begins and ends, given bandwidths. Pure and deterministic.

`scheduler.planning.bounds` replays the plan frame by frame and says what moves; `scheduler.planning.lanes` says how
long it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from scheduler.planning.bounds import Replay
from scheduler.planning.lanes import LANES, NS, SimulatedLanes, SimulatedWait
from scheduler.planning.lookahead import TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.task import Lane
from scheduler.planning.trace import Trace

#: Cycles performed at most before the step time is taken of all of them together.
MAX_CYCLES: Final = 24


@dataclass(frozen=True, slots=True)
class Simulation:
    """A plan's execution.

    Attributes:
        step_s: seconds of one step, in the cycles that repeat for ever (``steady``), else the mean of all.
        busy: share of that time that each lane is busy.
        waits: of the last cycle, by op.
        read_bytes, written_bytes: moved per step, over the same cycles as ``step_s``.
    """

    step_s: float
    steady: bool
    busy: Mapping[Lane, float]
    waits: tuple[SimulatedWait, ...]
    read_bytes: float
    written_bytes: float


def simulate(
    plan: Plan,
    trace: Trace,
    n_bytes: Mapping[TensorId, int],
    tier: TierSpec,
    resident: Mapping[TensorId, FrameId] | None = None,
) -> Simulation:
    """Execute a plan until its cycles repeat.

    Args:
        trace, n_bytes, tier, resident: what the plan was made of, or of the same shape with other times: durations and
            bandwidths may differ from those that it was made with.

    Raises:
        PlanError: the plan does not hold.
        ValueError: a bandwidth is not above 0.
    """
    if min(tier.read_bytes_per_s, tier.write_bytes_per_s) <= 0:
        raise ValueError(f"bandwidths must be above 0, not {tier}")
    lanes = SimulatedLanes(n_bytes, tier)
    replay = Replay(trace, plan, n_bytes, tier.page_bytes, resident or {}, lanes)
    ends: list[_CycleEnd] = []
    found: _CycleEnd | None = None
    while found is None and len(ends) < MAX_CYCLES:
        lanes.waits = []
        replay.cycle()
        end = _cycle_end(replay, lanes)
        found = next((earlier for earlier in reversed(ends) if earlier.state == end.state), None)
        ends.append(end)
    last = ends[-1]
    began = found or _CycleEnd((), 0, dict.fromkeys(LANES, 0), (0, 0))
    n_steps = plan.n_steps * (len(ends) - (ends.index(found) + 1 if found else 0))
    spent_ns = last.at_ns - began.at_ns if found else max(lanes.now_ns, *lanes.free_ns.values())
    return Simulation(
        step_s=spent_ns / n_steps / NS,
        steady=found is not None,
        busy={lane: (last.busy_ns[lane] - began.busy_ns[lane]) / spent_ns if spent_ns else 0.0 for lane in LANES},
        waits=tuple(lanes.waits),
        read_bytes=(last.moved_bytes[0] - began.moved_bytes[0]) / n_steps,
        written_bytes=(last.moved_bytes[1] - began.moved_bytes[1]) / n_steps,
    )


@dataclass(frozen=True, slots=True)
class _CycleEnd:
    """The end of a cycle: everything that the next one depends on, relative to its time."""

    state: tuple[object, ...]
    at_ns: int
    busy_ns: Mapping[Lane, int]
    moved_bytes: tuple[int, int]


def _cycle_end(replay: Replay, lanes: SimulatedLanes) -> _CycleEnd:
    """Times that are past all count as now: nobody will wait for them."""

    def left_ns(at_ns: int) -> int:
        return max(0, at_ns - lanes.now_ns)

    held = tuple((tensor, replay.where[tensor], replay.is_dirty(tensor)) for tensor in sorted(replay.where))
    times = {tensor: (left_ns(t.ready_ns), left_ns(t.stored_ns)) for tensor, t in lanes.times.items()}
    free = tuple(left_ns(free_ns) for free_ns in lanes.free_ns.values())
    return _CycleEnd(
        (held, times, free, left_ns(lanes.window_ns)),
        lanes.now_ns,
        dict(lanes.busy_ns),
        (replay.bytes_read, replay.bytes_written),
    )
