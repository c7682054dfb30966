"""Plans written by hand, and what a plan moves when it is performed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier
from pagemem.units import KiB
from scheduler.lookahead.dependencies import with_dependencies
from scheduler.planning.bounds import Replay
from scheduler.planning.machine import TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.task import Lane, Task
from scheduler.planning.trace import Trace
from scheduler.planning.work import Work

PAGE_BYTES = 64 * KiB


def host_work(
    plan: Plan, trace: Trace, n_bytes: Mapping[TensorId, int], resident: Mapping[TensorId, FrameId] | None = None
) -> Work:
    """What a plan over host memory was made of; bandwidths aside."""
    return Work.of(trace, n_bytes, TierSpec(plan.n_frames, PAGE_BYTES, 1e9, 1e9), resident)


def host_plan(
    trace: Trace,
    n_frames: int,
    initial: Mapping[TensorId, int],
    tasks: Sequence[Task] = (),
    *,
    n_steps: int = 1,
    closed: bool = True,
    peak_frames: int | None = None,
) -> Plan:
    """A plan over host memory for tensors of one page; those of its tasks that are needed in the next cycle come last.

    What its tasks follow is found here.
    """
    n_ops = len(trace.ops) * n_steps
    frames = {tensor: FrameId(frame) for tensor, frame in initial.items()}
    known = dict.fromkeys([*trace.tensors(), *frames, *(task.tensor for task in tasks)], PAGE_BYTES)
    machine = TierSpec(n_frames, PAGE_BYTES, 1e9, 1e9)
    tiers = dict.fromkeys(known, Tier.HOST)
    work = replace(Work.of(trace, known, machine), tiers=tiers)
    n_wrapped = sum(task.needed_at >= n_ops for task in tasks)
    made = tuple(tasks)
    if trace.ops and all(task.trigger < n_ops for task in tasks):
        made = with_dependencies(work, tasks, n_ops, n_wrapped, frames, closed=closed)
    return Plan(
        keys=trace.keys * n_steps,
        n_steps=n_steps,
        frames={Tier.HOST: n_frames},
        initial=frames,
        tasks=made,
        carried=tuple(replace(t, trigger=0, needed_at=t.needed_at - n_ops) for t in made if t.needed_at >= n_ops),
        closed=closed,
        peaks={Tier.HOST: n_frames if peak_frames is None else peak_frames},
        lane_bytes={},
        step_s=0.0,
        compute_s=0.0,
    )


def without(plan: Plan, leave_out: Callable[[Task], bool]) -> Plan:
    """A plan without some of its tasks, which nothing follows any more."""
    kept = [place for place, task in enumerate(plan.tasks) if not leave_out(task)]
    new = {place: index for index, place in enumerate(kept)}
    tasks = (
        replace(plan.tasks[place], after=tuple(new[other] for other in plan.tasks[place].after if other in new))
        for place in kept
    )
    return replace(plan, tasks=tuple(tasks))


def moved_bytes(replay: Replay) -> tuple[int, int]:
    """Bytes that a replay has read and written so far."""
    return replay.moved_bytes[Lane.SSD_READ], replay.moved_bytes[Lane.SSD_WRITE]


def bytes_a_step(
    plan: Plan, trace: Trace, n_bytes: Mapping[TensorId, int], resident: Mapping[TensorId, FrameId] | None = None
) -> tuple[float, float]:
    """Bytes read and written a step, in the second cycle: in it tensors are dirty when it begins."""
    replay = Replay(host_work(plan, trace, n_bytes, resident), plan)
    replay.cycle()
    before = moved_bytes(replay)
    replay.cycle()
    read, written = (now - then for now, then in zip(moved_bytes(replay), before, strict=True))
    return read / plan.n_steps, written / plan.n_steps
