"""The updater of lock-free mode: a thread that goes round the units, applies gradients and publishes new parameters.

    IDLE --start--> RUNNING --stop--> STOPPED
                    RUNNING --error--> FAILED

It takes the parcel of the unit that is furthest behind (one that the training thread waits for first), streams the
unit's slices of optimizer states through its own windows of host memory, and publishes the new parameters when all of
them are there. While a slice is updated the next one is read and the one before is written.

Where a parcel holds the gradients of several steps, the updater cannot keep pace with training; the rule then says
which updates their mean makes (`UpdateRule.merge`). Where gradients were computed with parameters that missed some
steps, the next ones will be, too: parameters are published as far ahead as momentum will take them in as many steps and
one more (`UpdateRule.lookahead`), and moved back before the next update.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from optim.lockfree.state_windows import StateWindows
from optim.lockfree.unit_channel import GradientBatch, GradientSum, UnitChannel
from optim.rules import Batch, Lookahead, UpdateRule
from optim.states import state_view
from optim.unit import Hyper, Piece, Slice, Slot, Unit
from pagemem.files.threads import start_thread
from pagemem.residency.mover import Mover
from pagemem.residency.wait_lock import WaitLock
from pagemem.state_machine import StateMachine
from pagemem.telemetry.events import Event, EventKind, EventSink
from pagemem.units import MiB

#: Where tests hold the updater: names of the points in `UpdateThread` that call ``gate``.
Gate = Callable[[str, Unit], None]


#: Elements that a thread updates at a time: a multiple of what rounding must not see (`optim.unit.SLICE_ALIGN_NUMEL`),
#: and so few that parameters, gradients, states and scratch of all of them fit in a core's cache.
PIECE_NUMEL: Final = 1 << 17


def piece_numel(units: Iterable[Unit], n_threads: int) -> int:
    """Elements that are updated at a time."""
    return min(PIECE_NUMEL * n_threads, max((part.numel for unit in units for part in unit.slices), default=0))


def scratch_bytes(units: Iterable[Unit], n_threads: int) -> int:
    """What the updater has outside the arena."""
    return 2 * piece_numel(units, n_threads) * torch.float32.itemsize


#: How long the end of a program waits for the thread, where nobody has closed the engine.
_EXIT_PATIENCE_S: Final = 10.0


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


def _no_gate(_point: str, _unit: Unit) -> None:
    pass


class UpdateThread:
    """Applies parcels. `start`, `stop`, `wake`, `want` and `await_progress` belong to the training thread.

    Args:
        mover: owner of all residency.
        mailboxes: one for each unit, in the order in which the model uses them.
        windows: host memory for slices; slice ``k`` of unit ``u`` has the number ``first_slice[u] + k``.
        n_threads: compute threads of an update.
        gate: called at fixed points, for tests.
    """

    def __init__(
        self,
        mover: Mover,
        rule: UpdateRule,
        mailboxes: Sequence[UnitChannel],
        windows: StateWindows,
        sink: EventSink,
        *,
        n_threads: int = 1,
        gate: Gate = _no_gate,
    ) -> None:
        self.state = UpdaterState.IDLE
        self.failure: BaseException | None = None
        self._mover = mover
        self._rule = rule
        self._mailboxes = list(mailboxes)
        self.windows = windows
        self._sink = sink
        self._n_threads = n_threads
        self._piece_numel = piece_numel((mailbox.unit for mailbox in mailboxes), n_threads)
        self._gate = gate
        self._first_slice: dict[Unit, int] = {}
        number = 0
        for mailbox in self._mailboxes:
            self._first_slice[mailbox.unit] = number
            number += len(mailbox.unit.slices)
        self._wanted: UnitChannel | None = None
        self._work = threading.Event()
        self._progress = WaitLock()
        self._n_published = 0
        self._stopping = False
        self._pausing = False
        self._resting = False
        self._thread = threading.Thread(target=self._run, name="optim-updater", daemon=True)
        self._at_exit = partial(_stop_at_exit, weakref.ref(self), os.getpid())

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
        """Gradients were put into a mailbox."""
        self._work.set()

    def want(self, mailbox: UnitChannel | None) -> None:
        """Have a unit served next, or none in particular."""
        self._wanted = mailbox

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
        mailbox = self._choose()
        if mailbox is None:
            self._check_stop()
            self._work.wait()
            return
        self._gate("chosen", mailbox.unit)
        parcel = mailbox.take()
        if parcel is None:
            # The training thread has it for a moment, to add a step; it wakes us when it puts it back.
            return
        self._gate("taken", mailbox.unit)
        self._apply(mailbox, parcel)
        self._gate("applied", mailbox.unit)
        mailbox.publish(parcel)
        with self._progress:
            self._n_published += 1
            self._progress.notify_all()
        self._gate("published", mailbox.unit)

    def _choose(self) -> UnitChannel | None:
        wanted = self._wanted
        if wanted is not None and wanted.has_work:
            return wanted
        busy = [mailbox for mailbox in self._mailboxes if mailbox.has_work]
        return min(busy, key=lambda box: box.clock.applied - box.clock.produced, default=None)

    def _check_stop(self) -> None:
        if self._stopping:
            raise _Stop

    def _apply(self, mailbox: UnitChannel, parcel: GradientBatch) -> None:
        """Turn the gradients of a parcel into new parameter values."""
        unit = mailbox.unit
        newest = mailbox.newest_values()
        first = self._first_slice[unit]
        parts = [(first + k, part, _pieces(parcel, part, self._piece_numel)) for k, part in enumerate(unit.slices)]
        parts = [entry for entry in parts if entry[2]]
        due = {slot: _due(self._rule, total) for slot, total in parcel.sums.items()}
        for place, (number, part, pieces) in enumerate(parts):
            self._check_stop()
            with self.windows.held(number):
                if place + 1 < len(parts):
                    self.windows.prefetch(parts[place + 1][0])
                else:
                    self._prefetch_next_unit(mailbox)
                self._gate("slice", unit)
                started_s = time.perf_counter()
                for piece in pieces:
                    self._update(unit, part, piece, parcel.sums[piece.slot], due[piece.slot], newest)
                spent_s = time.perf_counter() - started_s
            self._sink.emit(Event(EventKind.UPDATE, unit.name, part.numel * unit.dtype.itemsize, started_s, spent_s))
        for slot, made in due.items():
            slot.lookahead = made.lookahead
            slot.steps += len(made.updates)

    def _prefetch_next_unit(self, served: UnitChannel) -> None:
        following = self._choose()
        if following is not None and following is not served:
            self.windows.prefetch(self._first_slice[following.unit])

    def _update(
        self, unit: Unit, part: Slice, piece: Piece, total: GradientSum, due: _Due, newest: dict[Slot, GradientSum]
    ) -> None:
        """All updates of a piece, which is small enough for everything to stay in the processor's cache meanwhile."""
        slot, states = piece.slot, self._states(part, piece)
        begin, end = piece.begin - slot.offset, piece.end - slot.offset
        scratch, spare = self._scratch[0, : piece.numel], self._scratch[1, : piece.numel]
        target = total.flat[begin:end]
        # One scratch is enough for both gradient and parameter: what is not fp32 has masters, which are updated in
        # place.
        gradient = target if target.dtype is torch.float32 else scratch.copy_(target)
        if total.coefficient is not None:
            gradient.mul_(total.coefficient)
        if total.n_steps > 1:
            gradient.mul_(1 / total.n_steps)
        newest_values = self._parameter(unit, part, piece, newest)
        parameter = newest_values if part.master is not None else scratch
        if slot.lookahead:
            self._rule.apply_lookahead(slot.lookahead, -1, newest_values, states, spare, parameter)
        elif parameter is not newest_values:
            parameter.copy_(newest_values)
        for made, hyper in enumerate(due.updates):
            self._rule.apply(hyper, Batch([parameter], [gradient], [[state] for state in states], [slot.steps + made]))
        if due.lookahead and not due.reached:
            self._rule.apply_lookahead(due.lookahead, 1, parameter, states, spare, parameter)
        target.copy_(parameter)

    def _parameter(self, unit: Unit, part: Slice, piece: Piece, newest: dict[Slot, GradientSum]) -> Tensor:
        """The newest fp32 values of a piece; the master where there is one."""
        if part.master is not None:
            return state_view(self._mover, part, part.master, 0, piece.begin, piece.numel)
        known = newest.get(piece.slot)
        if known is not None:
            return known.flat[piece.begin - piece.slot.offset : piece.end - piece.slot.offset]
        assert unit.parameters.frame is not None
        return self._mover.arena.view(unit.parameters.frame, piece.begin * 4, unit.dtype, piece.numel)

    def _states(self, part: Slice, piece: Piece) -> list[Tensor]:
        if part.states is None:
            return []
        return [
            state_view(self._mover, part, part.states, k, piece.begin, piece.numel)
            for k in range(len(self._rule.state_names))
        ]


