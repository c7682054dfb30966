"""The updater of lock-free mode: a thread that goes round the units, applies gradients and publishes new parameters.

    IDLE --start--> RUNNING --stop--> STOPPED
                    RUNNING --error--> FAILED

It takes the batch of the unit that is furthest behind (one that the training thread waits for first), streams the
unit's slices of optimizer states through its own windows of host memory, and publishes the new parameters when all of
them are there. While a slice is updated the next one is read and the one before is written. The arithmetic is in
`optim.lockfree.batch_update`.

The first error ends the thread; it is kept in `failure` and raised on the training thread. The unit that was being
updated then has some of its slices updated and others not, and none of its new parameters published: training goes on
only from a commit.
"""

from __future__ import annotations

import atexit
import enum
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, zip_longest
from typing import Final

import torch
from threadpoolctl import threadpool_limits

from optim import knobs
from optim.lockfree.batch_update import BatchUpdate, piece_numel
from optim.lockfree.state_windows import StateWindows
from optim.lockfree.unit_channel import GradientBatch, UnitChannel
from optim.rules import UpdateRule
from optim.unit import Unit
from pagemem.files.threads import start_thread
from pagemem.residency.mover import Mover
from pagemem.residency.wait_lock import WaitLock
from pagemem.state_machine import StateMachine
from pagemem.telemetry.events import Event, EventKind, EventSink
from pagemem.units import MiB


class UpdaterState(enum.Enum):
    """See the diagram at the top of this module."""

    IDLE = "idle"
    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"


_MOVES: Final = StateMachine(
    "updater",
    {
        UpdaterState.IDLE: {UpdaterState.RUNNING, UpdaterState.STOPPED},
        UpdaterState.RUNNING: {UpdaterState.STOPPED, UpdaterState.FAILED},
    },
)


class _Stop(Exception):
    """Raised inside the thread to end it between two slices."""


