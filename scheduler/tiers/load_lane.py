"""The lane of what comes into one tier: planned loads in order, each started as soon as its window is free. A gather
is one, too: its window is what it waits for here; it has its place among those of all ranks already.

A load whose window still has tenants waits for them: a clean one is dropped, a dirty one stored and then dropped, one
in flight waited for, and one that an earlier task of the tier above copies up first. One that is *held* (pinned, or
seen through a living view) cannot be waited for by the thread that holds it, nor one of updates by the thread that
makes them in the worker's place; the lane then reports itself `stuck`, and
the driver takes what it waits for out of it. Gathers that wait in it are refused then, as other ranks wait for them.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.gather_ticket import GatherTicket
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.units import ceil_div
from scheduler.planning.task import Task, TaskKind


class UpdatesBefore(Protocol):
    """What loads wait for: see `scheduler.tiers.update_lane.UpdateLane`."""

    @property
    def taking_over(self) -> bool:
        """Whether the training thread brings what one needs."""

    def needs(self, tensor: PagedTensor, *, before: int) -> bool:
        """Whether an update has yet to use a tensor."""


class LoadLane:
    """A queue of loads, pumped with the mover's lock held after every change of state, on whichever thread made it.

    Args:
        mover: owner of residency in the tier.
        numbers: of tasks, in the order in which they were begun over all lanes.
        background: its copies give way to others.

    Attributes:
        above: the lane of copies to the tier above, which read what is here; None: nothing is copied up.
        updates: those made beside compute, whose tensors do not leave for loads that were begun later; None: there are
            none.
    """

    def __init__(self, mover: Mover, numbers: Iterator[int] | None = None, *, background: bool = False) -> None:
        self.above: LoadLane | None = None
        self.updates: UpdatesBefore | None = None
        self._mover = mover
        self._background = background
        self._numbers = itertools.count() if numbers is None else numbers
        self._tasks: deque[tuple[int, Task]] = deque()
        # Of each tensor's queued tasks the numbers and frames, replaced as a whole: others look without the lock.
        self._queued: dict[TensorId, tuple[tuple[int, FrameId], ...]] = {}
        self._started: dict[TensorId, int] = {}
        self._tickets: dict[int, GatherTicket] = {}  # of gathers that wait, by the numbers of their tasks
        self._pumping = False
        self._look_again = False
        self._paused = False
        self._held_up = False
        self._behind_copy_up = False
        mover.gathered.is_queued = self._is_queued
        mover.monitor.on_change(self.pump)

    def __contains__(self, tensor: TensorId) -> bool:
        return tensor in self._queued

    def _is_queued(self, tensor: TensorId, before: int) -> bool:
        return any(number < before for number, _ in self._queued.get(tensor, ()))

    @property
    def stuck(self) -> bool:
        """Whether it waits for what is held."""
        return self._held_up or (self._behind_copy_up and self.above is not None and self.above.stuck)

    @property
    def first(self) -> Task | None:
        """The load that the others wait behind, if one waits."""
        return self._tasks[0][1] if self._tasks else None

    def submit(self, tasks: Iterable[Task], *, first: bool = False) -> None:
        """Queue loads, behind those that wait or before them."""
        self.enqueue([(next(self._numbers), task) for task in tasks], first=first)

    def enqueue(
        self,
        numbered: Sequence[tuple[int, Task]],
        tickets: Mapping[int, GatherTicket] | None = None,
        *,
        first: bool = False,
    ) -> None:
        """As `submit`, of tasks that have their numbers, and of which gathers have ``tickets``."""
        with self._mover.changed:
            for number, ticket in (tickets or {}).items():
                self._tickets[number], ticket.number = ticket, number
            if first:
                self._tasks.extendleft(reversed(numbered))
            else:
                self._tasks.extend(numbered)
            for number, task in numbered:
                self._queued[task.tensor] = (*self._queued.get(task.tensor, ()), (number, task.frame))
            self.pump()

    def clear(self) -> None:
        """Forget the loads that have not started. Those under way complete."""
        self.cancel(lambda _: True)

    def cancel(self, unwanted: Callable[[Task], bool]) -> None:
        """Forget those loads that have not started and are ``unwanted``."""
        with self._mover.changed:
            kept = [entry for entry in self._tasks if not unwanted(entry[1])]
            if len(kept) < len(self._tasks):
                queued: dict[TensorId, tuple[tuple[int, FrameId], ...]] = {}
                for number, task in kept:
                    queued[task.tensor] = (*queued.get(task.tensor, ()), (number, task.frame))
                self._tasks, self._queued = deque(kept), queued
                for number in self._tickets.keys() - {number for number, _ in kept}:
                    self._mover.gathered.refuse(self._tickets.pop(number))
                self._mover.gathered.look()  # a shard may have been among them
            self.pump()  # what is first now may start, or be held up

    def refuse_gathers(self) -> None:
        """Forget the gathers that have not started; so do all other ranks, and their ops make them."""
        if self._tickets:
            self.cancel(lambda task: task.kind is TaskKind.GATHER)

    def free(self, tensor: PagedTensor) -> None:
        """Have a lane that is stuck go on, or, if that is not enough, forget the next load of a tensor: whoever calls
        brings it."""
        while self.stuck and tensor.id in self and not tensor.moving:
            self._pop()
            self.pump()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Start no load inside the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before
            self.pump()

    def pump(self) -> None:
        """Start every load that can start now."""
        self._look_again = True
        if self._pumping or self._paused:
            return  # a copy that is over as soon as it begins
        self._pumping = True
        try:
            while self._look_again:
                self._look_again = self._held_up = self._behind_copy_up = False
                # After a failed copy nothing is begun until the training thread knows: the same could fail for ever.
                while self._tasks and not self._mover.monitor.failed and self._start(*self._tasks[0]):
                    self._pop()
                if self.stuck:
                    self.refuse_gathers()
        finally:
            self._pumping = False

    def _pop(self) -> None:
        number, task = self._tasks.popleft()
        ticket = self._tickets.pop(number, None)
        if ticket is not None:
            self._mover.gathered.refuse(ticket)  # unless it has started
        left = tuple(other for other in self._queued[task.tensor] if other[0] != number)
        if left:
            self._queued[task.tensor] = left
        else:
            del self._queued[task.tensor]

    def _start(self, number: int, task: Task) -> bool:
        if task.kind is TaskKind.DROP:
            return self._make_room(number, task, ceil_div(task.n_bytes, self._mover.arena.page_bytes))
        tensor, ticket = self._mover.tensors[task.tensor], self._tickets.get(number)
        if ticket is not None and not ticket.undecided:
            return True
        if self._mover.expires(tensor) and not (tensor.updates and not self._needs(tensor, number)):
            # What is there of it has to go first, also from the very frames that it is to have; unless it is brought
            # for the updates after which it expires.
            return False
        if ticket is not None and tensor.moving:
            return False
        if tensor.frame == task.frame and (ticket is None or self._mover.gathered.is_whole(tensor)):
            if ticket is not None:
                self._mover.gathered.claim(ticket)
            return True
        if tensor.frame is not None and not self._leaves(tensor, number):
            return False
        if not self._make_room(number, task, tensor.n_frames):
            return False
        self._started[tensor.id] = number
        self._mover.gathered.using = ticket
        # A tensor that the plan took for dead by now and that is not, because the step goes another way, keeps its
        # content.
        fresh = task.fresh and tensor.state is Residency.ABSENT
        self._mover.start_load(tensor, task.frame, fresh=fresh, background=self._background)
        return True

    def _make_room(self, number: int, task: Task, n_frames: int) -> bool:
        # Every tenant is asked to leave before giving up, so that several copies out run at once.
        leaving = [self._leaves(tenant, number) for tenant in self.tenants(task.frame, n_frames)]
        return all(leaving)

    def tenants(self, first: int, n_frames: int) -> list[PagedTensor]:
        """Who holds the frames from ``first`` on. With the mover's lock held."""
        return [self._mover.tensors[owner] for _, _, owner in self._mover.host.taken(first, first + n_frames)]

    def _leaves(self, tenant: PagedTensor, number: int) -> bool:
        """Make a tenant give up its frames if it can; False while it cannot."""
        if self._needs(tenant, number):
            return False
        if tenant.held:
            self._held_up = True
            return False
        if tenant.uploads or self._mover.gathered.awaits(tenant):
            return False
        if self.above is not None and self.above.copies(tenant, before=number):
            self._behind_copy_up = True
            return False
        if tenant.state is Residency.DIRTY:
            self._mover.start_store(tenant, background=self._background)
            return False
        if tenant.state is not Residency.CLEAN:
            # A copy up that waits for host memory would wait for ever if this window is for what is used before.
            return self._mover.take_back_load(tenant)
        self._mover.drop(tenant)
        return True

    def _needs(self, tensor: PagedTensor, number: int) -> bool:
        """Whether an update begun earlier than the task with this number, which is waited for, has yet to use a
        tensor."""
        needed = tensor.updates > 0 and self.updates is not None and self.updates.needs(tensor, before=number)
        if needed and self.updates is not None and self.updates.taking_over:
            self._held_up = True  # the training thread makes it, and is not to wait for what is behind this load
        return needed

    def moves(self, tensor: PagedTensor, *, before: int = sys.maxsize) -> bool:
        """Whether a tensor has yet to come, or to move to other frames, by a task begun earlier than the one numbered
        ``before``. Any thread, without the lock: a task whose tensor is in its frames may be in the queue still."""
        queued = self._queued.get(tensor.id, ())
        return any(number < before and frame != tensor.frame for number, frame in queued)

    def copies(self, below: PagedTensor, *, before: int = sys.maxsize) -> bool:
        """Whether a task begun earlier than the one numbered ``before`` has yet to copy a tensor of the tier below.

        Any thread, with the lock of the mover below held.
        """
        if not isinstance(self._mover, DeviceMover):
            return False
        copy = self._mover.copy_of(below)
        if copy is None:
            return False
        # In this order: a task is in the queue until its copy has been asked for.
        queued = self._queued.get(copy.id)
        if queued is not None and queued[0][0] < before:
            return True
        return self._mover.waits_below(copy) and self._started.get(copy.id, before) < before
