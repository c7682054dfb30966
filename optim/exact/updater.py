"""Exact updates: the same bits as plain PyTorch, made as early as that allows.

A unit is updated when its last gradient of the step has arrived, which the steps before foretell (`eager`), or,
with clipping or ``start="step"``, after the optimizer step and before the unit is next used (`pending`). What that
means for those who look at gradients is in `optim.updater`. All is decided on the training thread. The arithmetic is a
worker's where there is one (`scheduler.tiers.update_lane`), as where compute is a device; on a machine whose cores are
all computing, a second thread takes cores from the matrix products (see docs/exact_updates.md).

Per unit and step:   waiting --gradients--> updated --optimizer step--> waiting           (eager)
                     waiting --gradients, optimizer step--> pending --use--> waiting      (otherwise)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar, Literal

import torch

from optim.exact.bound_unit import BoundUnit, Hook
from optim.exact.bound_updates import BoundUpdates
from optim.exact.gradient_store import GradientStore
from optim.exact.norms import GradientNorms
from optim.exact.rank_sums import RankSums
from optim.exact.unit_update import UnitUpdate
from optim.gradient_budget import GradientBudget
from optim.gradient_downloads import GradientDownloadQueue
from optim.rules import UpdateRule
from optim.scaling.clip import check_finite, gradient_norm
from optim.scaling.loss_scale import Scaling
from optim.training import Training
from optim.unit import Grad, Pending, Slot, Unit
from optim.updater import Updater
from pagemem.process.closing import close_all
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.residency.write_behind import WriteBehind
from scheduler.execution.plan_follower import Mode

Start = Literal["auto", "step"]


def is_eager(scaling: Scaling, start: Start) -> bool:
    """Whether units are updated during the backward pass, as soon as their gradients are complete."""
    return start == "auto" and not scaling.needs_norm


class ExactUpdater(Updater):
    """Takes gradients and applies updates to the units of one model.

    Args:
        training: what is trained, and how.
        rule: what an update does.
        budget: of gradients that are kept as autograd made them.
        updated: told of each unit whose parameters were updated.
        downloads: queue of gradients on their way from a device; None where gradients are in host memory.
        spill_folder: as for `GradientStore`.

    Attributes:
        bound: updates of units that are bound between uses.
    """

    #: Gradients of parameters that are not optimized are kept in pages, too.
    keeps_unoptimized: ClassVar[bool] = True

    def __init__(
        self,
        training: Training,
        rule: UpdateRule,
        budget: GradientBudget,
        updated: Callable[[Unit], None],
        downloads: GradientDownloadQueue | None = None,
        spill_folder: Path | None = None,
    ) -> None:
        super().__init__(training, budget, downloads)
        self._behind = WriteBehind(training.driver.mover)
        self._store = GradientStore(training.driver, budget, self._changed, spill_folder)
        self._update = UnitUpdate(training.driver, rule, self._store, training.sink, updated, self._changed)
        self._ranks = None
        if training.collectives is not None:
            self._ranks = RankSums(self._store, training.collectives, self._update_shared)
        self._norms = GradientNorms(training, self._store, self._ranks)
        self.bound = BoundUpdates(
            training.driver.mover, rule, budget, self._use_hypers, self.gradient, updated, self._viewed,
            self._update.whole, training.sink,
        )  # fmt: skip

    # ---- bound units -------------------------------------------------------------------------------------------

    def may_bind(self, unit: Unit) -> bool:
        """Whether a unit's parameters may be bound between uses, of which nobody would tell."""
        free = self._downloads is None and not self._driver.updates.beside
        return free and not unit.device_resident and unit.pending is None

    def admit(self, unit: Unit, bound: BoundUnit) -> list[Hook] | None:
        """Between two steps: have a bound unit, whose states stay in memory too, be updated without its pages being
        asked for: one of which every gradient is foretold to be the only one of its step.

        Returns:
            A hook for each of its parameters, in the place of ours; None: it is like any other unit.
        """
        slots = [slot for slot in unit.slots if slot.group >= 0]
        single = self._arrivals.foretold and all(slot.expected in (0, 1) for slot in slots)
        fresh = all(slot.grad in (Grad.NONE, Grad.SPENT) and not slot.arrivals for slot in unit.slots)
        if not (self._eager and single and fresh and any(slot.expected for slot in slots)):
            return None
        edited = any(slot.edited for slot in unit.slots) and any(part.master is not None for part in unit.slices)
        if edited or unit.touched or unit.pending is not None or bound.aliased or unit.live_views:
            return None
        return self.bound.admit(unit, bound)

    def catch_up(self, unit: Unit | None) -> None:
        """As `Updater.catch_up`; a bound unit whose gradients are looked at is like any other from then on."""
        super().catch_up(unit)
        if unit is not None:
            self.bound.leave(unit)

    def close(self) -> None:
        """As `Updater.close`."""
        close_all(self._driver.updates.close, self.bound.close, super().close)

    @property
    def step_under_way(self) -> bool:
        """As `Updater.step_under_way`."""
        return super().step_under_way or self.bound.under_way

    def clear(self, *, zeros: bool = False) -> None:
        """As `Updater.clear`."""
        if zeros:
            self.bound.leave_all()
        super().clear(zeros=zeros)
        self.bound.clear()

    def _changed(self, tensors: Sequence[PagedTensor]) -> None:
        # A plan says itself when what was changed is stored.
        if self._driver.follower.mode is Mode.ON_DEMAND:
            self._behind.changed(tensors)

    # ---- gradients ---------------------------------------------------------------------------------------------

    def _take(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        self.bound.leave(unit)
        self._make_pending(unit)
        if not self._arrivals.count(unit, slot, gradient):
            return
        final = self._arrivals.is_final(slot)

        def note_norm(flat: torch.Tensor) -> None:
            asked = final and self._training.scaling.needs_norm and slot.whole is None and not self._training.blocks
            slot.norm = gradient_norm(flat) if asked else None

        if not (final and self._uses_in_place(unit, slot) and self._store.keep(unit, slot, gradient)):
            self._store.add(unit, slot, gradient, note_norm)
        slot.become(Grad.HELD)
        self._complete(unit)

    def _complete(self, unit: Unit) -> None:
        if self._eager and self._arrivals.complete(unit) and not self._viewed(unit):
            hypers = self._use_hypers()
            used = [slot for slot in unit.slots if slot.group >= 0 and slot.grad is Grad.HELD]
            if self._ranks is not None:
                self._ranks.update(unit, Pending(hypers, None), divides=not self._divided)
            elif self._may_apply(unit, used):
                self._update.run(unit, Pending(hypers, None), spent=used)
            unit.updated = unit.ended = True
            if unit.bound is not None:
                unit.bound.make_asked()

    def _update_shared(self, unit: Unit, pending: Pending) -> None:
        """Update a unit whose gradients are summed; they are of no use after that."""
        self._update.run(unit, pending, spent=[slot for slot in unit.slots if slot.has_bytes], beside=False)

    def _may_apply(self, unit: Unit, found: Sequence[Slot]) -> bool:
        """Whether the gradients of a unit, which are all there, may be applied; those that may not are dropped here."""
        return True

    def _viewed(self, unit: Unit) -> bool:
        """Whether somebody has a view of what an update would change: the backward pass may ask for it again."""
        if unit.device is not None and not unit.device_resident:
            return False  # Compute has a copy, which is not changed.
        if unit.bound is not None:
            return unit.bound.aliased or self._driver.viewed(unit.compute, beside=len(unit.slots))
        return self._driver.viewed(unit.compute)

    def _forget(self, unit: Unit, slots: Sequence[Slot]) -> None:
        # What only a first step leaves to be cleared is not part of the plan of later ones.
        once = self._eager and not unit.touched and not any(slot.arrivals for slot in slots)
        with self._driver.untraced() if once else nullcontext():
            self._store.forget(unit, slots)

    def _before_look(self, unit: Unit) -> None:
        self._make_pending(unit)

    def _make_zeros(self, unit: Unit, slot: Slot) -> None:
        self._store.add(unit, slot, torch.zeros(slot.shape, dtype=slot.dtype), lambda flat: None)
        slot.become(Grad.HELD)

    def _bytes(self, unit: Unit, slot: Slot) -> AbstractContextManager[torch.Tensor]:
        return self._store.values(unit, slot)

    # ---- the optimizer step ------------------------------------------------------------------------------------

    def step(self) -> None:
        """End the step: decide on the updates not yet made. They run now, or before their unit is next used.

        With loss scaling, a step whose gradients are not finite is dropped whole. Gradients stay what they are,
        clipped, until they are cleared, but for those that updates have used up already.

        Raises:
            RuntimeError: hyper-parameters changed after updates of this step had used them, or gradients that were used
                up have not been cleared.
            NonFiniteError: without loss scaling, the gradients' norm is not finite; no parameter was changed and the
                gradients are dropped.
        """
        self.catch_up(None)
        if self._downloads is not None:
            self._downloads.end_step()
        self._finish_sums()
        self._update.check_whole()
        self.bound.leave_unfinished()
        hypers = self._begin_step()
        for unit in self._index.units:
            if any(slot.grad is not Grad.NONE for slot in unit.slots):
                self._make_pending(unit)  # What was not cleared is used again.
        for unit, slot in self._slots:
            if slot.grad is Grad.ZEROS:
                self._make_zeros(unit, slot)
        self._fill_wholes()
        waiting = [
            u for u in self._index.units if any(s.group >= 0 and s.grad in (Grad.HELD, Grad.OWN) for s in u.slots)
        ]
        coefficient = self._coefficient(waiting) if self._training.scaling.needs_norm else None
        if self._training.scaling.needs_norm and waiting and coefficient is None:
            self.dropped_steps += 1
        else:
            self._decide_all(waiting, Pending(hypers, coefficient))
        self._finish_sums()
        self._end_step()

    def _fill_wholes(self) -> None:
        """Where some slices of a cut parameter have a gradient, those of the others are zeros, as those rows of the
        whole would be (experts that no token went to)."""
        wholes = dict.fromkeys(slot.whole for _, slot in self._slots if slot.whole is not None)
        for whole in wholes:
            if any(slot.grad is not Grad.NONE for _, slot in whole.places):
                for unit, slot in whole.places:
                    if slot.grad is Grad.NONE:
                        self._make_zeros(unit, slot)

    def _decide_all(self, units: Iterable[Unit], pending: Pending) -> None:
        for unit in units:
            found = [slot for slot in unit.slots if slot.group >= 0 and slot.grad in (Grad.HELD, Grad.OWN)]
            if self._may_apply(unit, found):
                self._decide(unit, pending)

    def _decide(self, unit: Unit, pending: Pending) -> None:
        """Make an update now where its gradients or its values are looked at, else before the unit is next used."""
        if self._ranks is not None and unit.sharing is not None:
            if unit.sharing.reduced:
                self._update_shared(unit, pending)
            else:
                self._ranks.update(unit, pending, divides=not self._divided)
        elif any(slot.own is not None for slot in unit.slots) or self._viewed(unit):
            # Now, while the user's tensors are what they are, and for views to show it.
            self._update.run(unit, pending, spent=(), beside=False)
        elif self._eager and not unit.touched:
            # Whether gradients are looked at after the step, the first one shows.
            spent = [s for s in unit.slots if s.group >= 0 and s.has_bytes] if self._arrivals.foretold else []
            self._update.run(unit, pending, spent=spent)
        elif unit.bound is not None:
            self._update.run(unit, pending, spent=(), beside=False)  # Nobody may tell of its next use.
        else:
            unit.pending = pending

    def abandon(self) -> None:
        """As `Updater.abandon`.

        Raises:
            RuntimeError: an update was cut off half-way.
        """
        if self._downloads is not None:
            self._downloads.drop()
        self._finish_sums()
        self._driver.updates.finish()
        self._update.check_whole()
        self.bound.clear()
        super().abandon()

    def _note_norm(self, total: torch.Tensor) -> None:
        super()._note_norm(total)
        if self._training.scaling.loss_scale is None:
            try:
                check_finite(total)
            except BaseException:
                self.clear()
                raise

    def _finish_sums(self) -> None:
        if self._ranks is not None:
            self._ranks.finish()

    def _coefficient(self, waiting: Sequence[Unit]) -> torch.Tensor | None:
        """As `GradientNorms.coefficient`."""
        return self._norms.coefficient(waiting, self._note_norm, divides=not self._divided)

    # ---- updates -----------------------------------------------------------------------------------------------

    def before_use(self, unit: Unit) -> None:
        """Make the update that the last optimizer step decided on, if there is one."""
        if self._downloads is not None:
            self.catch_up(unit)
        self._make_pending(unit)

    def drain(self) -> None:
        """As `Updater.drain`."""
        super().drain()
        self._driver.updates.finish()

    def settle(self, unit: Unit) -> None:
        """Before a use outside the step: as before any other."""
        self.before_use(unit)

    def _make_pending(self, unit: Unit) -> None:
        if unit.pending is not None:
            self._update.check_whole()
            cleared = [slot for slot in unit.slots if slot.has_bytes and slot.grad in (Grad.NONE, Grad.ZEROS)]
            self._update.run(unit, unit.pending, spent=cleared)

    @contextmanager
    def consistent(self, *, whole: bool) -> Iterator[None]:
        """Between two steps: inside the block every update of the steps made is in parameters and states."""
        self.catch_up(None)
        self._driver.updates.finish()
        self._update.check_whole()
        self._arrivals.check_between_steps()
        self.drain()
        self._update.check_whole()
        yield
