"""Optimizer states as torch names them, gathered from and spread over the slices they live in.

Used for state_dict and its inverse, and for the fp32 masters of 16-bit parameters. Slow and complete: every tensor it
returns is an ordinary one. Training thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from optim.unit import Slice, Slot, Unit
from pagemem.files.spilled import SpilledTensor
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag
from scheduler.execution.driver import Driver
from scheduler.planning.trace import Access, AccessMode, OpKind


def state_view(mover: Mover, part: Slice, tensor: PagedTensor, number: int, begin: int, numel: int) -> torch.Tensor:
    """Elements [begin, begin + numel) of the ``number``-th fp32 state in a slice; its pages must be pinned."""
    return mover.tenants.view(tensor, torch.float32, number * part.numel + begin - part.begin, numel)


#: Unit and slot of a parameter, or of each of its slices in order.
Places = Sequence[tuple[Unit, Slot]]


def _numbered(places: Places) -> Iterator[tuple[int, Unit, Slot]]:
    """First element of the parameter, unit and slot of each place."""
    first = 0
    for unit, slot in places:
        yield first, unit, slot
        first += slot.numel


def _put(whole: SpilledTensor, first: int, view: torch.Tensor, begin: int) -> None:
    whole.put(first + begin, view)


def _get(flat: torch.Tensor, first: int, view: torch.Tensor, begin: int) -> None:
    view.copy_(flat[first + begin : first + begin + view.numel()])


def _check_unshared(places: Places) -> None:
    for unit, slot in places:
        if unit.sharing is not None:
            raise RuntimeError(f"{slot.name}: with several ranks no rank has its optimizer states, only parts of them")


class StateAccess:
    """Reads and writes whole per-parameter states (exp_avg, ..., master) of units through their slices.

    Args:
        driver: gives pages.
        spill_folder: where the files of large states that are read are, beside the budget; None: they are in RAM.
    """

    def __init__(self, driver: Driver, state_names: tuple[str, ...], spill_folder: Path | None = None) -> None:
        self._driver = driver
        self.state_names = state_names
        self._spill_folder = spill_folder

    def create(self, unit: Unit) -> None:
        """Give every slice of a unit its states, which read as zeros and hold no bytes yet."""
        for number, part in enumerate(unit.slices):
            if self.state_names and part.states is None:
                n_bytes = len(self.state_names) * part.state_bytes
                part.states = self._driver.mover.create(f"states {number} of {unit.name}", Tag.MOMENT, n_bytes)

    def read(self, places: Places, shape: torch.Size, number: int) -> torch.Tensor:
        """A new fp32 tensor, shaped like a parameter, with its ``number``-th state.

        Args:
            places: unit and slot of the parameter, or of each of its slices.

        Raises:
            DiskFullError, StorageError: there is no room for it, or a page file failed.
            RuntimeError: ranks have parts of it.
        """
        _check_unshared(places)
        whole = SpilledTensor(self._spill_folder, shape, torch.float32)
        for first, unit, slot in _numbered(places):
            self._visit(unit, slot, AccessMode.READ, number, partial(_put, whole, first))
        return whole.tensor

    def write(self, places: Places, shape: torch.Size, number: int, value: torch.Tensor) -> None:
        """Set the ``number``-th state of a parameter, to one value where that has no dimensions.

        Args:
            places: as for `read`.

        Raises:
            ValueError: the value has another shape. RuntimeError: ranks have parts of it. Nothing was changed.
        """
        _check_unshared(places)
        if value.ndim and value.shape != shape:
            name = places[0][1].name
            raise ValueError(f"{name}: a state of shape {tuple(value.shape)} for a parameter of {tuple(shape)}")
        flat = value.reshape(-1) if value.ndim else value.expand(shape.numel())
        for first, unit, slot in _numbered(places):
            self._visit(unit, slot, AccessMode.MODIFY, number, partial(_get, flat, first))

    def follow_edits(self, unit: Unit) -> None:
        """Take values that were put into parameters over into their masters; 16-bit ones keep what rounding hides
        elsewhere."""
        for slot in unit.slots:
            edited, slot.edited = slot.edited, False
            if edited:
                slot.lookahead = ()  # What was put in is meant as it is: no update may move it back first.
            for index, part in enumerate(unit.slices):
                begin, end = max(slot.offset, part.begin), min(slot.end, part.end)
                if not edited or begin >= end or part.master is None:
                    continue
                key = (OpKind.UPDATE, (unit.index, index, "edit", slot.order))
                accesses = [Access(unit.parameters.id, AccessMode.READ), Access(part.master.id, AccessMode.MODIFY)]
                mover = self._driver.mover_of(unit.parameters)
                with self._driver.op(key, f"master of {slot.name}", accesses):
                    value = mover.tenants.view(unit.parameters, unit.dtype, begin - unit.first, end - begin)
                    master = state_view(mover, part, part.master, 0, begin, end - begin)
                    master.copy_(torch.where(master.to(unit.dtype) == value, master, value.float()))

    def _visit(
        self, unit: Unit, slot: Slot, mode: AccessMode, number: int | None, visit: Callable[[torch.Tensor, int], object]
    ) -> None:
        for index, part in enumerate(unit.slices):
            begin, end = max(slot.offset, part.begin), min(slot.end, part.end)
            tensor = part.master if number is None else part.states
            if begin >= end or tensor is None:
                continue
            key = (OpKind.UPDATE, (unit.index, index, "state", number, slot.order))
            with self._driver.op(key, f"states of {slot.name}", [Access(tensor.id, mode)]):
                visit(
                    state_view(self._driver.mover_of(tensor), part, tensor, number or 0, begin, end - begin),
                    begin - slot.offset,
                )