class UpdateThread:
    """Applies batches of gradients. `start`, `stop`, `wake`, `want` and `await_progress` belong to the training thread.

    Args:
        mover: owner of all residency.
        channels: one for each unit, in the order in which the model uses them.
        windows: host memory for slices; slice ``k`` of unit ``u`` has the number ``first_slice[u] + k``.
        n_threads: compute threads of an update.
    """

    def __init__(
        self,
        mover: Mover,
        rule: UpdateRule,
        channels: Sequence[UnitChannel],
        windows: StateWindows,
        sink: EventSink,
        *,
        n_threads: int = 1,
    ) -> None:
        self.state = UpdaterState.IDLE
        self.failure: BaseException | None = None
        self._mover = mover
        self._rule = rule
        self._channels = list(channels)
        self.windows = windows
        self._sink = sink
        self._n_threads = n_threads
        self._piece_numel = piece_numel((part.numel for channel in channels for part in channel.unit.slices), n_threads)
        self._gate: Callable[[str, Unit], None] | None = None  # where tests hold the thread
        first_slices = accumulate((len(channel.unit.slices) for channel in channels), initial=0)
        self._first_slice = {channel.unit: first for channel, first in zip(channels, first_slices, strict=False)}
        self._wanted: UnitChannel | None = None
        self._work = threading.Event()
        self._progress = WaitLock("updates")
        self._stopping = False
        self._pausing = False
        self._resting = False
        self._thread = threading.Thread(target=self._run, name="optim-updater", daemon=True)
        self._at_exit = partial(_stop_at_exit, weakref.ref(self), os.getpid())

    @property
    def lock(self) -> WaitLock:
        """What the training thread waits on for publications."""
        return self._progress

    # ---- the training thread's side ----------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work.

        Raises:
            StorageError: the system starts no more threads.
        """
        start_thread(self._thread)
        self.state = _MOVES.move(self.state, UpdaterState.RUNNING)
        atexit.register(self._at_exit)

    def stop(self, patience_s: float | None = None) -> None:
        """End the thread, after the slice that it is working on; gradients not yet applied are given up. Idempotent.

        Args:
            patience_s: how long to wait for that; None: as long as it takes.
        """
        atexit.unregister(self._at_exit)
        self._stopping = True
        self._work.set()
        with self._progress:
            self._progress.notify_all()  # it may rest, if what asked it to was left by what a signal's handler raised
        if self._thread.ident is not None:
            self._thread.join(patience_s)
        if self.state in (UpdaterState.IDLE, UpdaterState.RUNNING):
            self.state = _MOVES.move(self.state, UpdaterState.STOPPED)

    def wake(self) -> None:
        """Gradients were put into a channel."""
        self._work.set()

    def want(self, channel: UnitChannel | None) -> None:
        """Have a unit served next, or none in particular."""
        self._wanted = channel

    def await_progress(self, ready: Callable[[], bool]) -> None:
        """Block until ``ready()``, which is asked after each publication.

        Raises:
            BaseException: what ended the updater, instead of waiting for ever.
        """
        with self._progress:
            while not ready():
                self.check()
                self._progress.wait()

    def check(self) -> None:
        """Raise what ended the updater, every time."""
        if self.failure is not None:
            raise self.failure
        if self.state is UpdaterState.STOPPED:
            raise RuntimeError("the updater is stopped: this engine is closed")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Have the updater rest between two units inside the block; waits for the unit that it is working on.

        Raises:
            BaseException: what ended the updater.
        """
        with self._progress:
            self._pausing = True
        self._work.set()
        try:
            self.await_progress(lambda: self._resting)
            yield
        finally:
            with self._progress:
                self._pausing = False
                self._progress.notify_all()

    # ---- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._scratch = torch.empty(2, self._piece_numel)
            torch.ones(MiB).add_(1)  # torch sets a thread's number of OpenMP threads in its first parallel region
            with threadpool_limits(self._n_threads, user_api="openmp"):
                while True:
                    self._serve_next()
        except _Stop:
            pass
        except BaseException as error:  # whatever it is goes to the training thread
            self.failure = error
            self.state = _MOVES.move(self.state, UpdaterState.FAILED)
        finally:
            del self._scratch
            with self._progress:
                self._progress.notify_all()

    def _rest(self) -> None:
        with self._progress:
            while self._pausing and not self._stopping:
                self._resting = True
                self._progress.notify_all()
                self._progress.wait()
            self._resting = False

    def _serve_next(self) -> None:
        self._work.clear()
        self._rest()
        channel = self._choose()
        if channel is None:
            self._check_stop()
            self._work.wait()
            return
        self._at("chosen", channel.unit)
        batch = channel.take()
        if batch is None:
            # The training thread has it for a moment, to add a step; it wakes us when it puts it back.
            return
        self._at("taken", channel.unit)
        self._apply(channel, batch)
        self._at("applied", channel.unit)
        channel.publish(batch)
        with self._progress:
            self._progress.notify_all()
        self._at("published", channel.unit)

    def _at(self, point: str, unit: Unit) -> None:
        if self._gate is not None:
            self._gate(point, unit)

    def _choose(self) -> UnitChannel | None:
        wanted = self._wanted
        if wanted is not None and wanted.has_work:
            return wanted
        busy = [channel for channel in self._channels if channel.has_work]
        return min(busy, key=lambda box: box.clock.applied - box.clock.produced, default=None)

    def _check_stop(self) -> None:
        if self._stopping:
            raise _Stop

    def _apply(self, channel: UnitChannel, batch: GradientBatch) -> None:
        """Turn the gradients of a batch into new parameter values."""
        unit = channel.unit
        first = self._first_slice[unit]
        update = BatchUpdate(self._mover, self._rule, self._scratch, channel, batch)
        following = [first + place for place, _, _ in update.parts[1:]]
        for (place, part, pieces), next_slice in zip_longest(update.parts, following):
            self._check_stop()
            upcoming = self._next_unit_slice(channel) if next_slice is None else next_slice
            with self.windows.held(first + place, upcoming):
                self._at("slice", unit)
                started_s = time.perf_counter()
                update.apply(part, pieces)
                spent_s = time.perf_counter() - started_s
            self._sink.emit(Event(EventKind.UPDATE, unit.name, part.numel * unit.dtype.itemsize, started_s, spent_s))
        update.finish()

    def _next_unit_slice(self, served: UnitChannel) -> int | None:
        """The first slice of the unit that is served after this one, as far as can be known."""
        following = self._choose()
        return None if following is None or following is served else self._first_slice[following.unit]


def _stop_at_exit(thread: weakref.ref[UpdateThread], process: int) -> None:
    """Where nobody has closed the engine: a thread that is in a kernel of torch when the interpreter ends aborts the
    process.

    Not in a child process, which does not have the thread.
    """
    left = thread()
    if left is not None and os.getpid() == process:
        left.stop(knobs.EXIT_PATIENCE_S)
