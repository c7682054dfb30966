"""Lock-free updates: the training thread hands gradients over and goes on; it waits only to keep the staleness bound.

A unit's gradient is handed to the update thread when it is complete, which the previous unskipped step foretells, or,
with clipping, at the optimizer step. New parameters are adopted (copied into the unit's pages) at most twice a step:
before the unit's first use, and after its last, when its gradient is complete. In between its parameters do not change,
so forward, recomputation and backward of a step see the same values. (Where memory for gradients is short, new
parameters are also adopted between two micro-batches of a step, never between a forward and its backward.)

Before a unit's first use in a step, the parameters in use miss at most ``max_staleness`` of the steps before; the
training thread waits for the update thread where they would miss more. With 0 the results are those of exact mode, bit
for bit, and so are those of the first ``exact_steps`` steps.

Source: Angel-PTM (VLDB 2023), lock-free updating; the bound is that of stale-synchronous training (Ho et al., NeurIPS
2013), kept for each unit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch

from optim.clip import gradient_norm, is_finite
from optim.exact.gradient_store import flat_gradient
from optim.gradient_budget import GradientBudget
from optim.gradient_errors import START_HINT
from optim.lockfree.adoption import Adoption
from optim.lockfree.unit_channel import GradientSum, UnitChannel
from optim.lockfree.update_thread import UpdateThread
from optim.states import StateAccess
from optim.training import Training
from optim.unit import Grad, Hyper, Slot, Unit
from optim.updater import Updater
from pagemem.errors import BudgetError
from pagemem.telemetry.events import Event, EventKind


@dataclass(frozen=True, slots=True)
class StalenessBound:
    """How far parameters may be behind.

    Attributes:
        max_staleness: steps that the parameters in use may miss, >= 0.
        exact_steps: the first so many steps of a unit's life are made as with ``max_staleness`` 0.
        adopts_after: adopt new parameters after a unit's last use in a step, too, which is when its gradient is
            complete.
    """

    max_staleness: int
    exact_steps: int = 0
    adopts_after: bool = True

    def allowed(self, unit: Unit) -> int:
        """The steps that a unit's parameters may miss."""
        # Counts of steps are the updater's, and part of commits; one it is about to raise means one exact step more.
        young = max(slot.steps for slot in unit.slots) < self.exact_steps
        return 0 if young else self.max_staleness


