"""Plans page moves: which, when, and into which frames. A pure function of the trace.

A reader runs ahead through the cyclic trace and chooses frames for every load (`scheduler.planning.lookahead`). When
the placement at a step's end equals that of an earlier one, the steps in between are the plan's cycle, and it closes by
itself. In a tight budget placements wander instead; then the cycle is the run of steps whose two ends differ least, and
the driver restores the first placement once per cycle. Frames are part of the plan: at run time nothing is allocated,
fragmented or compacted.

The reader avoids each stall as it comes and pays with moves. Where the disk is what limits a step, those moves are the
next stalls. So several plans are made: one in which every tensor may move, and some in which a part of the frames is
given for good to the tensors that are used most often. The quickest is taken; moves count as the processor time that
they take, too.

Source: Angel-PTM (VLDB 2023), unified scheduling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pagemem.errors import BudgetError
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import FrameId, Shortage, TensorId
from pagemem.tier import Tier
from pagemem.units import ceil_div
from scheduler import knobs
from scheduler.planning.lookahead import LookaheadReader, Placed, TierSpec
from scheduler.planning.plan import Plan, by_trigger
from scheduler.planning.task import Task, store_task
from scheduler.planning.trace import CHANGES, AccessMode, Trace

#: Steps read ahead at most, steps at the beginning that are left out (the reader begins with empty host memory), and
#: the shortest cycle that is worth restoring a placement for.
MAX_STEPS: Final = 12
WARM_UP_STEPS: Final = 2
MIN_CYCLE_STEPS: Final = 5
#: The same for steps of very many ops, and for plans that only compare steps.
FEW_STEPS: Final = 5
SHORT_CYCLE_STEPS: Final = 2

#: What a step must do with a tensor that can be kept: its content is the same tensor's from step to step.
_LASTING: Final = frozenset({AccessMode.READ, AccessMode.MODIFY})


def make_plan(
    trace: Trace,
    n_bytes: Mapping[TensorId, int],
    tier: TierSpec,
    resident: Mapping[TensorId, FrameId] | None = None,
    *,
    single_step_cycle: bool = False,
    fast: bool = False,
) -> Plan:
    """Schedule the page moves of a step that repeats.

    Args:
        trace: the step's ops with durations.
        n_bytes: size of every tensor in the trace and in ``resident``.
        tier: host frames and page-file bandwidths.
        resident: tensors that are in host memory for good, in the trace or not, and their first frames.
        single_step_cycle: every step has the same moves, at the price of restoring the placement when a step begins.
        fast: in a tenth to a third of the time, for comparing steps: one short reader.

    Returns:
        A plan whose moves never need more than ``tier.n_frames`` frames. That of a step without ops moves nothing.

    Raises:
        BudgetError: the tensors of one op do not fit together.
    """
    if not trace.ops:
        return _idle(n_bytes, tier, resident or {})
    plan = _plan_with(trace, n_bytes, tier, resident or {}, single_step_cycle, fast)
    if not plan.loads or fast:
        return plan
    found = [plan]
    for kept in _kept_sets(trace, n_bytes, tier, resident or {}):
        try:
            found.append(_plan_with(trace, n_bytes, tier, kept, single_step_cycle, fast))
        except BudgetError:
            break  # the next one keeps more
    return min(found, key=cost_s)


def _idle(n_bytes: Mapping[TensorId, int], tier: TierSpec, resident: Mapping[TensorId, FrameId]) -> Plan:
    """The plan of a tier that no op of a step asks for anything: all of its work is done above."""
    return Plan(
        keys=(),
        n_steps=1,
        n_frames=tier.n_frames,
        initial=dict(resident),
        loads=(),
        stores=(),
        carried=(),
        closed=True,
        peak_frames=_peak_frames(resident, (), n_bytes, tier.page_bytes),
        read_bytes=0,
        written_bytes=0,
        step_s=0.0,
        compute_s=0.0,
    )


def cost_s(plan: Plan) -> float:
    """Seconds that a step is charged for in comparing plans: as predicted, and what its moves take from compute."""
    return plan.step_s + knobs.MOVE_S_PER_BYTE * plan.moved_bytes


def _kept_sets(
    trace: Trace, n_bytes: Mapping[TensorId, int], tier: TierSpec, resident: Mapping[TensorId, FrameId]
) -> Iterator[dict[TensorId, FrameId]]:
    """What each further plan keeps beside ``resident``: tensors by number of ops that use them, then in step order."""
    n_uses: dict[TensorId, int] = {}
    passing: set[TensorId] = set(resident)
    for op in trace.ops:
        for access in op.accesses:
            n_uses[access.tensor] = n_uses.get(access.tensor, 0) + 1
            if access.mode not in _LASTING:
                passing.add(access.tensor)
    wanted = sorted((tensor for tensor in n_uses if tensor not in passing), key=lambda tensor: -n_uses[tensor])
    before: dict[TensorId, FrameId] = {}
    for share in knobs.KEPT_SHARES if len(trace.ops) <= knobs.MANY_OPS else (knobs.ONE_SHARE,):
        frames = PageAllocator(Tier.HOST, tier.page_bytes, tier.n_frames)
        for tensor, frame in resident.items():
            frames.allocate(tensor, n_bytes[tensor], contiguous=True, at=frame)
        kept, left = dict(resident), int(share * tier.n_frames) - frames.used_frames
        for tensor in wanted:
            n_pages = ceil_div(n_bytes[tensor], tier.page_bytes)
            if n_pages > left:
                continue
            placed = frames.allocate(tensor, n_bytes[tensor], contiguous=True)
            if not isinstance(placed, Shortage):
                kept[tensor] = placed.runs[0].first
                left -= n_pages
        if kept != before and len(kept) > len(resident):
            yield kept
        before = kept


def _plan_with(
    trace: Trace,
    n_bytes: Mapping[TensorId, int],
    tier: TierSpec,
    resident: Mapping[TensorId, FrameId],
    single_step_cycle: bool,
    fast: bool,
) -> Plan:
    """The plan that one reader finds."""
    reader = LookaheadReader(trace, n_bytes, tier, resident)
    cycle = _find_cycle(reader, n_bytes, len(trace.ops), single_step_cycle=single_step_cycle, fast=fast)
    return _plan_of(cycle, reader, trace, n_bytes, tier)


def _plan_of(
    cycle: _Cycle, reader: LookaheadReader, trace: Trace, n_bytes: Mapping[TensorId, int], tier: TierSpec
) -> Plan:
    """What the reader did in the steps of a cycle, as tasks with triggers in it."""
    n_ops, first, last, closed = len(trace.ops), cycle.first, cycle.last, cycle.closed
    start, end = first * n_ops, last * n_ops
    loads = [task for task in reader.loads if start <= task.needed_at < end]
    numbered = _numbered_from(start, end - start, loads, closed=closed)
    stores = dict.fromkeys(
        replace(task, trigger=(task.trigger - start) % (end - start))
        for evicted_at, task in reader.stores
        if start <= evicted_at < end
    )
    read_bytes, written_bytes = 0, 0
    if not closed:
        stores |= dict.fromkeys(_unseen_stores(trace, n_bytes, cycle.begins, cycle.ends, loads, start, end))
        read_bytes, written_bytes = _restored_bytes(cycle.begins, cycle.ends, n_bytes)
    restore_s = max(read_bytes / tier.read_bytes_per_s, written_bytes / tier.write_bytes_per_s)
    read_bytes += sum(n_bytes[task.tensor] for task in loads if not task.fresh)
    written_bytes += sum(n_bytes[task.tensor] for task in stores)
    carried = tuple(
        replace(t, trigger=0, needed_at=t.needed_at - (end - start)) for t in numbered if t.needed_at >= end - start
    )
    before_s = reader.op_end_s[start - 1] if start else 0.0
    initial = {tensor: frame for tensor, frame, _, dead in cycle.begins if not dead}
    return Plan(
        keys=trace.keys * (last - first),
        n_steps=last - first,
        n_frames=tier.n_frames,
        initial=initial,
        loads=numbered,
        stores=tuple(stores),
        carried=carried,
        closed=closed,
        peak_frames=_peak_frames(initial, loads, n_bytes, tier.page_bytes),
        read_bytes=read_bytes,
        written_bytes=written_bytes,
        step_s=(reader.op_end_s[end - 1] - before_s + restore_s) / (last - first),
        compute_s=trace.compute_s,
        loads_at=by_trigger(numbered),
        stores_at=by_trigger(tuple(stores)),
    )


@dataclass(frozen=True, slots=True)
class _Cycle:
    """The steps that a plan repeats: from step ``first`` to step ``last``, and the placements at both ends, which are
    equal if it is ``closed``."""

    first: int
    last: int
    closed: bool
    begins: Placed
    ends: Placed


def _find_cycle(
    reader: LookaheadReader, n_bytes: Mapping[TensorId, int], n_ops: int, *, single_step_cycle: bool, fast: bool
) -> _Cycle:
    """Have the reader pass over steps until a placement comes again, or there are enough to choose from."""
    few = fast or n_ops > knobs.VERY_MANY_OPS
    most_steps, shortest = (FEW_STEPS, SHORT_CYCLE_STEPS) if few else (MAX_STEPS, MIN_CYCLE_STEPS)
    placements = [reader.placement()]
    seen = slice(-2, -1) if single_step_cycle else slice(0, -1)
    while len(placements) <= most_steps and (len(placements) < 2 or placements[-1] not in placements[seen]):
        reader.read_step(len(placements) - 1)
        placements.append(reader.placement())
    last = len(placements) - 1
    closed = placements[-1] in placements[seen]
    first = last - 1 if single_step_cycle else placements.index(placements[-1])
    if not closed:
        lengths = range(1, 2) if single_step_cycle else range(shortest, most_steps + 1)
        first, last = _least_different(placements, n_bytes, lengths)
    return _Cycle(first, last, closed, placements[first], placements[last])


def _restored_bytes(first: Placed, last: Placed, n_bytes: Mapping[TensorId, int]) -> tuple[int, int]:
    """What is read and written to have the first placement after the last one."""
    wanted = {(tensor, frame) for tensor, frame, _, dead in first if not dead}
    there = {(tensor, frame) for tensor, frame, _, dead in last if not dead}
    read_bytes = sum(n_bytes[tensor] for tensor, _ in wanted - there)
    return read_bytes, sum(
        n_bytes[tensor] for tensor, frame, dirty, dead in last if dirty and not dead and (tensor, frame) not in wanted
    )


def _numbered_from(start: int, n_ops: int, loads: Sequence[Task], *, closed: bool) -> tuple[Task, ...]:
    """Loads of one cycle with op numbers counted from its beginning; early ones wrap to the cycle before."""
    inside: list[Task] = []
    wrapped: list[Task] = []
    for task in loads:
        trigger, needed_at = task.trigger - start, task.needed_at - start
        if trigger < 0 and closed:
            wrapped.append(replace(task, trigger=trigger + n_ops, needed_at=needed_at + n_ops))
        else:
            inside.append(replace(task, trigger=max(trigger, 0), needed_at=needed_at))
    latest = inside[-1].trigger if inside else 0
    for task in wrapped:
        latest = max(latest, task.trigger)
        inside.append(replace(task, trigger=latest))
    return tuple(inside)


def _least_different(placements: Sequence[Placed], n_bytes: Mapping[TensorId, int], lengths: range) -> tuple[int, int]:
    """Two steps so many steps apart with the most bytes in the same place."""
    candidates = [
        (first, first + length)
        for first in range(WARM_UP_STEPS, len(placements))
        for length in lengths
        if first + length < len(placements)
    ]

    def bytes_in_place(cycle: tuple[int, int]) -> int:
        here, there = ({(tensor, frame) for tensor, frame, _, _ in placements[end]} for end in cycle)
        return sum(n_bytes[tensor] for tensor, _ in here & there)

    return max(candidates, key=bytes_in_place)


def _unseen_stores(
    trace: Trace,
    n_bytes: Mapping[TensorId, int],
    first: Placed,
    last: Placed,
    loads: Sequence[Task],
    start: int,
    end: int,
) -> list[Task]:
    """Stores of a cycle that does not close, which the reader did not see because it went on there.

    A tensor may be in the same frames at both ends, clean at the beginning and dirty at the end. If it then leaves
    before it is changed again, it has to be stored after the last change of the cycle before.
    """
    clean = {(tensor, frame) for tensor, frame, dirty, _ in first if not dirty}
    returns_at = {load.tensor: load.needed_at - start for load in reversed(loads)}
    changes_of: dict[TensorId, list[int]] = {}
    for index, op in enumerate(trace.ops):
        for access in op.accesses:
            if access.mode in CHANGES:
                changes_of.setdefault(access.tensor, []).append(index)
    stores = []
    for tensor in (tensor for tensor, frame, dirty, dead in last if dirty and not dead and (tensor, frame) in clean):
        changes = changes_of[tensor]
        if returns_at.get(tensor, end) <= changes[0]:
            after_last_change = end - start - len(trace.ops) + changes[-1] + 1
            stores.append(store_task(tensor, n_bytes[tensor], after_last_change % (end - start)))
    return stores


def _peak_frames(
    initial: Mapping[TensorId, FrameId], loads: Sequence[Task], n_bytes: Mapping[TensorId, int], page_bytes: int
) -> int:
    """Distinct frames that a cycle touches."""
    touched: set[int] = set()
    for tensor, frame in [*initial.items(), *((task.tensor, task.frame) for task in loads)]:
        touched.update(range(frame, frame + ceil_div(n_bytes[tensor], page_bytes)))
    return len(touched)
