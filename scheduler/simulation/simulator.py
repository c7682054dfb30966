"""Follows a plan on paper: when each op and each task begins and ends, given bandwidths. Pure and deterministic.

`scheduler.planning.bounds` replays the plan frame by frame and says what moves; `scheduler.simulation.lanes` says how
long it takes. Where a thread updates beside the steps, `scheduler.simulation.round_replay` performs its round on the
same lanes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from scheduler.planning.bounds import Replay
from scheduler.planning.machine import Machine, TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.sources import TensorSource
from scheduler.planning.task import Lane, Task
from scheduler.planning.trace import Trace
from scheduler.planning.work import Work
from scheduler.simulation.lane_queues import PerformedOp, Run, SimulatedWait
from scheduler.simulation.lanes import NS, SimulatedLanes
from scheduler.simulation.round_replay import RoundReplay

#: Cycles performed at most before the step time is taken of all of them together.
MAX_CYCLES: Final = 24
#: The same for steps that a round of updates is beside, and those of them, the first ones, that are left out.
ROUND_CYCLES: Final = 40
ROUND_LEAD_CYCLES: Final = 15


@dataclass(frozen=True, slots=True)
class Simulation:
    """A plan's execution.

    Attributes:
        step_s: seconds of one step, in the cycles that repeat for ever (``steady``), else the mean of all.
        busy: share of that time that each lane is busy.
        waits: of the last cycle, by op.
        lane_bytes: moved per step by each lane, over the same cycles as ``step_s``.
        missed: steps that parameters of units that are updated beside the steps miss at their first use, mean.
    """

    step_s: float
    steady: bool
    busy: Mapping[Lane, float]
    waits: tuple[SimulatedWait, ...]
    lane_bytes: Mapping[Lane, float]
    missed: float = 0.0

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
    lanes, replay, beside = _begun(plan, work)
    most, lead = (MAX_CYCLES, 0) if beside is None else (ROUND_CYCLES, ROUND_LEAD_CYCLES)
    began = _CycleEnd((), 0, dict.fromkeys(Lane, 0), dict.fromkeys(Lane, 0))
    waits: list[SimulatedWait] = []
    ends: list[_CycleEnd] = []
    found: _CycleEnd | None = None
    while found is None and len(ends) < most:
        lanes.waits = []
        replay.cycle()
        waits += lanes.waits if len(ends) >= lead else ()
        end = _cycle_end(replay, lanes, beside)
        found = next((earlier for earlier in reversed(ends) if earlier.state == end.state), None)
        ends.append(end)
    n_cycles = len(ends) - (ends.index(found) + 1 if found else lead)
    if found is not None:
        began, last = found, ends[-1]
    elif beside is None:
        last = _all_over(replay, lanes)
    else:
        began, last = ends[lead - 1], ends[-1]
    n_steps, spent_ns = plan.n_steps * n_cycles, last.at_ns - began.at_ns
    return Simulation(
        step_s=spent_ns / n_steps / NS,
        steady=found is not None,
        busy={lane: (last.busy_ns[lane] - began.busy_ns[lane]) / spent_ns if spent_ns else 0.0 for lane in Lane},
        waits=tuple(lanes.waits if beside is None or found is not None else _shared_out(waits, n_cycles)),
        lane_bytes={lane: (last.moved_bytes[lane] - began.moved_bytes[lane]) / n_steps for lane in Lane},
        missed=statistics.mean(beside.missed[len(beside.missed) // 2 :]) if beside and beside.missed else 0.0,
    )


def _begun(plan: Plan, work: Work) -> tuple[SimulatedLanes, Replay, RoundReplay | None]:
    """Lanes, and who is followed on them."""
    lanes = SimulatedLanes(work.machine)
    replay = Replay(work, plan, lanes)
    beside = None if plan.updates is None else RoundReplay(plan, work, lanes)
    lanes.beside = beside
    return lanes, replay, beside


def _shared_out(waits: list[SimulatedWait], n_cycles: int) -> list[SimulatedWait]:
    """Waits of so many cycles, as if each of these had its part of all."""
    return [replace(wait, seconds=wait.seconds / n_cycles) for wait in waits]


@dataclass(frozen=True, slots=True)
class _CycleEnd:
    """The end of a cycle: everything that the next one depends on, relative to its time."""

    state: tuple[object, ...]
    at_ns: int
    busy_ns: Mapping[Lane, int]
    moved_bytes: Mapping[Lane, int]


def _cycle_end(replay: Replay, lanes: SimulatedLanes, beside: RoundReplay | None) -> _CycleEnd:
    frames = replay.frames
    held = tuple((tensor, frames.where[tensor], frames.is_dirty(tensor)) for tensor in sorted(frames.where))
    moved = dict(replay.moved_bytes)
    state: tuple[object, ...] = ()
    if beside is not None:
        moved = {lane: n_bytes + beside.moved_bytes[lane] for lane, n_bytes in moved.items()}
        state = beside.state()
    return _CycleEnd((held, lanes.pending(), state), lanes.now_ns, dict(lanes.busy_ns), moved)


def _all_over(replay: Replay, lanes: SimulatedLanes) -> _CycleEnd:
    """As `_cycle_end`, once all tasks are over."""
    at_ns = lanes.finish()
    return _CycleEnd((), at_ns, dict(lanes.busy_ns), dict(replay.moved_bytes))


# ---- when each task begins and ends ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TimedOp:
    """An op of compute.

    Attributes:
        op: its index in the cycle. waits_s: that it waited before it began, of which ``wait`` says why.
    """

    op: int
    begin_s: float
    end_s: float
    wait: SimulatedWait | None = None

    @property
    def waits_s(self) -> float:
        """Seconds."""
        return 0.0 if self.wait is None else self.wait.seconds


@dataclass(frozen=True, slots=True)
class TimedTask:
    """A task that a cycle starts.

    Attributes:
        asked_s: when the op that triggers it let it start. begin_s, end_s: of its work on the lane. They may lie beyond
            the cycle's end.
        moves: whether it has anything to do: a tensor that did not change is not stored, one that is there not loaded.
        restores: it belongs to no op, and puts the first placement of the cycle up.
        behind: the lane that kept it from starting when it was asked for, if one did.
        beside: its ops are those of the round of updates beside the steps.
    """

    task: Task
    asked_s: float
    begin_s: float
    end_s: float
    moves: bool
    restores: bool
    behind: Lane | None
    beside: bool = False


@dataclass(frozen=True, slots=True)
class PlannedCycle:
    """A cycle; times are seconds since its beginning.

    Attributes:
        n_steps: that it has. end_s: its last op's end.
        tasks: in the order in which they are asked for.
    """

    n_steps: int
    end_s: float
    ops: tuple[TimedOp, ...]
    tasks: tuple[TimedTask, ...]


def planned_cycle(plan: Plan, work: Work) -> PlannedCycle:
    """Follow a plan until its cycles repeat, and note the next one.

    Args:
        work: what the plan was made of, or of the same shape with other times.

    Raises:
        PlanError: the plan does not hold. ValueError: a bandwidth is not above 0.
    """
    lanes, replay, beside = _begun(plan, work)
    seen = set[tuple[object, ...]]()
    while len(seen) < MAX_CYCLES:
        replay.cycle()
        state = (lanes.pending(), () if beside is None else beside.state())
        if state in seen:
            break
        seen.add(state)
    lanes.waits, lanes.performed, lanes.started = [], [], []
    began_ns = lanes.now_ns
    replay.cycle()
    waits, performed, started, end_ns = lanes.waits, lanes.performed, lanes.started, lanes.now_ns
    lanes.performed = lanes.started = None
    replay.cycle()  # What is under way at the end goes on beside the tasks of the next cycle.
    lanes.finish()
    planned = {id(task) for task in (*plan.tasks, *plan.carried)}
    return PlannedCycle(
        plan.n_steps,
        (end_ns - began_ns) / NS,
        tuple(_op(op, waits, began_ns) for op in performed),
        tuple(_task(run, began_ns, restores=not run.beside and id(run.task) not in planned) for run in started),
    )


def _op(op: PerformedOp, waits: list[SimulatedWait], began_ns: int) -> TimedOp:
    wait = next((wait for wait in waits if wait.op == op.position), None)
    return TimedOp(op.position, (op.begun_ns - began_ns) / NS, (op.ended_ns - began_ns) / NS, wait)


def _task(run: Run, began_ns: int, *, restores: bool) -> TimedTask:
    asked_s, begin_s, end_s = ((at_ns - began_ns) / NS for at_ns in (run.asked_ns, run.begun_ns, run.ended_ns))
    late = run.begun_ns > run.asked_ns
    return TimedTask(run.task, asked_s, begin_s, end_s, run.needs_lane, restores, run.by if late else None, run.beside)
