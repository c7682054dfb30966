"""Plans for random steps, performed frame by frame by somebody who knows nothing of the planner."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import host_work, moved_bytes

from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.units import BLOCK_BYTES, KiB
from scheduler.lookahead.planner import make_plan
from scheduler.planning.bounds import Replay, check_bounds
from scheduler.planning.machine import TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.task import Task
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace

PAGE_BYTES = 64 * KiB
#: One page takes a millisecond to read.
BYTES_PER_S = PAGE_BYTES / 1e-3


@dataclass(frozen=True)
class Work:
    """A step and the sizes of its tensors."""

    trace: Trace
    n_bytes: dict[TensorId, int]

    def frames(self, tensor: TensorId) -> int:
        return -(-self.n_bytes[tensor] // PAGE_BYTES)

    def frames_in_all(self) -> int:
        return sum(self.frames(tensor) for tensor in self.trace.tensors())

    def frames_needed(self) -> int:
        """The most frames that one op and the views alive in it need at once."""
        ops = self.trace.ops
        alive = [{a.tensor for op in ops[: i + 1] if op.until >= i for a in op.accesses} for i in range(len(ops))]
        return max(sum(self.frames(tensor) for tensor in tensors) for tensors in alive)

    def plan(self, n_frames: int, read_bytes_per_s: float = BYTES_PER_S) -> Plan:
        return make_plan(self.trace, self.n_bytes, TierSpec(n_frames, PAGE_BYTES, read_bytes_per_s, BYTES_PER_S))

    def replay(self, plan: Plan) -> Replay:
        return Replay(host_work(plan, self.trace, self.n_bytes), plan)


@st.composite
def steps(draw: st.DrawFn, *, views: bool = False, largest_frames: int = 4) -> Work:
    """Up to ten ops over up to six tensors; lasting ones keep their content, the others are made and consumed in a
    step.

    With ``views``, ops on lasting tensors may leave views that live for some more ops.
    """
    tensors = [TensorId(i) for i in range(draw(st.integers(1, 6)))]
    lasting = {tensor for tensor in tensors if draw(st.booleans())}
    used = [
        draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3, unique=True))
        for _ in range(draw(st.integers(1, 10)))
    ]
    ops: list[Op] = []
    for index, own in enumerate(used):
        accesses: list[Access] = []
        for tensor in own:
            mode = draw(st.sampled_from([AccessMode.READ, AccessMode.MODIFY]))
            if tensor not in lasting:
                earlier, later = (any(tensor in other for other in part) for part in (used[:index], used[index + 1 :]))
                mode = mode if earlier and later else AccessMode.CONSUME if earlier else AccessMode.CREATE
            accesses.append(Access(tensor, mode))
        until = (
            draw(st.integers(index, len(used) - 1)) if views and set(own) <= lasting and draw(st.booleans()) else index
        )
        duration_s = draw(st.sampled_from([0.0, 0.001, 0.004]))
        ops.append(Op((OpKind.FORWARD, index), f"op {index}", tuple(accesses), duration_s, until))
    n_bytes = {
        t: draw(st.integers(1, largest_frames)) * PAGE_BYTES - draw(st.integers(0, 3)) * BLOCK_BYTES for t in tensors
    }
    return Work(Trace(tuple(ops)), n_bytes)


def check(work: Work, plan: Plan) -> Replay:
    """Perform a plan for a few cycles; its placement is restored between them where it does not close."""
    replay = work.replay(plan)
    began = dict(replay.where)
    for _ in range(3):
        moved = moved_bytes(replay)
        replay.cycle()
        assert not plan.closed or replay.where == began, "a closed plan ends where it began"
    # Less where an op's tensors were placed anew and one of them came to where it was.
    read, written = (now - then for now, then in zip(moved_bytes(replay), moved, strict=True))
    assert read <= plan.read_bytes and written <= plan.written_bytes
    assert plan.peak_frames == len(replay.touched) <= plan.n_frames
    check_bounds(plan, work.trace, work.n_bytes, TierSpec(plan.n_frames, PAGE_BYTES, BYTES_PER_S, BYTES_PER_S))
    return replay


@settings(max_examples=300)
@given(steps(), st.integers(0, 8))
def test_what_fits_is_planned_and_every_op_finds_its_tensors(work: Work, spare_frames: int) -> None:
    check(work, work.plan(work.frames_needed() + spare_frames))


class _SlowReplay(Replay):
    """Compares what is known to be over when a task begins with each run's own op, one by one."""

    def _start(self, task: Task, place: int | None) -> None:
        run, before, over = self._n_runs, dict(self._before), dict(self._over)
        follows = {self._run_of[other] for other in task.after if other in self._run_of}
        super()._start(task, place)
        known = follows.union(*(before.get(other, frozenset()) for other in follows))
        left = {other for other in known if over.get(other, self.now + 1) > self.now}
        assert left <= self._before[run] and (self._restoring or left == self._before[run])


