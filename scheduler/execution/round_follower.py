"""Following the plan of the updates beside the steps: the slices of optimizer states come and go by its tasks.

The plan is made once, when the updater's part of host memory is known: which slices stay for good, and through which
frames the others pass. The updater names the slice that it updates, and those that it goes to next as far as it knows;
their loads are begun with the op that triggers them. A slice that is not the plan's next comes to the frames that the
plan has for it, before what was still to come.

All methods belong to the updater's thread but `beside`; the mover's lock is held for bookkeeping only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from pagemem.errors import StorageError
from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import IN_FLIGHT, PagedTensor, Residency
from pagemem.telemetry.events import EventKind
from pagemem.tier import Tier
from scheduler.lookahead.planner import plan_work
from scheduler.planning.bounds import check_work
from scheduler.planning.machine import Machine
from scheduler.planning.round_cursor import RoundCursor
from scheduler.planning.task import load_task
from scheduler.planning.trace import OpKind, Trace
from scheduler.planning.update_round import UpdateRound
from scheduler.planning.work import Work
from scheduler.tiers.load_lane import LoadLane


class RoundFollower:
    """Brings slices in and out.

    Args:
        mover: owner of all residency.
        updates: the round. machine: the rates that its plan is made with.

    Attributes:
        plan: of the round.

    Raises:
        BudgetError: a slice does not fit in the round's frames.
    """

    def __init__(self, mover: Mover, updates: UpdateRound, machine: Machine) -> None:
        work = replace(Work.of(Trace(()), {}, machine), updates=updates)
        plan = plan_work(work)
        check_work(plan, work)
        assert plan.updates is not None
        self.plan = plan.updates
        self._updates = updates
        self._mover = mover
        self._cursor = RoundCursor(self.plan, updates)
        self._lane = LoadLane(mover, background=True)
        ops = updates.trace.ops
        self._tensors = [tuple(mover.tensors[access.tensor] for access in op.accesses) for op in ops]
        self._took_s = [op.duration_s for op in ops]

    @property
    def n_frames(self) -> int:
        """Frames that it uses."""
        return self.plan.peaks.get(Tier.HOST, 0)

    def beside(self, trace: Trace) -> UpdateRound:
        """The round beside a step, with the times of its updates so far. Any thread."""
        first_uses, last_uses = trace.first_uses(), _last_uses(trace)
        units = tuple(
            replace(
                unit, first_use=first_uses.get(unit.parameters, 0),
                handed_over=last_uses.get(unit.parameters, max(0, len(trace.ops) - 1)),
            )
            for unit in self._updates.units
        )  # fmt: skip
        ops = (replace(op, duration_s=s) for op, s in zip(self._updates.trace.ops, self._took_s, strict=True))
        return replace(self._updates, trace=Trace(tuple(ops)), units=units)

    def took(self, op: int, seconds: float) -> None:
        """The update of a slice has taken so long."""
        self._took_s[op] = seconds

    def forget(self) -> None:
        """The updater ends: loads that have not begun are not wanted."""
        self._lane.clear()

    @contextmanager
    def held(self, op: int, following: Sequence[int] = ()) -> Iterator[None]:
        """Have a slice in host memory, to be changed, inside the block; what passes through is stored afterwards.

        Args:
            op: of the round. following: those that come next, as far as known.

        Raises:
            StorageError: it cannot be read, or what has to leave cannot be stored; every slice is whole where it was.
        """
        tensors = self._tensors[op]
        if not tensors:
            yield
            return
        with self._mover.changed:
            frames = self._cursor.go_to(op)
            if not self._cursor.in_order:
                self._lane.cancel(lambda task: task.tensor not in frames)
            self._await(tensors, frames)
            for tensor in tensors:
                tensor.pins += 1
            try:
                for tensor in tensors:
                    self._mover.make_writable(tensor)
                    self._mover.touch(tensor)
                self._begin_upcoming(following)
            except BaseException:
                self._let_go(tensors)
                raise
        try:
            yield
        finally:
            with self._mover.changed:
                self._let_go(tensors)

    def _await(self, tensors: Sequence[PagedTensor], frames: Mapping[TensorId, FrameId]) -> None:
        """Wait until a slice is where it is to be. With the lock held."""
        monitor, lane, started = self._mover.monitor, self._lane, False

        def there() -> bool:
            # The training thread may take one away again before all are there: a master whose parameter was edited.
            # What has failed is not tried for ever.
            nonlocal started
            if started and monitor.failed:
                return not any(tensor.state in IN_FLIGHT for tensor in tensors)
            lane.pump()  # It has rested if a copy had failed, of which another thread may have been told since.
            for tensor in tensors:
                self._ask(tensor, frames[tensor.id])
            started = not any(tensor.id in lane for tensor in tensors)
            return started and all(self._is_here(tensor) and tensor.state not in IN_FLIGHT for tensor in tensors)

        n_bytes = sum(tensor.n_bytes for tensor in tensors)
        monitor.wait_until(there, tensors[0].name, n_bytes, EventKind.UPDATE_WAIT)
        if not all(tensor.readable for tensor in tensors):
            raise StorageError(f"{tensors[0].name} could not be read")

    def _ask(self, tensor: PagedTensor, frame: FrameId) -> None:
        """Have a tensor come to its frames before all others, unless it is there or on its way."""
        if not self._is_here(tensor) and tensor.state not in IN_FLIGHT and tensor.id not in self._lane:
            load = load_task(tensor.id, tensor.n_bytes, frame, 0, 0)
            self._lane.submit([load], first=True)

    def _is_here(self, tensor: PagedTensor) -> bool:
        """Whether a tensor is in the round's frames: in those of the plan, or of an earlier place in it."""
        return tensor.frame is not None and tensor.frame >= self._updates.first_frame

    def _begin_upcoming(self, following: Sequence[int]) -> None:
        tensors, lane = self._mover.tensors, self._lane
        tasks = self._cursor.upcoming(following)
        wanted = [t for t in tasks if not self._is_here(tensors[t.tensor]) and t.tensor not in lane]
        if wanted:
            lane.submit(wanted)

    def _let_go(self, tensors: Sequence[PagedTensor]) -> None:
        """Unpin a slice, and begin to store what passes through."""
        for tensor in tensors:
            tensor.pins -= 1
            if self._cursor.streams(tensor.id) and tensor.state is Residency.DIRTY:
                self._mover.start_store(tensor, background=True)
        self._lane.pump()


def _last_uses(trace: Trace) -> dict[TensorId, int]:
    """Of tensors the last ops of compute that use them."""
    return {
        access.tensor: place
        for place, op in enumerate(trace.ops)
        if op.kind is not OpKind.UPDATE
        for access in op.accesses
    }
