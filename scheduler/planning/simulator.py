"""Follows a plan on paper: when each op and each task begins and ends, given bandwidths. Pure and deterministic.

`scheduler.planning.bounds` replays the plan frame by frame and says what moves; `scheduler.planning.lanes` says how
long it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from scheduler.planning.bounds import Replay
from scheduler.planning.lanes import NS, SimulatedLanes, SimulatedWait
from scheduler.planning.machine import Machine, TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.sources import TensorSource
from scheduler.planning.task import Lane
from scheduler.planning.trace import Trace
from scheduler.planning.work import Work

#: Cycles performed at most before the step time is taken of all of them together.
MAX_CYCLES: Final = 24


@dataclass(frozen=True, slots=True)
class Simulation:
    """A plan's execution.

    Attributes:
        step_s: seconds of one step, in the cycles that repeat for ever (``steady``), else the mean of all.
        busy: share of that time that each lane is busy.
        waits: of the last cycle, by op.
        lane_bytes: moved per step by each lane, over the same cycles as ``step_s``.
    """

    step_s: float
    steady: bool
    busy: Mapping[Lane, float]
    waits: tuple[SimulatedWait, ...]
    lane_bytes: Mapping[Lane, float]

    @property
    def read_bytes(self) -> float:
        """Of page files, per step."""
        return self.lane_bytes[Lane.SSD_READ]

    @property
    def written_bytes(self) -> float:
        """To page files, per step."""
        return self.lane_bytes[Lane.SSD_WRITE]


def simulate(
    plan: Plan,
    trace: Trace,
    n_bytes: Mapping[TensorId, int],
    tiers: Machine | TierSpec,
    resident: Mapping[TensorId, FrameId] | None = None,
    sources: Mapping[TensorId, TensorSource] | None = None,
) -> Simulation:
    """Execute a plan until its cycles repeat.

    Args:
        trace, n_bytes, tiers, resident, sources: what the plan was made of, or of the same shape with other times:
            durations and bandwidths may differ from those that it was made with.

    Raises:
        PlanError: the plan does not hold.
        ValueError: a bandwidth is not above 0.
    """
    return simulate_work(plan, Work.of(trace, n_bytes, tiers, resident, sources))


def simulate_work(plan: Plan, work: Work) -> Simulation:
    """As `simulate`."""
    for lane, bytes_per_s in work.machine.bytes_per_s.items():
        if bytes_per_s <= 0:
            raise ValueError(f"bandwidths must be above 0, not {bytes_per_s} bytes/s of {lane.value}")
    lanes = SimulatedLanes(work.machine)
    replay = Replay(work, plan, lanes)
    ends: list[_CycleEnd] = []
    found: _CycleEnd | None = None
    while found is None and len(ends) < MAX_CYCLES:
        lanes.waits = []
        replay.cycle()
        end = _cycle_end(replay, lanes)
        found = next((earlier for earlier in reversed(ends) if earlier.state == end.state), None)
        ends.append(end)
    last = ends[-1]
    began = found or _CycleEnd((), 0, dict.fromkeys(Lane, 0), dict.fromkeys(Lane, 0))
    n_steps = plan.n_steps * (len(ends) - (ends.index(found) + 1 if found else 0))
    spent_ns = last.at_ns - began.at_ns if found else max(lanes.now_ns, *lanes.free_ns.values())
    return Simulation(
        step_s=spent_ns / n_steps / NS,
        steady=found is not None,
        busy={lane: (last.busy_ns[lane] - began.busy_ns[lane]) / spent_ns if spent_ns else 0.0 for lane in Lane},
        waits=tuple(lanes.waits),
        lane_bytes={lane: (last.moved_bytes[lane] - began.moved_bytes[lane]) / n_steps for lane in Lane},
    )


@dataclass(frozen=True, slots=True)
class _CycleEnd:
    """The end of a cycle: everything that the next one depends on, relative to its time."""

    state: tuple[object, ...]
    at_ns: int
    busy_ns: Mapping[Lane, int]
    moved_bytes: Mapping[Lane, int]


def _cycle_end(replay: Replay, lanes: SimulatedLanes) -> _CycleEnd:
    """Times that are past all count as now: nobody will wait for them."""

    def left_ns(at_ns: int) -> int:
        return max(0, at_ns - lanes.now_ns)

    frames = replay.frames
    held = tuple((tensor, frames.where[tensor], frames.is_dirty(tensor)) for tensor in sorted(frames.where))
    lanes.forget([run for run, ended in lanes.runs.items() if ended.at_ns <= lanes.now_ns])
    going = tuple((ended.tensor, left_ns(ended.at_ns)) for _, ended in sorted(lanes.runs.items()))
    free = tuple((left_ns(lanes.free_ns[lane]), left_ns(lanes.head_ns[lane])) for lane in Lane)
    return _CycleEnd((held, going, free), lanes.now_ns, dict(lanes.busy_ns), dict(replay.moved_bytes))
