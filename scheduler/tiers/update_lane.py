"""The lane of updates: a thread that makes them in the order in which the training thread begins them, beside compute.

An update is given to it when its op begins, whether or not its tensors have come. Until it is over they count as
changing (`PagedTensor.updates`): nobody else reads or changes them, copies up of them wait, and a plan's stores of them
are made behind it. So whoever uses a unit waits for that unit's update alone.

    WAITING --(its tensors are there, those before it are made)--> RUNNING --> over
    WAITING --(they will not come by themselves)--> made by the training thread, which waits for it

What is there does not leave for a load of a later op, and what is still to come is in the lane of loads, ahead of
those. Whoever takes loads out of that lane, or tensors out of memory for what a plan did not foresee, has all updates
made before (`UpdateLane.finish`). Where one cannot go on by itself then, the training thread brings its tensors and
makes it.

The first error of an update is raised on the training thread, as that of a copy.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from threadpoolctl import threadpool_limits

from pagemem.errors import OffloadError
from pagemem.files.threads import start_thread
from pagemem.residency.host_mover import HostMover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.units import MiB
from scheduler.planning.trace import CHANGES, Access
from scheduler.tiers.load_lane import LoadLane
from scheduler.tiers.update_job import UpdateJob, nothing

#: How long the end of the program waits for the thread of an engine that nobody closed.
_EXIT_PATIENCE_S: Final = 10.0


class UpdateLane:
    """Makes updates of tensors in host memory. The training thread's, but where a method says otherwise.

    Args:
        mover: owner of residency in host memory. loads: its lane of planned loads.
        next_number: of a task. pin, unpin: have the tensors of an op in memory, fetched on demand.
        n_threads: compute threads of an update.

    Attributes:
        made_here: updates that the training thread had to make itself.

    Raises:
        StorageError: the system starts no more threads.
    """

    def __init__(
        self,
        mover: HostMover,
        loads: LoadLane,
        next_number: Callable[[], int],
        pin: Callable[[str, Sequence[Access]], list[PagedTensor]],
        unpin: Callable[[Sequence[PagedTensor]], None],
        n_threads: int,
    ) -> None:
        self.made_here = 0
        self._mover, self._loads = mover, loads
        self._next_number, self._pin, self._unpin = next_number, pin, unpin
        self._n_threads = n_threads
        self._jobs: deque[UpdateJob] = deque()  # guarded by the mover's lock, as are the next two
        self._over: list[UpdateJob] = []
        self._closing = self._taking_over = False
        self._gate = threading.Event()
        self._hold: Callable[[str], None] | None = None  # where tests hold the thread
        mover.monitor.on_change(self._look)
        # A daemon, as I/O threads are: a program that dies without closing its engine must not hang on it.
        self._thread = threading.Thread(target=self._run, name="scheduler-updates", daemon=True)
        start_thread(self._thread)
        self._at_exit = partial(_close_at_exit, weakref.ref(self), os.getpid())
        atexit.register(self._at_exit)

    # ---- giving ------------------------------------------------------------------------------------------------

    def submit(
        self, name: str, accesses: Sequence[Access], work: Callable[[], None], begun: Callable[[], None],
        ended: Callable[[float], None],
    ) -> bool:  # fmt: skip
        """Give an update to the lane, whose op has begun what its plan triggers.

        Args:
            work: makes it, on any thread. begun: called once it is certain to be made. ended: called on the training
                thread with the seconds that it took.

        Returns:
            False where some tensor is neither there nor about to come: it is the caller's to bring them, and to make
            it.
        """
        self.collect()
        with self._mover.changed:
            uses = [(self._mover.tensors[access.tensor], access.mode) for access in accesses]
            job = UpdateJob(self._next_number(), name, accesses, uses, self._loads, work)
            if self._closing or job.would_lack:
                return False
            job.ended.append(lambda: ended(job.spent_s))
            begun()
            for tensor, _ in job.uses:
                tensor.updates += 1
            self._jobs.append(job)
            self._look()
        return True

    def when_done(self, call: Callable[[], None]) -> None:
        """Call ``call`` on the training thread once the updates given so far are over; at once, if they are."""
        with self._mover.changed:
            waits = bool(self._jobs)
            if waits:
                self._jobs[-1].ended.append(call)
        if not waits:
            self.collect()
            call()

    # ---- waiting -----------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether an update is not over that is not being made on the training thread."""
        return bool(self._jobs) and not self._taking_over

    @property
    def taking_over(self) -> bool:
        """Whether the training thread brings what an update needs, and makes it."""
        return self._taking_over

    def needs(self, tensor: PagedTensor, *, before: int = sys.maxsize) -> bool:
        """Whether a tensor is to stay for an update that is under way, or was begun earlier than the task numbered
        ``before``. Any thread, with the mover's lock held."""
        return any((job.running or job.number < before) and job.has(tensor) for job in self._jobs)

    def finish(self, tensor: PagedTensor | None = None) -> None:
        """Wait until the updates of a tensor are made; None: all updates. Those that cannot go on by themselves are
        made here. Without a device's lock.

        Raises:
            BudgetError, StorageError: one cannot get its tensors; it is still to be made, and nothing was lost.
            BaseException: what an update or a copy failed with.
        """
        if self._taking_over:
            return
        while (job := self._next_to_take_over(tensor)) is not None:
            self._take_over(job)
        self.collect()

    def finish_one(self) -> bool:
        """Wait until the oldest update is made that was not told of; returns whether there was one. Raises as
        `finish`."""
        if self.collect():
            return True
        with self._mover.changed:
            oldest = self._jobs[0] if self._jobs else None
        if oldest is None:
            return self.collect()
        self.finish(oldest.uses[0][0])
        return True

    def collect(self) -> bool:
        """Tell of the updates that are over; returns whether there were any. What telling one of them raises leaves the
        others to the next call."""
        found = False
        while True:
            with self._mover.changed:
                while self._over and not self._over[0].ended:
                    del self._over[0]
                    found = True
                if not self._over:
                    return found
                call = self._over[0].ended.pop(0)
            call()

    def _next_to_take_over(self, tensor: PagedTensor | None) -> UpdateJob | None:
        """Wait for the worker; returns the update that it waits for in vain, if there is one."""

        def over() -> bool:
            return not (self._jobs if tensor is None else tensor.updates)

        with self._mover.changed:
            if over():
                return None
            self._loads.pump()  # which begins nothing between a failed copy and its being told of
            why = self._jobs[0].name if tensor is None else tensor.name
            self._mover.monitor.wait_until(lambda: over() or self._is_stuck(), why)
            if over():
                return None
            job = self._jobs[0]
            job.taken = self._taking_over = True
            return job

    def _take_over(self, job: UpdateJob) -> None:
        """Bring the tensors of an update and make it, on the training thread."""
        try:
            with self._mover.changed:
                self._loads.pump()  # loads that wait for an update are held up from now on
                held = self._pin(job.name, job.accesses)
            self.made_here += 1
            try:
                self._make(job)
            finally:
                self._unpin(held)
                self._end(job)
        finally:
            job.taken = self._taking_over = False

    def close(self, patience_s: float | None = None) -> None:
        """End the thread after the update that it is making; those after it are given up. Idempotent.

        Args:
            patience_s: how long to wait for that; None: as long as it takes.
        """
        atexit.unregister(self._at_exit)
        with self._mover.changed:
            self._closing = True
            for job in [job for job in self._jobs if not job.begun]:
                for tensor, _ in job.uses:
                    tensor.to_store = False
                self._leave(job)
        self._gate.set()
        self._thread.join(patience_s)
        self.collect()

    # ---- with the mover's lock held ----------------------------------------------------------------------------

    def _is_stuck(self) -> bool:
        """Whether the oldest update waits for what does not come by itself."""
        if not self._jobs or self._jobs[0].begun:
            return False
        job = self._jobs[0]
        return job.lacks or (self._loads.stuck and not job.is_ready)

    def _look(self) -> None:
        if self._jobs and not self._jobs[0].begun and (self._jobs[0].is_ready or self._jobs[0].to_store()):
            self._gate.set()

    def _begin_next(self) -> UpdateJob | None:
        """The oldest update, if it can begin."""
        if not self._jobs or self._jobs[0].begun:
            return None
        job = self._jobs[0]
        for tensor in job.to_store():
            self._mover.start_store(tensor)
        if not job.is_ready:
            return None
        job.running = True
        for tensor, mode in job.uses:
            tensor.pins += 1
            if mode in CHANGES:
                self._mover.touch(tensor)
        return job

    def _leave(self, job: UpdateJob) -> None:
        """An update is over, or given up."""
        self._jobs.remove(job)
        job.work = nothing
        for tensor, _ in job.uses:
            try:
                self._mover.end_update(tensor)
            except OffloadError as error:  # no room for what is to be stored: it is whole, and stored again later
                self._mover.monitor.note_failure(error)

    # ---- making ------------------------------------------------------------------------------------------------

    def _make(self, job: UpdateJob) -> None:
        """Make an update whose tensors are held. Worker, or training thread.

        Raises:
            BaseException: what it failed with; it is over.
        """
        if self._hold is not None:
            self._hold(job.name)
        started_s = time.perf_counter()
        try:
            with torch.no_grad():
                job.work()
        finally:
            job.spent_s = time.perf_counter() - started_s

    def _run(self) -> None:
        torch.ones(MiB).add_(1)  # torch sets a thread's number of OpenMP threads in its first parallel region
        with threadpool_limits(self._n_threads, user_api="openmp"):
            while True:
                with self._mover.changed:
                    if self._closing:
                        return
                    self._gate.clear()
                    try:
                        job = self._begin_next()
                    except OffloadError as error:  # no room to store what a commit has yet to get
                        self._mover.monitor.note_failure(error)
                        job = None
                if job is None:
                    self._gate.wait()
                    continue
                self._serve(job)
                # Not kept while waiting for the next one: its gradients may be the room that others wait for.
                del job

    def _serve(self, job: UpdateJob) -> None:
        try:
            self._make(job)
        except BaseException as error:  # whatever it is goes to the training thread
            self._mover.monitor.note_failure(error)
        with self._mover.changed:
            for tensor, _ in job.uses:
                tensor.pins -= 1
            self._end(job)

    def _end(self, job: UpdateJob) -> None:
        with self._mover.changed:
            self._leave(job)
            self._over.append(job)
            self._mover.monitor.notify()
            self._look()


def _close_at_exit(lane: weakref.ref[UpdateLane], process: int) -> None:
    """Where nobody has closed the engine: a thread that is in a kernel of torch when the interpreter ends aborts the
    process.

    Not in a child process, which does not have the thread.
    """
    left = lane()
    if left is not None and os.getpid() == process:
        left.close(_EXIT_PATIENCE_S)