@settings(max_examples=100)
@given(steps(views=True), st.integers(0, 8))
def test_a_run_is_over_from_the_op_on_that_the_checker_says(work: Work, spare_frames: int) -> None:
    plan = work.plan(work.frames_needed() + spare_frames)
    replay = _SlowReplay(host_work(plan, work.trace, work.n_bytes), plan)
    for _ in range(3):
        replay.cycle()


@settings(max_examples=300)
@given(steps(), st.integers(0, 8))
def test_plans_for_a_fast_disk_hold_too(work: Work, spare_frames: int) -> None:
    check(work, work.plan(work.frames_needed() + spare_frames, read_bytes_per_s=1e12))


@settings(max_examples=300)
@given(steps(views=True), st.integers(0, 8))
def test_views_that_outlive_their_op_are_respected(work: Work, spare_frames: int) -> None:
    try:
        plan = work.plan(work.frames_needed() + spare_frames)
    except BudgetError:
        return  # What is held may lie so that no window is left.
    check(work, plan)


@settings(max_examples=300)
@given(steps(views=True), st.integers(0, 8))
def test_plans_that_look_for_windows_near_the_best_tenants_hold_too(work: Work, spare_frames: int) -> None:
    """As they do where there are many tenants."""
    try:
        with patch("pagemem.knobs.MANY_TENANTS", 0):
            plan = work.plan(work.frames_needed() + spare_frames)
    except BudgetError:
        return
    check(work, plan)


@given(steps(views=True, largest_frames=1))
def test_with_a_frame_for_every_page_nothing_is_read_or_written(work: Work) -> None:
    plan = work.plan(work.frames_in_all())
    assert plan.closed
    assert plan.stores == ()
    assert all(load.fresh for load in plan.loads)
    replay = check(work, plan)
    assert moved_bytes(replay) == (0, 0)


@given(steps(), st.data())
def test_what_does_not_fit_names_the_op_and_its_need(work: Work, data: st.DataObject) -> None:
    need = {op.name: sum(work.frames(access.tensor) for access in op.accesses) for op in work.trace.ops}
    n_frames = data.draw(st.integers(1, max(need.values())))
    too_large = [name for name, frames in need.items() if frames > n_frames]
    if not too_large:
        check(work, work.plan(n_frames))
        return
    with pytest.raises(BudgetError, match=rf"^{too_large[0]} needs {need[too_large[0]] * PAGE_BYTES} bytes") as caught:
        work.plan(n_frames)
    assert caught.value.smallest_bytes == need[too_large[0]] * PAGE_BYTES


@settings(max_examples=300)
@given(steps(views=True), st.integers(0, 8))
def test_the_same_step_gives_the_same_plan(work: Work, spare_frames: int) -> None:
    n_frames = work.frames_in_all() + spare_frames
    assert work.plan(n_frames) == work.plan(n_frames)
