"""Copies of a unit's parameters: fp32 masters (of units that compute in 16 bits, and of those that lock-free mode
updates beside what the schedule has), another dtype, another unit."""

from __future__ import annotations

from typing import Final

import torch

from optim.unit import Slice, Slot, Unit
from pagemem.residency.host_mover import HostMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.sources.source_files import Origin, converted
from pagemem.tier import Tag
from pagemem.units import BLOCK_BYTES, round_up
from scheduler.execution.driver import Driver
from scheduler.planning.trace import Access, AccessMode, OpKind

#: Elements that are copied from one unit to another at a time, through memory beside the budget.
_CHUNK_NUMEL: Final = 1 << 16


def add_masters(mover: HostMover, driver: Driver, unit: Unit) -> None:
    """Give a unit's slices fp32 masters with the values its parameters have. Outside steps.

    Raises:
        BudgetError: host memory cannot hold the unit and a master.
    """
    wide, view = unit.parameters, mover.tenants.view
    with driver.untraced():
        for number, part in enumerate(unit.slices):
            part.master = mover.create(f"master {number} of {unit.name}", Tag.MASTER, part.state_bytes)
            if wide.state is Residency.ABSENT or not part.numel:  # without values yet, and so is the master
                continue
            if _originated(mover, unit, part):
                continue
            accesses = [Access(wide.id, AccessMode.READ), Access(part.master.id, AccessMode.CREATE)]
            with driver.op((OpKind.FORWARD, ("master", unit.index, number)), unit.name, accesses):
                values = view(wide, unit.dtype, part.begin - unit.first, part.numel)
                view(part.master, torch.float32, 0, part.numel).copy_(values)
    for slot in unit.slots:
        slot.edited = False


def _originated(mover: HostMover, unit: Unit, part: Slice) -> bool:
    """Have a master's values come from the files that the parameters' do; returns whether they can, to the bit."""
    wide, dtype = unit.parameters, unit.dtype
    if wide.origin is None or part.master is None:
        return False
    begin, end = part.begin - unit.first, part.end - unit.first
    pieces = wide.origin.part(begin * dtype.itemsize, end * dtype.itemsize)
    if not pieces:
        return True  # a gap: zeros
    size_bytes = round_up(part.numel * dtype.itemsize, BLOCK_BYTES)
    origin = converted(Origin.of(pieces, size_bytes), torch.float32, part.master.n_bytes)
    if origin is not None:
        mover.originate(part.master, origin)
    return origin is not None


def narrow(mover: HostMover, driver: Driver, unit: Unit, dtype: torch.dtype) -> PagedTensor:
    """Copy a unit's parameters, rounded to a 16-bit ``dtype``, into a new paged tensor; returns it. The unit keeps the
    old one. What lies in files of others is not copied: it will be rounded when it is read.

    Raises:
        BudgetError: host memory cannot hold both.
    """
    wide, numel = unit.parameters, unit.kept_numel
    made = mover.create(unit.name, Tag.PARAM, numel * dtype.itemsize)
    if wide.state is Residency.ABSENT:
        return made
    if wide.origin is not None and (origin := converted(wide.origin, dtype, made.n_bytes)) is not None:
        mover.originate(made, origin)
        return made
    accesses = [Access(wide.id, AccessMode.READ), Access(made.id, AccessMode.CREATE)]
    with driver.untraced(), driver.op((OpKind.FORWARD, ("narrow", unit.index)), unit.name, accesses):
        mover.tenants.view(made, dtype, 0, numel).copy_(mover.tenants.view(wide, unit.dtype, 0, numel))
    return made


def copy_slot(mover: Mover, driver: Driver, source: Unit, slot: Slot, into: Unit, at: Slot) -> None:
    """Copy one parameter's values from a unit to another of the same dtype; neither needs room beside the other."""
    view = mover.tenants.view
    for begin in range(0, slot.numel, _CHUNK_NUMEL):
        numel = min(_CHUNK_NUMEL, slot.numel - begin)
        with driver.op(
            (OpKind.FORWARD, ("repack", source.index)), source.name, [Access(source.parameters.id, AccessMode.READ)]
        ):
            values = view(source.parameters, slot.dtype, slot.offset + begin, numel).clone()
        with driver.op(
            (OpKind.FORWARD, ("repack", into.index)), into.name, [Access(into.parameters.id, AccessMode.MODIFY)]
        ):
            view(into.parameters, at.dtype, at.offset + begin, numel).copy_(values)
