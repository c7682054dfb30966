"""The updater of lock-free mode: a thread that goes round the units, applies gradients and publishes new parameters.

    IDLE --start--> RUNNING --stop--> STOPPED
                    RUNNING --error--> FAILED

It takes the batch of the unit that is furthest behind (one that the training thread waits for first), has the unit's
slices of optimizer states come and go by the plan of its round (`scheduler.execution.round_follower`), and publishes
the new parameters when all of them are there. While a slice is updated the next ones are read and the one before is
written. The arithmetic is in `optim.lockfree.batch_update`.

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
from itertools import accumulate, chain, islice
from typing import Final

import torch
from threadpoolctl import threadpool_limits

from optim import knobs
from optim.lockfree.batch_update import BatchUpdate, piece_numel
from optim.lockfree.unit_channel import GradientBatch, UnitChannel
from optim.rules import UpdateRule
from optim.unit import Unit
from pagemem.files.threads import start_thread
from pagemem.process.wait_lock import WaitLock
from pagemem.residency.mover import Mover
from pagemem.state_machine import StateMachine
from pagemem.telemetry.events import Event, EventKind, EventSink
from pagemem.units import MiB
from scheduler.execution.round_follower import RoundFollower
from scheduler.planning.round_cursor import AHEAD
from scheduler.planning.update_round import furthest_behind


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
        channels: one for each unit, in the order of its round.
        follower: brings slices of states; they are the ops of the round, in order.
        n_threads: compute threads of an update.
    """

    def __init__(
        self,
        mover: Mover,
        rule: UpdateRule,
        channels: Sequence[UnitChannel],
        follower: RoundFollower,
        sink: EventSink,
        *,
        n_threads: int = 1,
    ) -> None:
        self.state = UpdaterState.IDLE
        self.failure: BaseException | None = None
        self._mover = mover
        self._rule = rule
        self._channels = list(channels)
        self.follower = follower
        self._sink = sink
        self._n_threads = n_threads
        self._piece_numel = piece_numel((part.numel for channel in channels for part in channel.unit.slices), n_threads)
        self._gate: Callable[[str, Unit], None] | None = None  # where tests hold the thread
        first_ops = accumulate((len(channel.unit.slices) for channel in channels), initial=0)
        self._first_op = {channel.unit: first for channel, first in zip(channels, first_ops, strict=False)}
        self._served = len(channels) - 1  # the unit that is served, or was last
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
            self.follower.forget()

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
        place = self._choose()
        if place is None:
            self._check_stop()
            self._work.wait()
            return
        channel = self._channels[place]
        self._at("chosen", channel.unit)
        batch = channel.take()
        if batch is None:
            # The training thread has it for a moment, to add a step; it wakes us when it puts it back.
            return
        self._at("taken", channel.unit)
        self._served = place
        self._apply(channel, batch)
        self._at("applied", channel.unit)
        channel.publish(batch)
        with self._progress:
            self._progress.notify_all()
        self._at("published", channel.unit)

    def _at(self, point: str, unit: Unit) -> None:
        if self._gate is not None:
            self._gate(point, unit)

    def _choose(self, but: UnitChannel | None = None) -> int | None:
        """Place of the channel to be served next; not that of ``but``."""
        wanted = self._wanted
        if wanted is not None and wanted is not but and wanted.has_work:
            return self._channels.index(wanted)
        behind = (
            (place, channel.clock.produced - channel.clock.applied)
            for place, channel in enumerate(self._channels)
            if channel is not but and channel.has_work
        )
        return furthest_behind(behind, self._served, len(self._channels))

    def _check_stop(self) -> None:
        if self._stopping:
            raise _Stop

    def _apply(self, channel: UnitChannel, batch: GradientBatch) -> None:
        """Turn the gradients of a batch into new parameter values."""
        unit = channel.unit
        first = self._first_op[unit]
        update = BatchUpdate(self._mover, self._rule, self._scratch, channel, batch)
        ops = [first + place for place, _, _ in update.parts]
        for number, (op, (_, part, pieces)) in enumerate(zip(ops, update.parts, strict=True)):
            self._check_stop()
            following = list(islice(chain(ops[number + 1 :], self._next_unit_ops(channel)), AHEAD))
            with self.follower.held(op, following):
                self._at("slice", unit)
                started_s = time.perf_counter()
                update.apply(part, pieces)
                spent_s = time.perf_counter() - started_s
            self.follower.took(op, spent_s)
            self._sink.emit(Event(EventKind.UPDATE, unit.name, part.numel * unit.dtype.itemsize, started_s, spent_s))
        update.finish()

    def _next_unit_ops(self, served: UnitChannel) -> Iterator[int]:
        """The ops of the unit that is served after this one, as far as can be known."""
        place = self._choose(served)
        if place is not None:
            unit = self._channels[place].unit
            first = self._first_op[unit]
            yield from range(first, first + len(unit.slices))


def _stop_at_exit(thread: weakref.ref[UpdateThread], process: int) -> None:
    """Where nobody has closed the engine: a thread that is in a kernel of torch when the interpreter ends aborts the
    process.

    Not in a child process, which does not have the thread.
    """
    left = thread()
    if left is not None and os.getpid() == process:
        left.stop(knobs.EXIT_PATIENCE_S)
