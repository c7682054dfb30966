"""Room for gradients on their way, and waiting for the update thread, which gives room back. Training thread only."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence

from optim.gradient_budget import GradientBudget
from optim.gradient_errors import START_HINT
from optim.lockfree.adoption import Adoption
from optim.lockfree.unit_channel import UnitChannel
from optim.lockfree.update_thread import UpdateThread
from optim.training import Training
from optim.unit import Unit
from pagemem.errors import BudgetError
from pagemem.telemetry.events import Event, EventKind


class GradientRoom:
    """Takes bytes of a budget for gradients, and has some given back where it is used up.

    Args:
        channels: of the units whose gradients these are.
        adoption: adopts versions, for the bytes that they hold.
        budget: of gradients on their way.
        unused: units that the step under way has not used yet.
    """

    def __init__(
        self,
        thread: UpdateThread,
        channels: Sequence[UnitChannel],
        adoption: Adoption,
        budget: GradientBudget,
        training: Training,
        unused: Callable[[], Container[Unit]],
    ) -> None:
        self._thread = thread
        self._channels = channels
        self._adoption = adoption
        self._budget = budget
        self._training = training
        self._unused = unused

    def take(self, n_bytes: int) -> None:
        """Take ``n_bytes`` of the budget; where it is used up, wait for the update thread to give some back.

        Raises:
            BudgetError: there is nothing that could be given back.
        """
        self._adoption.collect_freed()
        while not self._budget.take(n_bytes):
            self._gain(n_bytes, self._applied())

    def await_step(self, channel: UnitChannel, step: int) -> None:
        """Wait until a unit's updates up to ``step`` are applied."""
        if channel.clock.applied >= step:
            return
        self._thread.want(channel)
        try:
            self._wait(lambda: channel.clock.applied >= step, f"update of {channel.unit.name}", 0)
        finally:
            self._thread.want(None)

    def _gain(self, n_bytes: int, applied: int) -> None:
        """Have some bytes given back. ``applied``: counted before anything else was looked at."""
        unseen, unused = self._adoption.unseen_units(), self._unused()
        # A unit has the same parameters in all micro-batches of a step, unless there is no other way to go on at once.
        whole = [unit for unit in unseen if unit in unused or unit.updated]
        if self._adoption.adopt_without_moves(whole) or self._adoption.adopt_without_moves(unseen):
            return
        if any(channel.clock.applied < channel.clock.produced for channel in self._channels):
            self._wait(lambda: self._applied() > applied, "room for gradients", n_bytes)
            self._adoption.collect_freed()
            return
        # The update thread has nothing left to do: what is published and not in memory is all there is to give room.
        waiting = self._adoption.unseen_units()
        for unit in waiting:
            self._adoption.adopt(unit, "short")
        if not waiting:
            need_bytes = self._budget.n_bytes + n_bytes
            remedy = START_HINT if self._training.eager else "raise memory.ram by the difference"
            raise BudgetError(
                f"gradients on their way to the updater need {need_bytes} bytes, the budget has "
                f"{self._budget.limit_bytes} for them; {remedy}",
                need_bytes,
            )

    def _wait(self, ready: Callable[[], bool], why: str, n_bytes: int) -> None:
        started_s = time.perf_counter()
        self._thread.await_progress(ready)
        self._training.sink.emit(Event(EventKind.WAIT, why, n_bytes, started_s, time.perf_counter() - started_s))

    def _applied(self) -> int:
        return sum(channel.clock.applied for channel in self._channels)
