"""Masters: the fp32 values of units that compute in 16 bits, and of those that lock-free mode updates beside what the
schedule has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optim.unit import Unit
from pagemem.tier import Tag
from scheduler.planning.trace import Access, AccessMode, OpKind

if TYPE_CHECKING:
    from offload.store.page_store import PageStore


def add_masters(store: PageStore, unit: Unit) -> None:
    """Give a unit's slices fp32 masters with the values its parameters have. Outside steps."""
    wide, n_bytes = unit.parameters, unit.dtype.itemsize
    with store.driver.untraced():
        for number, part in enumerate(unit.slices):
            part.master = store.mover.create(f"master {number} of {unit.name}", Tag.MASTER, part.numel * 4)
            accesses = [Access(wide.id, AccessMode.READ), Access(part.master.id, AccessMode.CREATE)]
            with store.driver.op((OpKind.FORWARD, ("master", unit.index, number)), unit.name, accesses):
                assert wide.frame is not None and part.master.frame is not None
                values = store.mover.arena.view(wide.frame, part.begin * n_bytes, unit.dtype, part.numel)
                store.mover.arena.view(part.master.frame, 0, torch.float32, part.numel).copy_(values)
    for slot in unit.slots:
        slot.edited = False


def narrow(store: PageStore, unit: Unit) -> None:
    """Give a unit that computes in 16 bits its fp32 masters, with the values as they were built, and go on in them."""
    wide, dtype = unit.parameters, store.compute_dtype or unit.dtype
    if dtype is torch.float32:
        return
    add_masters(store, unit)
    if dtype is unit.dtype:
        return
    numel = unit.slices[-1].end
    made = store.mover.create(unit.name, Tag.PARAM, numel * dtype.itemsize)
    accesses = [Access(wide.id, AccessMode.READ), Access(made.id, AccessMode.CREATE)]
    with store.driver.op((OpKind.FORWARD, ("narrow", unit.index)), unit.name, accesses):
        assert wide.frame is not None and made.frame is not None
        arena = store.mover.arena
        arena.view(made.frame, 0, dtype, numel).copy_(arena.view(wide.frame, 0, unit.dtype, numel))
    store.driver.quiesce()
    del store.binder.units[wide.id]
    store.mover.forget(wide)
    unit.parameters, unit.dtype = made, dtype
    store.binder.units[made.id] = unit
    for slot in unit.slots:
        slot.dtype, slot.edited = dtype, False
