"""Where a step's gradients are kept between autograd and the update.

A gradient that is final on arrival is kept as autograd made it, flat, within a reserved number of bytes (`direct`); its
unit's update follows at once and frees it. Everything else (accumulation over several backward passes, clipping, which
must know all gradients first) is added up in a paged tensor of the unit's layout, in the order of arrival, as
``param.grad += gradient`` would. Sums are in host pages, but for units that have pages for them on a device. Training
thread only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from optim.gradient_budget import GradientBudget
from optim.layout import SLOT_ALIGN_NUMEL
from optim.scaling.clip import gradient_norm
from optim.unit import Grad, Piece, Slice, Slot, Unit, Whole, pieces_of
from pagemem.files.spilled import SpilledTensor
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag
from pagemem.units import round_up
from scheduler.execution.driver import Driver
from scheduler.planning.task import TaskKind
from scheduler.planning.trace import Access, AccessMode, OpKind

#: Told of tensors in host memory that an op has changed, once it is over.
Changed = Callable[[Sequence[PagedTensor]], None]


def flat_gradient(slot: Slot, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient as one flat tensor, without a copy where autograd made it contiguous.

    Raises:
        ValueError: the gradient is sparse; the message says what to change.
    """
    if gradient.layout is not torch.strided:
        raise ValueError(f"{slot.name}: its gradient is sparse, which pages cannot hold; use sparse=False")
    return gradient.detach().reshape(-1)


def _host_bytes(unit: Unit, gradient: torch.Tensor) -> int:
    """What of the host's budget a gradient takes as autograd made it."""
    return 0 if unit.device_resident else gradient.numel() * gradient.dtype.itemsize


