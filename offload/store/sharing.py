"""Sharing the units of a model among ranks: which range each one updates, and which parameters it keeps.

Every rank builds the same model, and keeps of each unit what its degree says. Before the updater is made, and once.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from offload.config import Degree, ParallelConfig
from offload.parallel.sharding import cut_units
from offload.store.page_store import PageStore
from optim.layout import cut_shared
from optim.sharing import Sharing
from optim.unit import Unit
from pagemem.ranks.collectives import Collectives, ShardLayout
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.sources.source_files import Origin
from pagemem.tier import Tag
from scheduler.planning.trace import Access, AccessMode, OpKind


def degree_of(parallel: ParallelConfig, unit: Unit) -> Degree:
    """What of a unit is cut, by the first pattern that matches the name of one of its parameters."""
    for pattern, degree in parallel.degree_of.items():
        if any(fnmatchcase(slot.name, pattern) for slot in unit.slots):
            return degree
    return parallel.degree


def share_units(store: PageStore, collectives: Collectives) -> None:
    """Have this rank keep its part of each unit, which has the dtype that it was built in.

    Raises:
        BudgetError: the arena cannot hold a unit and this rank's part of it.
        RankError: ranks have built other units, or another rank failed.
    """
    parallel = store.config.parallel
    units = store.index.units
    shared = cut_units([unit.numel for unit in units], collectives.n_shards)
    for unit, ranges in zip(units, shared, strict=True):
        degree = degree_of(parallel, unit)
        floats = unit.dtype.is_floating_point
        dtype = (store.compute_dtype or unit.dtype) if floats else unit.dtype
        layout = ShardLayout(dtype, ranges if degree != "none" else ((0, unit.numel),))
        cuts_parameters = degree == "all" and len(layout.ranges) > 1
        sharing = Sharing(layout, collectives.shard_rank, cuts_parameters)
        if cuts_parameters:
            store.replace(unit, _own_part(store, unit, sharing))
        unit.sharing = sharing
        unit.slices = cut_shared(sharing, store.slice_numel)


def gather_units(store: PageStore) -> None:
    """Have compute use gathered parameters where ranks keep parts of them, which have the dtype of compute by now."""
    for unit in store.index.units:
        sharing = unit.sharing
        if sharing is not None and sharing.cuts_parameters:
            gathered = store.mover.gathered
            sharing.unsharded = gathered.add(unit.parameters, unit.name, Tag.PARAM, sharing.layout)
            store.binder.units[sharing.unsharded.id] = store.binder.units.pop(unit.parameters.id)


def _own_part(store: PageStore, unit: Unit, sharing: Sharing) -> PagedTensor:
    """A new paged tensor with the parameters of the own range, and room for the largest one."""
    wide, size, (begin, end) = unit.parameters, unit.dtype.itemsize, sharing.own
    made = store.mover.create(unit.name, Tag.PARAM, sharing.room_numel * size)
    if wide.state is Residency.ABSENT and wide.origin is None:
        return made
    if wide.origin is not None:
        pieces = wide.origin.part(begin * size, end * size)
        if pieces:
            store.mover.originate(made, Origin.of(pieces, made.n_bytes))
        return made
    accesses = [Access(wide.id, AccessMode.READ), Access(made.id, AccessMode.CREATE)]
    with store.driver.untraced(), store.driver.op((OpKind.FORWARD, ("share", unit.index)), unit.name, accesses):
        view = store.mover.tenants.view
        into = view(made, unit.dtype, 0, sharing.room_numel)
        torch.narrow(into, 0, 0, end - begin).copy_(view(wide, unit.dtype, begin, end - begin))
        into[end - begin :].zero_()
    return made
