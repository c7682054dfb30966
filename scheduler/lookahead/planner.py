"""Plans what moves: which, when, and into which frames, over all tiers and lanes. A pure function of the trace.

A reader runs ahead through the cyclic trace and chooses frames for everything that comes
(`scheduler.lookahead.reader`); some of its steps are the plan's cycle (`scheduler.lookahead.cycle`). Frames are part
of the plan: at run time nothing is allocated, fragmented or compacted.

The reader avoids each stall as it comes and pays with moves. Where a lane is what limits a step, those moves are the
next stalls. So several plans are made: one in which every tensor may move, and some in which a part of a tier's frames
is given for good to the tensors that are used most often. The quickest is taken; moves count as the processor time that
they take, too.

Source: Angel-PTM (VLDB 2023), unified scheduling.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from pagemem.errors import BudgetError
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import FrameId, Shortage, TensorId
from pagemem.tier import Tier
from pagemem.units import ceil_div
from scheduler import knobs
from scheduler.lookahead.cycle import find_cycle, restored_bytes, tasks_of
from scheduler.lookahead.dependencies import with_dependencies
from scheduler.planning.machine import Machine, TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.sources import TensorSource, chain_of
from scheduler.planning.task import NO_FRAME, Lane, Task
from scheduler.planning.trace import CHANGES, AccessMode, Trace
from scheduler.planning.update_round import WINDOWS
from scheduler.planning.work import Work

#: What a step must do with a tensor that can be kept: its content is the same tensor's from step to step.
_LASTING: Final = frozenset({AccessMode.READ, AccessMode.MODIFY})


def make_plan(
    trace: Trace,
    n_bytes: Mapping[TensorId, int],
    tiers: Machine | TierSpec,
    resident: Mapping[TensorId, FrameId] | None = None,
    sources: Mapping[TensorId, TensorSource] | None = None,
    *,
    fast: bool = False,
) -> Plan:
    """Schedule all that a step that repeats moves.

    Args:
        trace: the step's ops with durations.
        n_bytes: size of every tensor in the trace, in ``resident``, and of what those are made of.
        tiers: frames, and the bandwidths of lanes.
        resident: tensors that are in memory for good, in the trace or not, and their first frames.
        sources: what tensors are made of that are not made of their page files.
        fast: in a tenth to a third of the time, for comparing steps: one short reader.

    Returns:
        A plan that never needs more frames than there are. That of a step without ops moves nothing.

    Raises:
        BudgetError: the tensors of one op do not fit together.
        ValueError: the step cannot be planned at all, see `Work`.
    """
    work = Work.of(trace, n_bytes, tiers, resident, sources)
    return plan_work(work, fast=fast)


def plan_work(work: Work, *, fast: bool = False) -> Plan:
    """As `make_plan`; with the plan of updates beside the step, where it has some."""
    plan = _plan_step(work, fast)
    return plan if work.updates is None else replace(plan, updates=plan_updates(work))


def plan_updates(work: Work) -> Plan:
    """The plan of the updates beside a step: a part of their tensors stays, the others pass through the frames left.

    The order is a cycle, so what is kept had best be the same for good: as much as leaves frames for `WINDOWS` slices.
    Frames are chosen as if reading, updating and writing took equally long, so that one slice can be in each of them at
    a time; the rates give the time of a round alone.

    Raises:
        BudgetError: the tensors of one slice do not fit together.
    """
    absolute = work.of_updates()
    first = absolute.below[Tier.HOST]
    n_frames = absolute.machine.n_frames[Tier.HOST] - first
    sizes = [sum(absolute.frames(access.tensor) for access in op.accesses) for op in absolute.trace.ops]
    equally = dict.fromkeys((Lane.SSD_READ, Lane.SSD_WRITE), float(work.page_bytes))
    machine = Machine(work.page_bytes, {Tier.HOST: n_frames}, equally)
    ops = tuple(replace(op, duration_s=float(size)) for op, size in zip(absolute.trace.ops, sizes, strict=True))
    alone = replace(absolute, trace=Trace(ops), machine=machine, below={})
    if not alone.trace.ops:
        return replace(_idle(alone), frames=absolute.machine.n_frames)
    share = 1.0 if sum(sizes) <= n_frames else 1 - WINDOWS * max(sizes) / n_frames
    kept = next(_kept_sets(alone, Tier.HOST, [share]), {})
    plan = _plan_with(replace(alone, resident=kept), fast=True)
    updates_s = sum(op.duration_s for op in absolute.trace.ops)
    read_s, write_s = (
        work.machine.seconds(lane, plan.lane_bytes.get(lane, 0)) / plan.n_steps
        for lane in (Lane.SSD_READ, Lane.SSD_WRITE)
    )
    return replace(
        plan,
        frames=absolute.machine.n_frames,
        initial={tensor: FrameId(frame + first) for tensor, frame in plan.initial.items()},
        tasks=tuple(_moved_up(task, first) for task in plan.tasks),
        carried=tuple(_moved_up(task, first) for task in plan.carried),
        step_s=max(updates_s, read_s, write_s),
        compute_s=updates_s,
    )


def _moved_up(task: Task, n_frames: int) -> Task:
    return task if task.frame == NO_FRAME else replace(task, frame=FrameId(task.frame + n_frames))


def _plan_step(work: Work, fast: bool) -> Plan:
    if not work.trace.ops:
        return _idle(work)
    best, best_work = _plan_with(work, fast), work
    if not best.tasks or fast:
        return best
    for tier in work.machine.n_frames:
        begun_with = best_work
        shares = knobs.KEPT_SHARES if len(work.trace.ops) <= knobs.MANY_OPS else (knobs.ONE_SHARE,)
        for kept in _kept_sets(begun_with, tier, shares):
            try:
                found = _plan_with(replace(begun_with, resident=kept), fast)
            except BudgetError:
                break  # the next one keeps more
            if cost_s(found) < cost_s(best):
                best, best_work = found, replace(begun_with, resident=kept)
    return best


def cost_s(plan: Plan) -> float:
    """Seconds that a step is charged for in comparing plans: as predicted, and what its moves take from compute, where
    that is not on a device."""
    moving_s = 0.0 if Tier.DEVICE in plan.frames else knobs.MOVE_S_PER_BYTE * plan.moved_bytes
    return plan.step_s + moving_s


def _idle(work: Work) -> Plan:
    """The plan of tiers that no op of a step asks for anything."""
    frames = work.machine.n_frames
    return Plan((), 1, frames, dict(work.resident), (), (), True, _peaks(work, work.resident, ()), {}, 0.0, 0.0)


def _kept_sets(work: Work, tier: Tier, shares: Sequence[float]) -> Iterator[dict[TensorId, FrameId]]:
    """What each further plan keeps beside ``resident`` in a tier, which is so much of its frames: tensors by number of
    ops that use them, then in step order."""
    n_uses: dict[TensorId, int] = {}
    passing: set[TensorId] = set(work.resident)
    changed: set[TensorId] = set()
    for op in work.trace.ops:
        for access in op.accesses:
            n_uses[access.tensor] = n_uses.get(access.tensor, 0) + 1
            if access.mode not in _LASTING:
                passing.add(access.tensor)
            if access.mode in CHANGES:
                changed.add(access.tensor)
    for tensor in work.sources:
        below = list(chain_of(tensor, work.sources))[1:]
        if not changed.isdisjoint(below):
            passing.add(tensor)  # what is made of what changes is made anew
        if tensor in changed:
            passing.update((tensor, *below))
    wanted = [tensor for tensor in n_uses if tensor not in passing and work.tiers[tensor] is tier]
    wanted.sort(key=lambda tensor: -n_uses[tensor])
    n_frames, page_bytes = work.machine.n_frames[tier], work.page_bytes
    before: dict[TensorId, FrameId] = {}
    for share in shares:
        frames = PageAllocator(tier, page_bytes, n_frames)
        for tensor, frame in work.resident.items():
            if work.tiers[tensor] is tier:
                frames.allocate(tensor, work.n_bytes[tensor], contiguous=True, at=frame)
        kept, left = dict(work.resident), int(share * n_frames) - frames.used_frames
        for tensor in wanted:
            n_pages = work.frames(tensor)
            if n_pages > left:
                continue
            placed = frames.allocate(tensor, work.n_bytes[tensor], contiguous=True)
            if not isinstance(placed, Shortage):
                kept[tensor] = placed.runs[0].first
                left -= n_pages
        if kept != before and len(kept) > len(work.resident):
            yield kept
        before = kept


def _plan_with(work: Work, fast: bool) -> Plan:
    """The plan that one reader finds."""
    trace, n_bytes = work.trace, work.n_bytes
    cycle = find_cycle(work, fast=fast)
    inside, wrapped = tasks_of(cycle, trace, n_bytes)
    tasks = with_dependencies(
        work,
        [*inside, *wrapped],
        cycle.n_ops,
        len(wrapped) if cycle.closed else 0,
        cycle.initial,
        closed=cycle.closed,
    )
    read_bytes, written_bytes = restored_bytes(cycle, n_bytes)
    machine, n_steps = work.machine, cycle.n_ops // len(trace.ops)
    restore_s = max(machine.seconds(Lane.SSD_READ, read_bytes), machine.seconds(Lane.SSD_WRITE, written_bytes))
    lane_bytes = {Lane.SSD_READ: read_bytes, Lane.SSD_WRITE: written_bytes}
    for task in tasks:
        if not task.fresh:
            lane_bytes[task.lane] = lane_bytes.get(task.lane, 0) + task.n_bytes
    carried = (replace(t, trigger=0, needed_at=t.needed_at - cycle.n_ops) for t in tasks if t.needed_at >= cycle.n_ops)
    return Plan(
        keys=trace.keys * n_steps,
        n_steps=n_steps,
        frames=machine.n_frames,
        initial=cycle.initial,
        tasks=tasks,
        carried=tuple(carried),
        closed=cycle.closed,
        peaks=_peaks(work, cycle.initial, tasks),
        lane_bytes=lane_bytes,
        step_s=(cycle.seconds + restore_s) / n_steps,
        compute_s=trace.compute_s,
    )


def _peaks(work: Work, initial: Mapping[TensorId, FrameId], tasks: Iterable[Task]) -> dict[Tier, int]:
    """Distinct frames that a cycle touches, by tier."""
    touched: dict[Tier, set[int]] = {tier: set() for tier in work.machine.n_frames}
    for tensor, frame in initial.items():
        touched[work.tiers[tensor]].update(range(frame, frame + work.frames(tensor)))
    for task in tasks:
        if task.frame != NO_FRAME:
            n_frames = work.frames(task.tensor) if task.tensor >= 0 else ceil_div(task.n_bytes, work.page_bytes)
            touched[task.tier].update(range(task.frame, task.frame + n_frames))
    return {tier: len(frames) for tier, frames in touched.items()}
