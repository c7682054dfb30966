"""Lock-free updates: the training thread hands gradients over and goes on; it waits only to keep the staleness bound.

A unit's gradient is handed to the update thread when it is complete, which the previous unskipped step foretells, or,
with clipping, at the optimizer step. New parameters are adopted (copied into the unit's pages) at most twice a step:
before the unit's first use, and after its last, when its gradient is complete. In between its parameters do not change,
so forward, recomputation and backward of a step see the same values. (Where memory for gradients is short, new
parameters are also adopted between two micro-batches of a step, never between a forward and its backward.)

Only units whose states do not fit in memory are updated so. The others are updated on time, on the training thread, as
in exact mode (`optim.exact.updater`): handing them over would cost copies and a core, and make them late for nothing.

Before a unit's first use in a step, the parameters in use miss at most ``max_staleness`` of the steps before; the
training thread waits for the update thread where they would miss more. With 0 the results are those of exact mode, bit
for bit, and so are those of the first ``exact_steps`` steps.

Source: Angel-PTM (VLDB 2023), lock-free updating; the bound is that of stale-synchronous training (Ho et al., NeurIPS
2013), kept for each unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch

from optim.exact.gradient_store import flat_gradient
from optim.exact.updater import ExactUpdater
from optim.lockfree.adoption import Adoption
from optim.lockfree.gradient_room import GradientRoom
from optim.lockfree.limits import GradientBudgets, StalenessBound
from optim.lockfree.unit_channel import GradientSum, UnitChannel
from optim.lockfree.update_thread import UpdateThread
from optim.rules import UpdateRule
from optim.scaling.clip import gradient_norm, is_finite
from optim.states import StateAccess
from optim.training import Training
from optim.unit import Grad, Hyper, Pending, Slot, Unit
from optim.updater import Updater
from pagemem.process.closing import close_all


class LockFreeUpdater(ExactUpdater):
    """Takes gradients and lets a thread of its own apply them, or those of them that can be late.

    Args:
        training: what is trained, and how.
        rule: what an update does.
        thread: applies gradients; not started yet.
        channels: one for each unit that it has; every other unit is updated on time.
        states: keeps fp32 masters in step with edited parameters.
        budgets: of gradients.
        updated: told of each unit that was updated on time.
        bound: how far parameters may be behind.

    Attributes:
        lock: what the training thread waits for updates on.
    """

    #: Gradients of parameters that are not optimized stay where autograd puts them.
    keeps_unoptimized: ClassVar[bool] = False

    def __init__(
        self,
        training: Training,
        rule: UpdateRule,
        thread: UpdateThread,
        channels: Sequence[UnitChannel],
        states: StateAccess,
        budgets: GradientBudgets,
        bound: StalenessBound,
        updated: Callable[[Unit], None] = lambda unit: None,
    ) -> None:
        super().__init__(training, rule, budgets.on_time, updated)
        self.state_frames = thread.follower.n_frames
        self.lock = thread.lock
        self._thread = thread
        self._channels = {channel.unit: channel for channel in channels}
        self._states = states
        self._late_budget = budgets.late
        self._bound = bound
        self._adoption = Adoption(training.driver, self._channels, budgets.late)
        self._room = GradientRoom(thread, channels, self._adoption, budgets.late, training, lambda: self._unused)
        self._unused = set(self._channels)
        self._spoiled: set[Slot] = set()
        thread.start()

    @property
    def staleness(self) -> int:
        """Steps that the parameters in use miss, in the unit that is furthest behind."""
        return max((channel.clock.staleness for channel in self._channels.values()), default=0)

    @property
    def most_direct_bytes(self) -> int:
        """As `peak_direct_bytes`, with all that gradients on their way may ever take."""
        return super().peak_direct_bytes + self.most_late_bytes

    @property
    def most_late_bytes(self) -> int:
        """What gradients on their way to the update thread, and versions on theirs back, may take at most."""
        return self._late_budget.limit_bytes

    @property
    def direct_bytes(self) -> int:
        """As `Updater.direct_bytes`."""
        return super().direct_bytes + self._late_budget.n_bytes

    @property
    def peak_direct_bytes(self) -> int:
        """As `Updater.peak_direct_bytes`: at most."""
        return super().peak_direct_bytes + self._late_budget.peak_bytes

    # ---- gradients ---------------------------------------------------------------------------------------------

    def _take(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        self._thread.check()
        if unit not in self._channels:
            if self._drops_single and not is_finite(flat_gradient(slot, gradient)):
                self._spoiled.add(slot)
            super()._take(unit, slot, gradient)
            return
        flat = flat_gradient(slot, gradient)
        if not self._arrivals.count(unit, slot, gradient):
            return
        if slot.direct is None:
            self._room.take(flat.numel() * flat.dtype.itemsize)
            slot.direct = flat
        else:
            slot.direct.add_(flat)
        slot.become(Grad.HELD)
        self._complete(unit)

    def _complete(self, unit: Unit) -> None:
        if unit not in self._channels:
            super()._complete(unit)
        elif self._arrivals.complete(unit):
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

    @property
    def _drops_single(self) -> bool:
        """Whether gradients that are not finite are dropped unit by unit; with a norm it is the whole step."""
        return not self._training.scaling.needs_norm

    def _may_apply(self, unit: Unit, found: Sequence[Slot]) -> bool:
        for slot in found:
            slot.lookahead = ()  # Of a commit that was made while the unit was late: it goes on from where it is.
        if not self._drops_single:
            return True
        bad = [slot for slot in found if slot in self._spoiled or not (slot.own is None or is_finite(slot.own))]
        if bad:
            self.dropped_gradients += 1
            self._forget(unit, [slot for slot in found if slot.own is None])
            _spend(found)
        return not bad

    def _before_look(self, unit: Unit) -> None:
        self._thread.check()
        super()._before_look(unit)

    @contextmanager
    def _bytes(self, unit: Unit, slot: Slot) -> Iterator[torch.Tensor]:
        if unit in self._channels:
            assert slot.direct is not None
            yield slot.direct
            return
        with super()._bytes(unit, slot) as flat:
            yield flat
            if slot in self._spoiled and is_finite(flat):
                self._spoiled.discard(slot)  # whoever looked has mended it

    def _make_zeros(self, unit: Unit, slot: Slot) -> None:
        if unit not in self._channels:
            super()._make_zeros(unit, slot)
            return
        self._room.take(slot.numel * slot.dtype.itemsize)
        slot.direct = torch.zeros(slot.numel, dtype=slot.dtype)
        slot.become(Grad.HELD)

    def _forget(self, unit: Unit, slots: Sequence[Slot]) -> None:
        self._spoiled.difference_update(slots)
        if unit not in self._channels:
            super()._forget(unit, slots)
            return
        for slot in slots:
            if slot.direct is not None:
                self._late_budget.release(slot.direct.numel() * slot.direct.dtype.itemsize)
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
        self._late_budget.release(channel.put(sums))
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
        self._update.check_whole()
        hypers = self._begin_step()
        for unit in self._index.units:
            if unit not in self._channels and any(slot.grad is not Grad.NONE for slot in unit.slots):
                self._make_pending(unit)
        for unit, slot in self._slots:
            if slot.grad is Grad.ZEROS:
                self._make_zeros(unit, slot)
            elif slot.own is not None and unit in self._channels:
                self._room.take(slot.numel * slot.dtype.itemsize)
                slot.direct = slot.own.detach().reshape(-1).clone()  # The updater writes over what it is given.
        late = [unit for unit in self._channels if any(slot.direct is not None for slot in unit.slots)]
        on_time = [
            unit for unit in self._index.units if unit not in self._channels
            and any(slot.group >= 0 and slot.grad in (Grad.HELD, Grad.OWN) for slot in unit.slots)
        ]  # fmt: skip
        coefficient = self._coefficient(on_time) if self._training.scaling.needs_norm else None
        if self._training.scaling.needs_norm and (late or on_time) and coefficient is None:
            self.dropped_steps += 1
            for unit in late:
                found = [slot for slot in unit.slots if slot.direct is not None]
                self._forget(unit, found)
                _spend(found)
        else:
            for unit in late:
                self._hand_over(unit, hypers, coefficient)
            self._decide_all(on_time, Pending(hypers, coefficient))
        self._unused = set(self._channels)
        self._end_step()

    def _note_norm(self, total: torch.Tensor) -> None:
        Updater._note_norm(self, total)

    def _coefficient(self, waiting: Sequence[Unit]) -> torch.Tensor | None:
        """As `Training.coefficient`; the user's own tensors are multiplied here."""
        norms = []
        for unit, slot in self._slots:
            if unit not in self._channels:
                norm = self._store.norm(unit, slot)
            else:
                norm = None if slot.direct is None else gradient_norm(slot.direct)
            if norm is not None:
                norms.append((slot.order, norm))
        coefficient = self._training.coefficient(norms, self._note_norm)
        if coefficient is not None:
            for unit, slot in self._slots:
                if slot.own is not None and unit in self._channels:
                    slot.own.mul_(coefficient.to(slot.own.device))
        return coefficient

    # ---- parameters --------------------------------------------------------------------------------------------

    def before_use(self, unit: Unit) -> None:
        """Before a unit's first use in a step: adopt its newest parameters, waiting while they are too old."""
        self._thread.check()
        channel = self._channels.get(unit)
        if channel is None:
            super().before_use(unit)
            return
        if unit not in self._unused:
            if not unit.updated:
                channel.missed = channel.clock.staleness  # For want of room more may have been adopted meanwhile.
            return
        self._unused.discard(unit)
        allowed = self._bound.allowed(unit)
        late = channel.clock.staleness > allowed
        if late:
            self._room.await_step(channel, channel.clock.produced - allowed)
        may = late or (unit.live_views == 0 and not unit.parameters.snapshot_pending)
        self._adoption.adopt(unit, "before", may=may)
        channel.missed, channel.may_miss = channel.clock.staleness, allowed > 0

    def settle(self, unit: Unit) -> None:
        """Before a use outside the step (evaluation, copies, edits): adopt all updates of the steps made."""
        self._thread.check()
        channel = self._channels.get(unit)
        if channel is None:
            super().settle(unit)
        elif channel.clock.staleness:
            self._room.await_step(channel, channel.clock.produced)
            self._adoption.adopt(unit, "settle")

    @contextmanager
    def consistent(self, *, whole: bool) -> Iterator[None]:
        """See `Updater.consistent`. Not ``whole``: the update thread rests between two units meanwhile, and gradients
        on their way are not applied before. Where no staleness is allowed it is always whole."""
        self._update.check_whole()
        self._arrivals.check_between_steps()
        if whole or not all(self._bound.allowed(unit) for unit in self._channels):
            self.drain()
            yield
            return
        for unit in self._index.units:
            self._make_pending(unit)
        with self._thread.paused():
            for unit, channel in self._channels.items():
                if channel.unadopted() is not None:
                    with nullcontext() if unit.parameters.resident else self._driver.untraced():
                        self._adoption.adopt(unit, "commit")
            yield

    def close(self) -> None:
        """End the update thread, giving up updates not yet made, and give the reservations back. Idempotent."""
        self._thread.stop()
        for unit in self._channels:
            for slot in unit.slots:
                slot.forget_gradient()
        close_all(super().close, self._late_budget.close)


def _spend(slots: Sequence[Slot]) -> None:
    """Gradients were handed over, or dropped in place of that; the user's own tensors stay."""
    for slot in slots:
        if slot.own is None:
            slot.become(Grad.SPENT)