class LockFreeUpdater(Updater):
    """Takes gradients and lets a thread of its own apply them.

    Args:
        training: what is trained, and how.
        thread: applies gradients; not started yet.
        channels: one for each unit that is optimized.
        states: keeps fp32 masters in step with edited parameters.
        budget: of gradients on their way.
        bound: how far parameters may be behind.

    Attributes:
        lock: what the training thread waits for updates on.
    """

    #: Gradients of parameters that are not optimized stay where autograd puts them.
    keeps_unoptimized: ClassVar[bool] = False

    def __init__(
        self,
        training: Training,
        thread: UpdateThread,
        channels: Sequence[UnitChannel],
        states: StateAccess,
        budget: GradientBudget,
        bound: StalenessBound,
    ) -> None:
        super().__init__(training, budget)
        self.state_frames = thread.windows.n_frames
        self.lock = thread.lock
        self._thread = thread
        self._channels = {channel.unit: channel for channel in channels}
        self._states = states
        self._bound = bound
        self._adoption = Adoption(training.driver, self._channels, budget)
        self._unused = set(self._channels)
        thread.start()

    @property
    def staleness(self) -> int:
        """Steps that the parameters in use miss, in the unit that is furthest behind."""
        return max((channel.clock.staleness for channel in self._channels.values()), default=0)

    @property
    def most_direct_bytes(self) -> int:
        """As `peak_direct_bytes`: all that gradients on their way may ever take."""
        return self._budget.limit_bytes

    @property
    def resident_slices(self) -> frozenset[int]:
        """Numbers of the slices whose states stay in memory."""
        return self._thread.windows.resident

    # ---- gradients ---------------------------------------------------------------------------------------------

    def _take(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        self._thread.check()
        flat = flat_gradient(slot, gradient)
        if not self._arrivals.count(unit, slot, gradient):
            return
        if slot.direct is None:
            self._make_room(flat.numel() * flat.dtype.itemsize)
            slot.direct = flat
        else:
            slot.direct.add_(flat)
        slot.become(Grad.HELD)
        self._complete(unit)

    def _complete(self, unit: Unit) -> None:
        if self._arrivals.complete(unit):
            if self._eager:
                unit.updated = True
                self._hand_over(unit, self._use_hypers(), None)
            if self._bound.adopts_after:
                # Not worth waiting for a commit that has yet to get the old ones.
                self._adoption.adopt(unit, "after", may=self._adoption.is_unseen(unit))

    def abandon(self) -> None:
        """As `Updater.abandon`; gradients that were handed over are applied all the same."""
        super().abandon()
        self._unused = set(self._channels)

    def _before_look(self, unit: Unit) -> None:
        self._thread.check()

    @contextmanager
    def _bytes(self, unit: Unit, slot: Slot) -> Iterator[torch.Tensor]:
        assert slot.direct is not None
        yield slot.direct

    def _make_zeros(self, unit: Unit, slot: Slot) -> None:
        self._make_room(slot.numel * slot.dtype.itemsize)
        slot.direct = torch.zeros(slot.numel, dtype=slot.dtype)
        slot.become(Grad.HELD)

    def _forget(self, unit: Unit, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if slot.direct is not None:
                self._budget.release(slot.direct.numel() * slot.direct.dtype.itemsize)
            slot.forget_gradient()

    def _hand_over(self, unit: Unit, hypers: Sequence[Hyper], coefficient: torch.Tensor | None) -> None:
        """Give the update thread a unit's gradients of this step; ones that are not finite are dropped and counted."""
        # An edit had the unit settled: the update thread holds nothing of it before its next gradient.
        self._states.follow_edits(unit)
        found = [slot for slot in unit.slots if slot.direct is not None]
        if coefficient is None and not all(slot.direct is not None and is_finite(slot.direct) for slot in found):
            self.dropped_gradients += 1
            self._forget(unit, found)
            _spend(found)
            return
        sums: dict[Slot, GradientSum] = {}
        channel = self._channels[unit]
        for slot in found:
            assert slot.direct is not None
            hyper = hypers[slot.group]
            sums[slot] = GradientSum(slot, slot.direct, [hyper], coefficient, channel.lookahead_steps(hyper))
            slot.forget_gradient()
        _spend(found)
        self._budget.release(channel.put(sums))
        self._thread.wake()

    # ---- the optimizer step ------------------------------------------------------------------------------------

    def step(self) -> None:
        """End the step: hand over what was not yet. Does not wait for any update.

        With clipping or loss scaling, a step whose gradients' norm is not finite is dropped and counted; nothing of it
        is applied.

        Raises:
            RuntimeError: hyper-parameters changed after gradients of this step were handed over with the old ones.
            BaseException: what ended the update thread.
        """
        self._thread.check()
        hypers = self._begin_step()
        for unit, slot in self._slots:
            if slot.grad is Grad.ZEROS:
                self._make_zeros(unit, slot)
            elif slot.own is not None:
                self._make_room(slot.numel * slot.dtype.itemsize)
                slot.direct = slot.own.detach().reshape(-1).clone()  # The updater writes over what it is given.
        waiting = [unit for unit in self._channels if any(slot.direct is not None for slot in unit.slots)]
        coefficient = self._coefficient() if self._training.scaling.needs_norm else None
        if self._training.scaling.needs_norm and waiting and coefficient is None:
            self.dropped_steps += 1
            for unit in waiting:
                found = [slot for slot in unit.slots if slot.direct is not None]
                self._forget(unit, found)
                _spend(found)
        else:
            for unit in waiting:
                self._hand_over(unit, hypers, coefficient)
        self._unused = set(self._channels)
        self._end_step()

    def _coefficient(self) -> torch.Tensor | None:
        """As `Training.coefficient`; the user's own tensors are multiplied here."""
        norms = [(slot.order, gradient_norm(slot.direct)) for _, slot in self._slots if slot.direct is not None]
        coefficient = self._training.coefficient(norms, self._note_norm)
        if coefficient is not None:
            for _, slot in self._slots:
                if slot.own is not None:
                    slot.own.mul_(coefficient.to(slot.own.device))
        return coefficient

    # ---- parameters --------------------------------------------------------------------------------------------

    def before_use(self, unit: Unit) -> None:
        """Before a unit's first use in a step: adopt its newest parameters, waiting while they are too old."""
        self._thread.check()
        if unit not in self._unused:
            return
        self._unused.discard(unit)
        channel = self._channels[unit]
        allowed = self._bound.allowed(unit)
        late = channel.clock.staleness > allowed
        if late:
            self._await(channel, channel.clock.produced - allowed)
        may = late or (unit.live_views == 0 and not unit.parameters.snapshot_pending)
        self._adoption.adopt(unit, "before", may=may)
        channel.missed, channel.may_miss = channel.clock.staleness, allowed > 0

    def settle(self, unit: Unit) -> None:
        """Before a use outside the step (evaluation, copies, edits): adopt all updates of the steps made."""
        self._thread.check()
        channel = self._channels.get(unit)
        if channel is not None and channel.clock.staleness:
            self._await(channel, channel.clock.produced)
            self._adoption.adopt(unit, "settle")

    @contextmanager
    def consistent(self, *, whole: bool) -> Iterator[None]:
        """See `Updater.consistent`. Not ``whole``: the update thread rests between two units meanwhile, and gradients
        on their way are not applied before. Where no staleness is allowed it is always whole."""
        self._arrivals.check_between_steps()
        if whole or not all(self._bound.allowed(unit) for unit in self._channels):
            self.drain()
            yield
            return
        with self._thread.paused():
            for unit, channel in self._channels.items():
                if channel.unadopted() is not None:
                    with nullcontext() if unit.parameters.resident else self._driver.untraced():
                        self._adoption.adopt(unit, "commit")
            yield

    def _await(self, channel: UnitChannel, step: int) -> None:
        """Wait until the updates up to ``step`` are applied."""
        if channel.clock.applied >= step:
            return
        self._thread.want(channel)
        try:
            self._wait(lambda: channel.clock.applied >= step, f"update of {channel.unit.name}", 0)
        finally:
            self._thread.want(None)

    def _wait(self, ready: Callable[[], bool], why: str, n_bytes: int) -> None:
        started_s = time.perf_counter()
        self._thread.await_progress(ready)
        self._training.sink.emit(Event(EventKind.WAIT, why, n_bytes, started_s, time.perf_counter() - started_s))

    # ---- memory ------------------------------------------------------------------------------------------------

    def _make_room(self, n_bytes: int) -> None:
        """Take ``n_bytes`` of the budget; where it is used up, wait for the update thread to give some back."""
        self._adoption.collect_freed()
        while not self._budget.take(n_bytes):
            self._gain_room(n_bytes, self._applied())

    def _gain_room(self, n_bytes: int, applied: int) -> None:
        """Have some bytes given back. ``applied``: counted before anything else was looked at."""
        if self._adoption.adopt_without_moves():
            return
        if any(channel.clock.applied < channel.clock.produced for channel in self._channels.values()):
            self._wait(lambda: self._applied() > applied, "room for gradients", n_bytes)
            self._adoption.collect_freed()
            return
        # The update thread has nothing left to do: what is published and not in memory is all there is to give room.
        waiting = self._adoption.unseen_units()
        for unit in waiting:
            self._adoption.adopt(unit, "short")
        if not waiting:
            need_bytes = self.direct_bytes + n_bytes
            remedy = START_HINT if self._eager else "raise memory.ram by the difference"
            raise BudgetError(
                f"gradients on their way to the updater need {need_bytes} bytes, the budget has "
                f"{self._budget.limit_bytes} for them; {remedy}",
                need_bytes,
            )

    def _applied(self) -> int:
        return sum(channel.clock.applied for channel in self._channels.values())

    def close(self) -> None:
        """End the update thread, giving up updates not yet made, and give the reservations back. Idempotent."""
        self._thread.stop()
        for unit in self._channels:
            for slot in unit.slots:
                slot.forget_gradient()
        super().close()


def _spend(slots: Sequence[Slot]) -> None:
    """Gradients were handed over, or dropped in place of that; the user's own tensors stay."""
    for slot in slots:
        if slot.own is None:
            slot.become(Grad.SPENT)
