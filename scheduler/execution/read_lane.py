"""The ssd_read lane: planned loads in order, each started as soon as its window is free.

A load whose window still has tenants waits for them: a clean one is dropped, a dirty one stored and then dropped, one
in flight waited for. One that is *held* (pinned, or seen through a living view) cannot be waited for by the thread that
holds it; the lane then reports itself `stuck`, and the driver takes what it waits for out of it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from pagemem.frames.page import TensorId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from scheduler.planning.task import Task


class ReadLane:
    """A queue of loads, pumped with the mover's lock held after every change of state, on whichever thread made it."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._tasks: deque[Task] = deque()
        self._waiting: Counter[TensorId] = Counter()
        self._pumping = False
        self._look_again = False
        self._paused = False
        self.stuck = False
        mover.monitor.on_change(self.pump)

    def __contains__(self, tensor: TensorId) -> bool:
        return self._waiting[tensor] > 0

    @property
    def first(self) -> Task | None:
        """The load that the others wait behind, if one waits."""
        return self._tasks[0] if self._tasks else None

    def submit(self, tasks: Iterable[Task], *, first: bool = False) -> None:
        """Queue loads, behind those that wait or before them."""
        with self._mover.changed:
            queued = list(tasks)
            if first:
                self._tasks.extendleft(reversed(queued))
            else:
                self._tasks.extend(queued)
            self._waiting.update(task.tensor for task in queued)
            self.pump()

    def clear(self) -> None:
        """Forget the loads that have not started. Those under way complete."""
        self.cancel(lambda _: True)

    def cancel(self, unwanted: Callable[[Task], bool]) -> None:
        """Forget those loads that have not started and are ``unwanted``."""
        with self._mover.changed:
            self._tasks = deque(task for task in self._tasks if not unwanted(task))
            self._waiting = Counter(task.tensor for task in self._tasks)
            self.stuck = False

    def free(self, tensor: PagedTensor) -> None:
        """Have a lane that is stuck go on, or, if that is not enough, forget the next load of a tensor: whoever calls
        brings it."""
        while self.stuck and tensor.id in self and not tensor.moving:
            task = self._tasks.popleft()
            self._waiting[task.tensor] -= 1
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
                self._look_again = self.stuck = False
                # After a failed copy nothing is begun until the training thread knows: the same could fail for ever.
                while self._tasks and not self._mover.monitor.failed and self._start(self._tasks[0]):
                    self._waiting[self._tasks.popleft().tensor] -= 1
        finally:
            self._pumping = False

    def _start(self, task: Task) -> bool:
        tensor = self._mover.tensors[task.tensor]
        if self._mover.expires(tensor):
            return False  # what is there of it has to go first, also from the very frames that it is to have
        if tensor.frame == task.frame:
            return True
        if tensor.frame is not None and not self._leaves(tensor):
            return False
        # Every tenant is asked to leave before giving up, so that several copies out run at once.
        leaving = [self._leaves(tenant) for tenant in self.tenants(task.frame, tensor.n_frames)]
        if not all(leaving):
            return False
        # A tensor that the plan took for dead by now and that is not, because the step goes another way, keeps its
        # content.
        self._mover.start_load(tensor, task.frame, fresh=task.fresh and tensor.state is Residency.ABSENT)
        return True

    def tenants(self, first: int, n_frames: int) -> list[PagedTensor]:
        """Who holds the frames from ``first`` on. With the mover's lock held."""
        return [self._mover.tensors[owner] for _, _, owner in self._mover.host.taken(first, first + n_frames)]

    def _leaves(self, tenant: PagedTensor) -> bool:
        """Make a tenant give up its frames if it can; False while it cannot."""
        if tenant.held:
            self.stuck = True
            return False
        if tenant.uploads:
            return False
        if tenant.state is Residency.DIRTY:
            self._mover.start_store(tenant)
            return False
        if tenant.state is not Residency.CLEAN:
            # A copy up that waits for host memory would wait for ever if this window is for what is used before.
            return self._mover.take_back_load(tenant)
        self._mover.drop(tenant)
        return True
