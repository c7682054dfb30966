"""Makes units: of parameters with values, of those in other units, and of those on meta, whose values lie in files of
others or are nowhere yet.

Where all of a unit's values lie in files, or are nowhere, nothing is read and nothing is written: its pages have these
files for their origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import nn

from offload.budget.need import check_built
from offload.config import Config
from offload.cutting.cut_parameter import CutParameter
from offload.parameters.binder import Binder
from offload.parameters.grouping import Group
from offload.parameters.paged_parameter import PagedParameter
from offload.store.masters import copy_slot
from optim.layout import cut, lay_out
from optim.unit import Slot, Unit, UnitIndex
from pagemem.residency.host_mover import HostMover
from pagemem.sources.source_files import Origin, SourcePiece
from pagemem.sources.source_transfers import SourceFiles
from pagemem.tier import Tag
from scheduler.execution.driver import Driver
from scheduler.planning.trace import Access, AccessMode, OpKind

#: Where values of parameters on meta lie; ``at_bytes`` of a piece counts from the parameter's first byte.
Sources = Mapping[nn.Parameter, Sequence[SourcePiece]]
NO_SOURCES: Final[Sources] = {}


@dataclass(frozen=True, slots=True)
class UnitMaker:
    """Makes units of one store. Training thread only.

    Args:
        device: where parameters that have values are built; "meta" in a rehearsal, where none has any.
    """

    config: Config
    page_bytes: int
    slice_numel: int
    mover: HostMover
    driver: Driver
    binder: Binder
    index: UnitIndex
    files: SourceFiles
    device: str

    def make(self, named: Group, sources: Sources = NO_SOURCES) -> tuple[Unit, list[Unit]]:
        """Make a unit of parameters, which are ordinary, on meta, or in other units; returns it, and whose those were.

        Args:
            sources: where the values of those on meta are; those not in it have none until they are written whole.

        Raises:
            BudgetError: the arena cannot hold the unit. StorageError: a file cannot be opened, or is not as it was.
            ValueError: pieces do not fit a parameter; names it. The parameters are as they were.
        """
        dtype = named[0][1].dtype
        check_built(named, self.config, self.page_bytes)
        layout = lay_out([(name, parameter.shape) for name, parameter in named])
        tensor = self.mover.create(named[0][0], Tag.PARAM, layout.numel * dtype.itemsize)
        slots = [Slot(name, shape, dtype, offset) for name, shape, offset in layout.slots]
        unit = Unit(len(self.index.units), named[0][0], dtype, tensor, slots, cut(layout.numel, self.slice_numel))
        pairs = [(parameter, slot) for (_, parameter), slot in zip(named, slots, strict=True)]
        pieces = [self._pieces_of(parameter, slot, sources) for parameter, slot in pairs]
        in_files = [piece for found in pieces if found is not None for piece in found]
        if None in pieces:
            self._fill(unit, pairs, pieces)
        elif in_files:
            self.mover.originate(tensor, Origin.of(in_files, tensor.n_bytes))
        without = self.binder.without_values
        for (parameter, slot), found in zip(pairs, pieces, strict=True):
            has_values = isinstance(parameter, PagedParameter) and parameter._place.slot not in without
            if found == [] and slot.numel and not has_values:
                without.add(slot)
        self.index.units.append(unit)
        self.binder.units[unit.compute.id] = unit
        owners = [parameter._place.unit for parameter, _ in pairs if isinstance(parameter, PagedParameter)]
        for parameter, slot in pairs:
            self.binder.adopt(parameter, unit, slot)
        return unit, owners

    def _pieces_of(self, parameter: nn.Parameter, slot: Slot, sources: Sources) -> list[SourcePiece] | None:
        """Which values of files belong where in the unit, none for a parameter without values; None: its values are
        elsewhere."""
        if isinstance(parameter, PagedParameter):
            place = parameter._place
            origin = place.unit.parameters.origin
            if place.slot in self.binder.without_values:
                return []
            if origin is None:
                return None
            size = slot.dtype.itemsize
            return [p.moved(slot.offset * size) for p in origin.part(place.slot.offset * size, place.slot.end * size)]
        if parameter.device.type != "meta" or self.device == "meta":
            return None
        return pieces_in_unit(parameter, slot, sources.get(parameter, ()))

    def _fill(
        self,
        unit: Unit,
        pairs: Sequence[tuple[nn.Parameter, Slot]],
        pieces: Sequence[Sequence[SourcePiece] | None],
    ) -> None:
        """Put the values of parameters that are not all in files into a unit's pages."""
        tensor, mover = unit.parameters, self.mover
        accesses = [Access(tensor.id, AccessMode.CREATE)]
        with self.driver.untraced():
            with self.driver.op((OpKind.FORWARD, ("place", unit.index)), unit.name, accesses):
                assert tensor.frame is not None
                flat = mover.arena.view(tensor.frame, 0, unit.dtype, unit.numel)
                flat.zero_()
                for (parameter, slot), found in zip(pairs, pieces, strict=True):
                    if found:
                        into = np.frombuffer(mover.arena.buffer(tensor.frame, tensor.n_bytes), dtype=np.uint8)
                        self.files.reader.fill(found, into)
                    elif found is None and not isinstance(parameter, PagedParameter):
                        flat[slot.offset : slot.end].copy_(parameter.detach().reshape(-1))
            for (parameter, slot), found in zip(pairs, pieces, strict=True):
                if found is None and isinstance(parameter, PagedParameter):
                    copy_slot(mover, self.driver, parameter._place.unit, parameter._place.slot, unit, slot)


def of_slices(sources: Sources) -> Sources:
    """Where the values of parameters lie, with those of cut ones for each of their slices."""
    if not any(isinstance(parameter, CutParameter) for parameter in sources):
        return sources
    found: dict[nn.Parameter, Sequence[SourcePiece]] = {}
    for parameter, pieces in sources.items():
        if not isinstance(parameter, CutParameter):
            found[parameter] = pieces
            continue
        size = parameter.element_size()
        origin, begin = Origin.of(pieces, parameter.numel() * size), 0
        for part in parameter.slices:
            end = begin + part.numel() * size
            found[part] = origin.part(begin, end)
            begin = end
    return found


def pieces_in_unit(parameter: nn.Parameter, slot: Slot, pieces: Sequence[SourcePiece]) -> list[SourcePiece]:
    """Pieces whose places count from a parameter's first byte, counted from that of its unit.

    Raises:
        ValueError: they are not all values of the parameter, in its dtype; names it.
    """
    numel = sum(piece.numel for piece in pieces)
    if pieces and (numel != slot.numel or any(piece.dtype is not slot.dtype for piece in pieces)):
        dtypes = ", ".join(sorted({str(piece.dtype) for piece in pieces}))
        raise ValueError(
            f"{slot.name} of shape {tuple(parameter.shape)} and {parameter.dtype} is given {numel} values of {dtypes}"
        )
    return [piece.moved(slot.offset * slot.dtype.itemsize) for piece in pieces]