def _stop_at_exit(thread: weakref.ref[UpdateThread], process: int) -> None:
    """Where nobody has closed the engine: a thread that is in a kernel of torch when the interpreter ends aborts the
    process.

    Not in a child process, which does not have the thread.
    """
    left = thread()
    if left is not None and os.getpid() == process:
        left.stop(_EXIT_PATIENCE_S)


@dataclass(frozen=True, slots=True)
class _Due:
    """What is to be done to a parameter.

    Attributes:
        updates: hyper-parameters of each.
        lookahead: how far ahead of the last of them it ends. reached: whether that one itself goes so far.
    """

    updates: list[Hyper]
    lookahead: Lookahead
    reached: bool = False


def _due(rule: UpdateRule, total: GradientSum) -> _Due:
    """The updates that a sum makes, and as many steps ahead as its gradients ask for."""
    updates = rule.merge(total.hypers)
    lookahead = rule.lookahead(updates[-1], total.slot.steps + len(updates), total.mean_lookahead_steps)
    lookahead_hyper = rule.lookahead_hyper(updates[-1], total.mean_lookahead_steps) if lookahead else None
    return (
        _Due(updates, lookahead)
        if lookahead_hyper is None
        else _Due([*updates[:-1], lookahead_hyper], lookahead, reached=True)
    )


def _pieces(parcel: GradientBatch, part: Slice, most: int) -> list[Piece]:
    """Parts of the parcel's parameters that lie in a slice, none longer than ``most`` elements."""
    found: list[Piece] = []
    for slot in parcel.sums:
        first, end = max(slot.offset, part.begin), min(slot.end, part.end)
        found += [Piece(slot, begin, min(begin + most, end)) for begin in range(first, end, most)]
    return found