class GradientStore:
    """Keeps the gradients of the step under way.

    Args:
        driver: gives pages.
        budget: of direct gradients; what does not fit goes to pages.
        changed: told of sums that were changed.
        spill_folder: where gradients of cut parameters are put together for their norm, beside the budget; None: in
            RAM.
    """

    def __init__(
        self, driver: Driver, budget: GradientBudget, changed: Changed, spill_folder: Path | None = None
    ) -> None:
        self._driver = driver
        self._budget = budget
        self._changed = changed
        self._spill_folder = spill_folder

    def keep(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> bool:
        """Keep a final gradient as it is; False when the reserved bytes do not suffice (then `add` it).

        That of a device-resident unit is on the device, among what autograd has, and not in the host's budget.
        """
        flat = flat_gradient(slot, gradient)
        while not self._budget.take(_host_bytes(unit, flat)):
            if not self._driver.updates.finish_oldest():  # whose gradients may be the room for it
                return False
        slot.direct = flat
        return True

    def add(self, unit: Unit, slot: Slot, gradient: torch.Tensor, after: Callable[[torch.Tensor], None]) -> None:
        """Add a gradient to the unit's paged sum; ``after`` is called with the flat sum while it is in host memory.

        Raises:
            BudgetError: no host pages for the unit's gradients; the sum is as it was before.
        """
        flat = flat_gradient(slot, gradient)
        kept = slot.direct
        if unit.gradients is None:
            n_bytes = round_up(max(1, unit.slots[-1].end), SLOT_ALIGN_NUMEL) * flat.dtype.itemsize
            unit.gradients = self._driver.mover.create(f"gradients of {unit.name}", Tag.GRAD, n_bytes)
        if unit.sharing is not None:
            self._driver.mover.end_expiry(unit.gradients)  # the last step's may still be summed
        begun = any(other.paged for other in unit.slots)
        mode = AccessMode.MODIFY if begun else AccessMode.CREATE
        key = (OpKind.GRADIENT, (unit.index, slot.order, slot.arrivals))
        with self._driver.op(key, f"gradient of {slot.name}", [Access(unit.gradients.id, mode)]):
            total = self.view(unit, slot)
            flat = flat.to(total.device)
            if slot.paged:
                total.add_(flat)
            elif kept is not None:
                # One more gradient than foretold: the sum moves to pages.
                torch.add(kept.to(total.device), flat, out=total)
            else:
                total.copy_(flat)
            after(total)
        slot.paged = True
        if kept is not None:
            slot.direct = None
            self._budget.release(_host_bytes(unit, kept))
        if not unit.sums_resident:
            self._changed([unit.gradients])

    def reduce(self, unit: Unit, divisor: int) -> None:
        """Begin to sum a unit's gradients of the step, which are all in pages, over all ranks. On all ranks.

        Args:
            divisor: of the sum.

        Raises:
            BudgetError: no host pages for both; nothing was begun. RankError: another rank failed.
        """
        sharing = unit.sharing
        assert sharing is not None and unit.gradients is not None
        if sharing.sums is None:
            name = f"summed gradients of {unit.name}"
            sharing.sums = self._driver.mover.create(name, Tag.GRAD, sharing.layout.shard_bytes)
        self._driver.mover.end_expiry(sharing.sums)
        accesses = [
            Access(unit.gradients.id, AccessMode.CONSUME),
            Access(sharing.sums.id, AccessMode.CREATE, via=TaskKind.REDUCE_SCATTER),
        ]
        parts = zlib.crc32(bytes(slot.paged for slot in unit.slots))
        with self._driver.op((OpKind.GRADIENT, (unit.index, "sum")), sharing.sums.name, accesses):
            whole = self._driver.mover.tenants.view(unit.gradients, unit.dtype, 0, unit.numel)
            self._driver.memories.reduce_scatter(
                whole, sharing.sums, sharing.layout, unit.gradients, parts=parts, divisor=divisor
            )
        sharing.reduced = True

    def piece(self, unit: Unit, piece: Piece) -> torch.Tensor:
        """The flat paged sum of a piece, over all ranks where they share the unit; its pages must be pinned."""
        sharing = unit.sharing
        if sharing is None:
            begin = piece.begin - piece.slot.offset
            return self.view(unit, piece.slot)[begin : begin + piece.numel]
        assert sharing.sums is not None and sharing.reduced
        return self._driver.mover.tenants.view(sharing.sums, unit.dtype, piece.begin - sharing.own[0], piece.numel)

    @contextmanager
    def pieces(self, unit: Unit) -> Iterator[Iterator[torch.Tensor]]:
        """Inside the block: the summed gradients of a shared unit's optimized parameters in the own range, in order."""
        assert unit.sharing is not None and unit.sharing.sums is not None
        key, access = (OpKind.GRADIENT, (unit.index, "norm")), Access(unit.sharing.sums.id, AccessMode.READ)
        with self._driver.op(key, unit.sharing.sums.name, [access]):
            yield (self.piece(unit, piece) for piece in pieces_of(unit, Slice(*unit.sharing.own)))

    def view(self, unit: Unit, slot: Slot) -> torch.Tensor:
        """The flat paged sum of one parameter; its pages must be pinned by the op under way."""
        assert unit.gradients is not None
        return self._driver.mover_of(unit.gradients).tenants.view(unit.gradients, slot.dtype, slot.offset, slot.numel)

    @contextmanager
    def values(self, unit: Unit, slot: Slot) -> Iterator[torch.Tensor]:
        """Inside the block: the flat gradient of one parameter; what is written to it is kept. A paged sum is an op of
        its own."""
        if slot.direct is not None:
            yield slot.direct
            return
        assert unit.gradients is not None
        key = (OpKind.GRADIENT, (unit.index, slot.order, "used"))
        with self._driver.op(key, f"gradient of {slot.name}", [Access(unit.gradients.id, AccessMode.READ)]):
            flat = self.view(unit, slot)
            before = flat._version
            try:
                yield flat
            finally:
                if flat._version != before:
                    self._driver.mover_of(unit.gradients).touch(unit.gradients)

    def scale(self, unit: Unit, slots: Sequence[Slot], coefficient: torch.Tensor) -> None:
        """Multiply gradients in place, the user's own tensors among them."""
        for slot in slots:
            if slot.own is not None:
                slot.own.mul_(coefficient.to(slot.own.device))
                continue
            with self.values(unit, slot) as flat:
                flat.mul_(coefficient.to(flat.device))
            slot.norm = None

    def norm(self, unit: Unit, slot: Slot) -> torch.Tensor | None:
        """2-norm of a gradient as it is now; None: there is none."""
        if slot.grad is Grad.ZEROS:
            return torch.zeros(())
        if slot.own is not None:
            return gradient_norm(slot.own.reshape(-1))
        if slot.grad is Grad.HELD and slot.norm is None:
            with self.values(unit, slot) as flat:
                slot.norm = gradient_norm(flat)
        return slot.norm if slot.grad is Grad.HELD else None

    def norm_of_whole(self, whole: Whole) -> torch.Tensor | None:
        """2-norm of the gradient of a cut parameter as it is now, in the arithmetic of one tensor; None: there is
        none."""
        places = [(unit, slot) for unit, slot in whole.places if slot.grad is not Grad.NONE]
        if not places:
            return None
        together, first = SpilledTensor(self._spill_folder, whole.shape, torch.float32), 0
        for unit, slot in whole.places:
            if slot.own is not None:
                together.put(first, slot.own.reshape(-1).float())
            elif slot.grad is Grad.HELD:
                with self.values(unit, slot) as flat:
                    if flat.is_meta:
                        return gradient_norm(flat)
                    together.put(first, flat.float())
            else:
                together.put(first, torch.zeros(()).expand(slot.numel))
            first += slot.numel
        return gradient_norm(together.tensor.view(-1))

    def forget(self, unit: Unit, slots: Sequence[Slot], *, consumed: bool = False) -> None:
        """Gradients of some of a unit's parameters are used up or thrown away.

        Args:
            consumed: whether an op has said so already; otherwise there is one here, where a plan has to reckon with
                it.
        """
        had_pages = any(slot.paged for slot in slots)
        for slot in slots:
            if slot.direct is not None:
                # A worker may have yet to use it.
                self._driver.updates.when_made(partial(self._budget.release, _host_bytes(unit, slot.direct)))
            slot.forget_gradient()
        sums = unit.gradients
        if unit.sharing is not None and unit.sharing.reduced:
            sums = unit.sharing.sums
        if had_pages and sums is not None and not unit.sums_resident and not any(slot.paged for slot in unit.slots):
            if unit.sharing is not None:
                unit.sharing.reduced = False
            if not consumed:
                key = (OpKind.GRADIENT, (unit.index, "cleared"))
                with self._driver.op(key, f"gradients of {unit.name}", [Access(sums.id, AccessMode.DISCARD)]):
                    pass
            self._driver.memories.consume(sums)
