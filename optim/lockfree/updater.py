"""Lock-free updates: the training thread hands gradients over and goes on; it waits only to keep the staleness bound.

A unit's gradient is handed to the updater when it is complete, which the previous whole step foretells, or, with
clipping, at the optimizer step. New parameters are adopted (copied into the unit's pages) at most twice a step: before
the unit's first use, and after its last, when its gradient is complete. In between its parameters do not change, so
forward, recomputation and backward of a step see the same values. (Where memory for gradients is short, new parameters
are also adopted between two micro-batches of a step, never between a forward and its backward.)

Before a unit's first use in a step, the parameters in use miss at most ``max_staleness`` of the steps before; the
training thread waits for the updater where they would miss more. With 0 the results are those of exact mode, bit for
bit, and so are those of the first ``exact_steps`` steps.

Source: Angel-PTM (VLDB 2023), lock-free updating; the bound is that of stale-synchronous training (Ho et al., NeurIPS
2013), kept for each unit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch

from optim.clip import gradient_norm, total_norm
from optim.exact.gradient_store import flat_gradient
from optim.gradient_holder import GradientHolder
from optim.lockfree.unit_channel import GradientSum, UnitChannel, Version
from optim.lockfree.update_thread import UpdateThread
from optim.loss_scale import Scaling
from optim.states import StateAccess
from optim.unit import START_HINT, Grad, Hyper, Slot, Unit, UnitIndex, complete
from pagemem.budget import Budget, BudgetShortage, Reservation
from pagemem.errors import BudgetError
from pagemem.telemetry.events import Event, EventKind, EventSink
from pagemem.tier import Tag
from scheduler.execution.driver import Driver, Mode
from scheduler.planning.trace import Access, AccessMode, OpKind


class LockFreeUpdater(GradientHolder):
    """Takes gradients and lets a thread of its own apply them. Methods belong to the training thread.

    Args:
        driver: gives host pages and keeps the trace.
        index: the model's units.
        thread: the updater, not started yet.
        mailboxes: one for each unit that is optimized.
        states: keeps fp32 masters in step with edited parameters.
        hypers: current hyper-parameters of all groups, asked for whenever a gradient is handed over.
        budget: the host budget; gradients on their way are reserved in it, tag GRAD.
        limit_bytes: bytes of gradients on their way at any time.
        scratch_bytes: what the updater has outside the host arena beside them.
        scaling: clipping and loss scaling.
        eager: hand a unit's gradient over as soon as it is complete, not at the optimizer step.
        adopts_after: adopt new parameters after a unit's last use in a step, too, which is when its gradient is
            complete.
        max_staleness: see above, >= 0.
        exact_steps: the first so many steps of a unit's life are made as with ``max_staleness`` 0.
    """

    #: Gradients of parameters that are not optimized stay where autograd puts them.
    keeps_unoptimized: ClassVar[bool] = False

    def __init__(
        self,
        driver: Driver,
        index: UnitIndex,
        thread: UpdateThread,
        mailboxes: Sequence[UnitChannel],
        states: StateAccess,
        hypers: Callable[[], Sequence[Hyper]],
        budget: Budget,
        limit_bytes: int,
        scratch_bytes: int,
        sink: EventSink,
        *,
        scaling: Scaling,
        eager: bool,
        adopts_after: bool = True,
        max_staleness: int,
        exact_steps: int = 0,
    ) -> None:
        super().__init__(driver, index, hypers)
        self._thread = thread
        self._mailboxes = {mailbox.unit: mailbox for mailbox in mailboxes}
        self._states = states
        self._sink = sink
        self._scaling = scaling
        self._eager = eager
        self._adopts_after = adopts_after
        self._max_staleness = max_staleness
        self._exact_steps = exact_steps
        self._limit_bytes = limit_bytes
        reserved = budget.reserve(Tag.GRAD, 0, "gradients on their way")
        assert isinstance(reserved, Reservation)
        self._reservation = reserved
        scratch = budget.reserve(Tag.STAGING, scratch_bytes, "the updater's scratch")
        assert isinstance(scratch, Reservation)
        self._scratch = scratch
        self._unused = set(self._mailboxes)
        self.direct_bytes = 0
        self.peak_direct_bytes = 0
        self.dropped_steps = 0
        self.dropped_gradients = 0
        thread.start()

    @property
    def staleness(self) -> int:
        """Steps that the parameters in use miss, in the unit that is furthest behind."""
        return max((mailbox.clock.staleness for mailbox in self._mailboxes.values()), default=0)

    @property
    def state_frames(self) -> int:
        """Host frames in which the updater keeps optimizer states."""
        return self._thread.windows.n_frames

    # ---- gradients ---------------------------------------------------------------------------------------------

    def gradient(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        """Take one gradient from autograd; hands the unit's over when it was the last one it waited for.

        Raises:
            StaleGradientError: what it is to be added to was handed over; this one is lost, nothing else is.
            BaseException: what ended the updater.
        """
        self._thread.check()
        flat = flat_gradient(slot, gradient)
        if not self._arrives(unit, slot, gradient):
            return
        if slot.direct is None:
            self._take_bytes(flat.numel() * flat.dtype.itemsize)
            slot.direct = flat
        else:
            slot.direct.add_(flat)
        slot.become(Grad.HELD)
        self._complete(unit)

    def _complete(self, unit: Unit) -> None:
        if complete(unit, foretold=self._foretold):
            if self._eager:
                hypers = self._hypers()
                self._used_hypers = self._used_hypers or hypers
                unit.updated = True
                self._hand_over(unit, hypers, None)
            if self._adopts_after:
                # Not worth waiting for a commit that has yet to get the old ones.
                self._adopt(unit, "after", may=self._unseen(unit))

    def abandon(self) -> None:
        """As `GradientHolder.abandon`; gradients that were handed over are applied all the same."""
        super().abandon()
        self._unused = set(self._mailboxes)

    def _settled(self, unit: Unit) -> None:
        self._thread.check()

    @contextmanager
    def _bytes(self, unit: Unit, slot: Slot) -> Iterator[torch.Tensor]:
        assert slot.direct is not None
        yield slot.direct

    def _make_zeros(self, unit: Unit, slot: Slot) -> None:
        self._take_bytes(slot.numel * slot.dtype.itemsize)
        slot.direct = torch.zeros(slot.numel, dtype=slot.dtype)
        slot.become(Grad.HELD)

    def _forget(self, unit: Unit, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if slot.direct is not None:
                self._free_bytes(slot.direct.numel() * slot.direct.dtype.itemsize)
            slot.forget_gradient()

    def _hand_over(self, unit: Unit, hypers: Sequence[Hyper], coefficient: torch.Tensor | None) -> None:
        """Give the updater a unit's gradients of this step; ones that are not finite are dropped and counted."""
        # An edit had the unit settled: the updater has nothing of it in hand before its next gradient.
        self._states.follow_edits(unit)
        found = [slot for slot in unit.slots if slot.direct is not None]
        if coefficient is None and not all(_is_finite(slot.direct) for slot in found):
            self.dropped_gradients += 1
            self._forget(unit, found)
            _spend(found)
            return
        sums: dict[Slot, GradientSum] = {}
        mailbox = self._mailboxes[unit]
        for slot in found:
            assert slot.direct is not None
            hyper = hypers[slot.group]
            sums[slot] = GradientSum(slot, slot.direct, [hyper], coefficient, _ahead_steps(mailbox, hyper))
            slot.forget_gradient()
        _spend(found)
        self._free_bytes(mailbox.put(sums))
        self._thread.wake()

    # ---- the optimizer step ------------------------------------------------------------------------------------

    def step(self) -> None:
        """End the step: hand over what was not yet. Does not wait for any update.

        With clipping or loss scaling, a step whose gradients' norm is not finite is dropped and counted; nothing of it
        is applied.

        Raises:
            RuntimeError: hyper-parameters changed after gradients of this step were handed over with the old ones.
            BaseException: what ended the updater.
        """
        self._thread.check()
        hypers = self._check_hypers()
        self._check_cleared()
        for unit, slot in self._slots:
            if slot.grad is Grad.ZEROS:
                self._make_zeros(unit, slot)
            elif slot.own is not None:
                self._take_bytes(slot.numel * slot.dtype.itemsize)
                slot.direct = slot.own.detach().reshape(-1).clone()  # The updater writes over what it is given.
        waiting = [unit for unit in self._mailboxes if any(slot.direct is not None for slot in unit.slots)]
        coefficient = self._coefficient()
        if self._scaling.needs_norm and waiting and coefficient is None:
            self.dropped_steps += 1
            for unit in waiting:
                found = [slot for slot in unit.slots if slot.direct is not None]
                self._forget(unit, found)
                _spend(found)
        else:
            for unit in waiting:
                self._hand_over(unit, hypers, coefficient)
        repeatable = self._foretold
        self._end_arrivals()
        self._unused = set(self._mailboxes)
        self._driver.end_step(repeatable=repeatable)

    def _coefficient(self) -> torch.Tensor | None:
        """What this step's gradients are multiplied by; None when nothing is to be done, or their norm is not
        finite."""
        if not self._scaling.needs_norm:
            return None
        others = self.other_gradients()
        norms = [(order, torch.linalg.vector_norm(other)) for order, other in others]
        norms += [(slot.order, gradient_norm(slot.direct)) for _, slot in self._slots if slot.direct is not None]
        if not norms:
            return None
        total = total_norm([norm for _, norm in sorted(norms, key=lambda pair: pair[0])])
        self.grad_norm = self._scaling.unscaled(total)
        coefficient = self._scaling.coefficient(total)
        if coefficient is not None:
            for other in [
                *(other for _, other in others),
                *(slot.own for _, slot in self._slots if slot.own is not None),
            ]:
                other.mul_(coefficient.to(other.device))
        return coefficient

    # ---- parameters --------------------------------------------------------------------------------------------

    def before_use(self, unit: Unit) -> None:
        """Before a unit's first use in a step: adopt its newest parameters, waiting while they are too old."""
        self._thread.check()
        if unit not in self._unused:
            return
        self._unused.discard(unit)
        mailbox = self._mailboxes[unit]
        allowed = self._allowed(unit)
        late = mailbox.clock.staleness > allowed
        if late:
            self._await(mailbox, mailbox.clock.produced - allowed)
        self._adopt(unit, "before", may=late or (unit.live_views == 0 and not unit.parameters.snapshot_pending))
        mailbox.missed, mailbox.may_miss = mailbox.clock.staleness, allowed > 0

    def _allowed(self, unit: Unit) -> int:
        """The steps that a unit's parameters may miss."""
        # Counts of steps are the updater's, and part of commits; one it is about to raise means one exact step more.
        young = max(slot.steps for slot in unit.slots) < self._exact_steps
        return 0 if young else self._max_staleness

    def settle(self, unit: Unit) -> None:
        """Before a use outside the step (evaluation, copies, edits): adopt all updates of the steps made."""
        self._thread.check()
        mailbox = self._mailboxes.get(unit)
        if mailbox is not None and mailbox.clock.staleness:
            self._await(mailbox, mailbox.clock.produced)
            self._adopt(unit, "settle")

    def drain(self) -> None:
        """Have every update of the steps made, in every unit."""
        for unit in self._mailboxes:
            self.settle(unit)

    @contextmanager
    def consistent(self, *, whole: bool) -> Iterator[None]:
        """Between two steps: inside the block every unit's parameters and states are of the same updates, and stay so.

        Not ``whole``: the updater rests between two units meanwhile, and gradients on their way are not applied before.
        Where no staleness is allowed it is always whole.
        """
        self._check_between_steps()
        if whole or not all(self._allowed(unit) for unit in self._mailboxes):
            self.drain()
            yield
            return
        with self._thread.paused():
            for unit, mailbox in self._mailboxes.items():
                if mailbox.unadopted() is not None:
                    with nullcontext() if unit.parameters.resident else self._driver.untraced():
                        self._adopt(unit, "commit")
            yield

    def _await(self, mailbox: UnitChannel, step: int) -> None:
        """Wait until the updates up to ``step`` are applied."""
        if mailbox.clock.applied >= step:
            return
        started_s = time.perf_counter()
        self._thread.want(mailbox)
        try:
            self._thread.await_progress(lambda: mailbox.clock.applied >= step)
        finally:
            self._thread.want(None)
        self._sink.emit(
            Event(EventKind.WAIT, f"update of {mailbox.unit.name}", 0, started_s, time.perf_counter() - started_s)
        )

    def _adopt(self, unit: Unit, when: str, *, may: bool = True) -> None:
        """Copy the newest published parameters, if they are newer and ``may`` be used now, into the unit's pages."""
        self._collect_freed()
        version = self._mailboxes[unit].unadopted() if may else None
        if unit.parameters.resident:
            if version is None:
                return
            self._driver.mover.make_writable(unit.parameters)
            self._copy_in(unit, version)
            self._driver.mover.touch(unit.parameters)
        elif version is not None or self._driver.mode is not Mode.PLANNED:
            # A step that is being traced has the op in any case: a later one may have something to adopt there.
            accesses = [Access(unit.parameters.id, AccessMode.MODIFY)]
            with self._driver.op((OpKind.UPDATE, (unit.index, "adopt", when)), f"adoption of {unit.name}", accesses):
                if version is not None:
                    self._copy_in(unit, version)
        if version is not None:
            self._adopted(unit, version)
            unit.ended |= when == "after"

    def _adopted(self, unit: Unit, version: Version) -> None:
        mailbox = self._mailboxes[unit]
        mailbox.clock.adopt(version.last)
        unit.version += 1
        # A version that was published meanwhile has the values that it did not replace: they go when it does.
        newest = mailbox.version
        kept = {} if newest is None or newest is version else newest.values
        self._free_bytes(sum(total.release() for slot, total in version.values.items() if kept.get(slot) is not total))

    def _adopt_in_passing(self) -> bool:
        """Adopt versions, for the bytes they hold, of units that lie in memory and whose values nobody is to see again;
        returns whether any.

        Which ones these are differs from step to step, so it is no op of the step: nothing is moved for it.
        """
        found = False
        for unit in self._units_to_adopt():
            with self._driver.in_passing(unit.parameters) as at_hand:
                version = self._mailboxes[unit].unadopted()
                if at_hand and version is not None:
                    self._copy_in(unit, version)
                    self._adopted(unit, version)
                    found = True
        return found

    def _units_to_adopt(self) -> list[Unit]:
        """Units with newer parameters than those in use, which nobody is to see again before their next first use."""
        return [
            unit for unit, mailbox in self._mailboxes.items()
            if mailbox.unadopted() is not None and unit.live_views == 0 and not self._driver.viewed(unit.parameters)
        ]  # fmt: skip

    def _unseen(self, unit: Unit) -> bool:
        """Whether nobody has a view of a unit's pages, or a commit that has yet to get what they hold."""
        return not unit.parameters.snapshot_pending and not self._driver.viewed(unit.parameters)

    def _copy_in(self, unit: Unit, version: Version) -> None:
        assert unit.parameters.frame is not None
        arena = self._driver.mover.arena
        for slot, total in version.values.items():
            view = arena.view(unit.parameters.frame, slot.offset * slot.dtype.itemsize, slot.dtype, slot.numel)
            view.copy_(total.flat)

    # ---- memory ------------------------------------------------------------------------------------------------

    def _take_bytes(self, n_bytes: int) -> None:
        """Have ``n_bytes`` of the reserved bytes; where they are used up, wait for the updater to give some back."""
        self._collect_freed()
        while self.direct_bytes + n_bytes > self._limit_bytes:
            published = sum(mailbox.clock.applied for mailbox in self._mailboxes.values())
            if self._adopt_in_passing():
                continue
            if not any(mailbox.clock.applied < mailbox.clock.produced for mailbox in self._mailboxes.values()):
                # The updater has nothing left to do: what is published and not in memory is all there is to give room.
                waiting = self._units_to_adopt()
                for unit in waiting:
                    self._adopt(unit, "short")
                if waiting:
                    continue
                raise BudgetError(
                    f"gradients on their way to the updater need {self.direct_bytes + n_bytes} bytes, the budget has "
                    f"{self._limit_bytes} for them; "
                    f"{START_HINT if self._eager else 'raise memory.ram by the difference'}",
                    self.direct_bytes + n_bytes,
                )
            started_s = time.perf_counter()
            self._thread.await_progress(
                lambda: sum(m.clock.applied for m in self._mailboxes.values()) > published  # noqa: B023 - asked at once
            )
            self._sink.emit(
                Event(EventKind.WAIT, "room for gradients", n_bytes, started_s, time.perf_counter() - started_s)
            )
            self._collect_freed()
        self._set_bytes(self.direct_bytes + n_bytes)

    def _collect_freed(self) -> None:
        for mailbox in self._mailboxes.values():
            while mailbox.freed_bytes:
                self._free_bytes(mailbox.freed_bytes.popleft())

    def _free_bytes(self, n_bytes: int) -> None:
        if n_bytes:
            self._set_bytes(self.direct_bytes - n_bytes)

    def _set_bytes(self, n_bytes: int) -> None:
        if isinstance(self._reservation.resize(n_bytes), BudgetShortage):
            raise AssertionError(f"{n_bytes} bytes of gradients do not fit in what was set aside, {self._limit_bytes}")
        self.direct_bytes = n_bytes
        self.peak_direct_bytes = max(self.peak_direct_bytes, n_bytes)

    def close(self) -> None:
        """End the updater, giving up updates not yet made, and give the reservation back. Idempotent."""
        self._thread.stop()
        for unit in self._mailboxes:
            for slot in unit.slots:
                slot.forget_gradient()
        self._reservation.end()
        self._scratch.end()


def _spend(slots: Sequence[Slot]) -> None:
    """Gradients were handed over, or dropped in place of that; the user's own tensors stay."""
    for slot in slots:
        if slot.own is None:
            slot.become(Grad.SPENT)


def _ahead_steps(mailbox: UnitChannel, hyper: Hyper) -> int:
    """How far ahead the parameters after this gradient are to be: as far as it was behind, and a step, where it may be
    behind.

    That step is what Nesterov's momentum looks ahead; it also makes up for a step that is missed now and then.
    """
    return mailbox.missed + (mailbox.may_miss and not hyper.get("nesterov", False))


def _is_finite(flat: torch.Tensor | None) -> bool:
    """Whether every element is; one pass in most cases, two when the sum alone overflows."""
    assert flat is not None
    return bool(torch.isfinite(flat.sum())) or bool(torch.isfinite(flat).all())
