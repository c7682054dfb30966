"""Follows a plan on paper: when each op and each move begins and ends, given bandwidths. Pure and deterministic.

Three lanes: compute, ssd_read, ssd_write. Each serves in order: ops in the order of the trace, loads and stores in the
order of the plan. So the order of events never depends on how long one takes, and each begins at the latest of what it
waits for:

    op       the op before has ended; its loads have; the copies out of what it changes have
    load     the op that triggers it has been reached; the load before has its window; every tenant of its own has been
             stored; then ssd_read is free
    store    the op that triggers it has been reached; ssd_write is free

A load of frames alone (`fresh`) needs its window and no lane. Times are whole nanoseconds, rounded up. The plan must
hold: see `scheduler.planning.bounds`, which is asked first.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from pagemem.units import ceil_div
from scheduler.planning.bounds import check_bounds
from scheduler.planning.lookahead import TierSpec
from scheduler.planning.plan import LoadTask, Plan
from scheduler.planning.trace import CHANGES, ENDS, AccessMode, Op, Trace

#: Cycles performed at most before the step time is taken of all of them together.
MAX_CYCLES: Final = 24
_NS: Final = 1_000_000_000


class Lane(enum.Enum):
    """What can be busy."""

    COMPUTE = "compute"
    SSD_READ = "ssd_read"
    SSD_WRITE = "ssd_write"


@dataclass(frozen=True, slots=True)
class SimulatedWait:
    """An op that began later than the one before it ended.

    Attributes:
        op: its index in the cycle.
        tensor: what it waited for.
        lane: the lane that made it late: ``ssd_write`` also where a load waited for frames to be stored first.
    """

    op: int
    name: str
    seconds: float
    tensor: TensorId
    lane: Lane


@dataclass(frozen=True, slots=True)
class Simulation:
    """A plan's execution.

    Attributes:
        step_s: seconds of one step, in the cycles that repeat for ever (``steady``), else the mean of all.
        run_s: seconds until every lane is idle after ``n_cycles`` cycles.
        busy: share of that time that each lane is busy.
        waits: of the last cycle, by op.
        peak_frames: the most host frames in use at once.
        read_bytes, written_bytes: moved per step, over the same cycles as ``step_s``.
    """

    step_s: float
    run_s: float
    n_cycles: int
    steady: bool
    busy: Mapping[Lane, float]
    waits: tuple[SimulatedWait, ...]
    peak_frames: int
    read_bytes: float
    written_bytes: float

    @property
    def limiting(self) -> Lane:
        """The lane that is busy most."""
        return max(Lane, key=lambda lane: self.busy[lane])


def simulate(
    plan: Plan,
    trace: Trace,
    n_bytes: Mapping[TensorId, int],
    tier: TierSpec,
    resident: Mapping[TensorId, FrameId] | None = None,
    *,
    latency_s: float = 0.0,
) -> Simulation:
    """Execute a plan until its cycles repeat.

    Args:
        trace, n_bytes, tier, resident: what the plan was made of, or of the same shape with other times: durations and
            bandwidths may differ from those that it was made with.
        latency_s: of each load and each store, beside its bytes.

    Raises:
        PlanError: the plan does not hold.
        ValueError: a bandwidth is not above 0, or the latency is below.
    """
    if min(tier.read_bytes_per_s, tier.write_bytes_per_s) <= 0 or latency_s < 0:
        raise ValueError(f"bandwidths must be above 0 and the latency not below, not {tier} and {latency_s}")
    check_bounds(plan, trace, n_bytes, tier, resident)
    run = _SimulatedLanes(plan, trace, n_bytes, tier, latency_s)
    ends: list[_CycleEnd] = []
    found: _CycleEnd | None = None
    while found is None and len(ends) < MAX_CYCLES:
        run.cycle()
        end = run.cycle_end()
        found = next((earlier for earlier in reversed(ends) if earlier.state == end.state), None)
        ends.append(end)
    return _summary(run, ends, found)


def _summary(run: _SimulatedLanes, ends: list[_CycleEnd], found: _CycleEnd | None) -> Simulation:
    last, n_steps = ends[-1], run.plan.n_steps
    run_ns = max(run.now_ns, *run.free_ns.values())
    began = found or _CycleEnd((), 0, dict.fromkeys(Lane, 0), (0, 0))
    cycles = len(ends) - (ends.index(found) + 1 if found else 0)
    spent_ns = last.at_ns - began.at_ns if found else run_ns
    return Simulation(
        step_s=spent_ns / (cycles * n_steps) / _NS,
        run_s=run_ns / _NS,
        n_cycles=len(ends),
        steady=found is not None,
        busy={lane: (last.busy_ns[lane] - began.busy_ns[lane]) / spent_ns if spent_ns else 0.0 for lane in Lane},
        waits=tuple(run.waits),
        peak_frames=run.peak_frames(),
        read_bytes=(last.moved_bytes[0] - began.moved_bytes[0]) / (cycles * n_steps),
        written_bytes=(last.moved_bytes[1] - began.moved_bytes[1]) / (cycles * n_steps),
    )


@dataclass(frozen=True, slots=True)
class _CycleEnd:
    """The end of a cycle: everything that the next one depends on, relative to its time."""

    state: tuple[object, ...]
    at_ns: int
    busy_ns: Mapping[Lane, int]
    moved_bytes: tuple[int, int]


@dataclass(slots=True)
class _Tensor:
    """A tensor's times. ``by`` is the lane that made ``ready_ns`` as late as it is."""

    frame: FrameId | None = None
    dirty: bool = False
    ready_ns: int = 0
    by: Lane = Lane.SSD_READ
    stored_ns: int = 0


def _ceil_ns(seconds: float) -> int:
    return math.ceil(round(seconds * _NS, 3))  # Without what binary fractions add to decimal ones.


@dataclass(slots=True)
class _SimulatedLanes:
    """The three lanes and the clock of the training thread."""

    plan: Plan
    trace: Trace
    n_bytes: Mapping[TensorId, int]
    tier: TierSpec
    latency_s: float
    tensors: dict[TensorId, _Tensor] = field(init=False)
    owners: list[TensorId | None] = field(init=False)
    free_ns: dict[Lane, int] = field(init=False)
    busy_ns: dict[Lane, int] = field(init=False)
    now_ns: int = 0
    now: int = 0
    window_ns: int = 0
    window_by: Lane = Lane.SSD_READ
    dying: dict[TensorId, int] = field(default_factory=dict)
    frame_changes: list[tuple[int, int]] = field(default_factory=list)
    waits: list[SimulatedWait] = field(default_factory=list)
    read_bytes: int = 0
    written_bytes: int = 0

    def __post_init__(self) -> None:
        self.tensors = {tensor: _Tensor() for tensor in [*self.trace.tensors(), *self.plan.initial]}
        self.owners = [None] * self.plan.n_frames
        self.free_ns, self.busy_ns = dict.fromkeys(Lane, 0), dict.fromkeys(Lane, 0)
        for tensor, frame in self.plan.initial.items():
            self.occupy(tensor, frame, 0)
        for load in self.plan.carried:
            self.load(load)

    # ---- frames ------------------------------------------------------------------------------------------------

    def size(self, tensor: TensorId) -> int:
        """Frames of a tensor."""
        return ceil_div(self.n_bytes[tensor], self.tier.page_bytes)

    def occupy(self, tensor: TensorId, frame: FrameId, at_ns: int) -> None:
        """Give free frames to a tensor."""
        size = self.size(tensor)
        self.owners[frame : frame + size] = [tensor] * size
        self.tensors[tensor].frame = frame
        self.frame_changes.append((at_ns, size))

    def free(self, tensor: TensorId, at_ns: int) -> None:
        """Take a tensor's frames back."""
        record, size = self.tensors[tensor], self.size(tensor)
        assert record.frame is not None
        self.owners[record.frame : record.frame + size] = [None] * size
        record.frame = None
        self.frame_changes.append((at_ns, -size))

    def peak_frames(self) -> int:
        """The most frames in use at once; what is freed at an instant is free for what comes in then."""
        used = peak = 0
        for _, change in sorted(self.frame_changes):
            used += change
            peak = max(peak, used)
        return peak

    # ---- moves -------------------------------------------------------------------------------------------------

    def serve(self, lane: Lane, tensor: TensorId, from_ns: int) -> int:
        """Move a tensor over a lane, at ``from_ns`` or once the lane is free; returns when that is over."""
        bytes_per_s = self.tier.read_bytes_per_s if lane is Lane.SSD_READ else self.tier.write_bytes_per_s
        takes_ns = _ceil_ns(self.latency_s + self.n_bytes[tensor] / bytes_per_s)
        self.free_ns[lane] = max(self.free_ns[lane], from_ns) + takes_ns
        self.busy_ns[lane] += takes_ns
        return self.free_ns[lane]

    def store(self, tensor: TensorId) -> None:
        """Copy a tensor out if it has changed."""
        record = self.tensors[tensor]
        if record.frame is not None and record.dirty:
            record.dirty = False
            record.stored_ns = self.serve(Lane.SSD_WRITE, tensor, self.now_ns)
            self.written_bytes += self.n_bytes[tensor]

    def load(self, task: LoadTask) -> None:
        """Bring a tensor in once its window is free."""
        record = self.tensors[task.tensor]
        if record.frame == task.frame:
            return
        tenants = {t for t in self.owners[task.frame : task.frame + self.size(task.tensor)] if t is not None}
        if record.frame is not None:
            tenants.add(task.tensor)
        # The loads before this one have their windows already: the lane starts them in order.
        window_ns, by = self.window_ns, self.window_by
        if self.now_ns >= window_ns:
            window_ns, by = self.now_ns, Lane.SSD_READ
        for tenant in sorted(tenants):
            if self.tensors[tenant].stored_ns > window_ns:
                window_ns, by = self.tensors[tenant].stored_ns, Lane.SSD_WRITE
        for tenant in tenants:
            self.free(tenant, window_ns)
        self.window_ns, self.window_by = window_ns, by
        self.occupy(task.tensor, task.frame, window_ns)
        record.dirty, record.ready_ns, record.by = False, window_ns, by
        if not task.fresh:
            if self.free_ns[Lane.SSD_READ] > window_ns:
                record.by = Lane.SSD_READ
            record.ready_ns = self.serve(Lane.SSD_READ, task.tensor, window_ns)
            self.read_bytes += self.n_bytes[task.tensor]

    def restore(self) -> None:
        """Begin a cycle of a plan that does not close: put every tensor where it begins."""
        initial = self.plan.initial
        misplaced = sorted(t for t, r in self.tensors.items() if r.frame is not None and initial.get(t) != r.frame)
        for tensor in misplaced:
            self.store(tensor)
        for tensor in misplaced:
            record = self.tensors[tensor]
            self.free(tensor, max(self.now_ns, record.stored_ns))
            if record.stored_ns > max(self.window_ns, self.now_ns):
                self.window_ns, self.window_by = record.stored_ns, Lane.SSD_WRITE
        first_use = {a.tensor: i for i, op in reversed(list(enumerate(self.trace.ops))) for a in op.accesses}
        for tensor in sorted(initial, key=lambda t: (first_use.get(t, 0), t)):
            self.load(LoadTask(tensor, initial[tensor], 0, 0))
        for load in self.plan.carried:
            self.load(load)

    # ---- ops ---------------------------------------------------------------------------------------------------

    def cycle(self) -> None:
        """Perform one cycle."""
        self.waits = []
        if self.now and not self.plan.closed:
            self.restore()
        n_ops = len(self.trace.ops)
        for position in range(len(self.plan.keys)):
            for store in self.plan.stores_at.get(position, ()):
                self.store(store.tensor)
            for load in self.plan.loads_at.get(position, ()):
                self.load(load)
            op = self.trace.ops[position % n_ops]
            self.perform(op, position, until=self.now - position % n_ops + op.until)
            self.now += 1
            for tensor in [t for t, until in self.dying.items() if until < self.now]:
                del self.dying[tensor]
                self.free(tensor, self.now_ns)

    def perform(self, op: Op, position: int, until: int) -> None:
        """Wait for an op's tensors and let it run."""
        begin_ns, cause, by = self.now_ns, None, Lane.COMPUTE
        for access in op.accesses:
            record = self.tensors[access.tensor]
            moves = [(record.ready_ns, record.by)]
            if access.mode is not AccessMode.READ:
                moves.append((record.stored_ns, Lane.SSD_WRITE))
            for ready_ns, lane in moves:
                if ready_ns > begin_ns:
                    begin_ns, cause, by = ready_ns, access.tensor, lane
        if cause is not None:
            self.waits.append(SimulatedWait(position, op.name, (begin_ns - self.now_ns) / _NS, cause, by))
        takes_ns = _ceil_ns(op.duration_s)
        self.busy_ns[Lane.COMPUTE] += takes_ns
        self.now_ns = begin_ns + takes_ns
        for access in op.accesses:
            record = self.tensors[access.tensor]
            if access.mode in CHANGES:
                record.dirty = True
            elif access.mode in ENDS and record.frame is not None:
                record.dirty = False
                self.dying[access.tensor] = max(until, self.dying.get(access.tensor, until))

    def cycle_end(self) -> _CycleEnd:
        """The end of a cycle. Times that are past all count as now: nobody will wait for them."""

        def left_ns(at_ns: int) -> int:
            return max(0, at_ns - self.now_ns)

        records = tuple(
            (tensor, r.frame, r.dirty, left_ns(r.ready_ns), left_ns(r.stored_ns))
            for tensor, r in sorted(self.tensors.items())
        )
        lanes = tuple(left_ns(self.free_ns[lane]) for lane in Lane)
        return _CycleEnd(
            (records, lanes, left_ns(self.window_ns)),
            self.now_ns,
            dict(self.busy_ns),
            (self.read_bytes, self.written_bytes),
        )
