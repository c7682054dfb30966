"""Brings the units of a model to those that its finished modules make, however it was built.

While a model is built nobody knows which parameters it will keep, tie or replace, and in which order its modules will
stand. Units are made then of what is there. Once the model is whole, those of them that differ from the units of the
finished model are made anew from their pages. So a model has the same units, and needs the same budget, whether it was
built plainly or under `deferred_init`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

from offload.parameters.grouping import Group, groups_of, units_of
from offload.parameters.paged_parameter import PagedParameter
from optim.unit import Slot, Unit
from scheduler.planning.trace import Access, AccessMode, OpKind

if TYPE_CHECKING:
    from offload.store.page_store import PageStore

#: Elements that are copied from one unit to another at a time, through memory beside the budget.
CHUNK_NUMEL: Final = 1 << 16


def repack(store: PageStore, model: nn.Module) -> None:
    """Have exactly the units of ``model``, in its order; all other pages are given back.

    Raises:
        BudgetError: the arena cannot hold a unit; what was paged still is.
    """
    store.flush()
    wanted = units_of(groups_of(model.named_modules(), set()), store.page_bytes)
    left = Counter(
        parameter._place.unit for group in wanted for _, parameter in group if isinstance(parameter, PagedParameter)
    )
    for unit in [unit for unit in store.index.units if unit not in left]:
        store.forget(unit)
    units: list[Unit] = []
    for group in wanted:
        kept = _unit_of(group)
        if kept is not None:
            units.append(kept)
            continue
        made, sources = store.make_unit(group)
        units.append(made)
        left.subtract(sources)
        for source in dict.fromkeys(sources):
            if not left[source]:
                store.forget(source)
    store.index.units = units
    for index, unit in enumerate(units):
        unit.index = index


def _unit_of(group: Group) -> Unit | None:
    """The unit that has exactly the parameters of ``group``, in order; None where there is none."""
    places = [parameter._place for _, parameter in group if isinstance(parameter, PagedParameter)]
    if len(places) < len(group):
        return None
    unit = places[0].unit
    same = [place.slot for place in places] == unit.slots and all(place.unit is unit for place in places)
    return unit if same else None


def copy_slot(store: PageStore, source: Unit, slot: Slot, into: Unit, at: Slot) -> None:
    """Copy one parameter's values from a unit to another of the same dtype; neither needs room beside the other."""
    size, arena = slot.dtype.itemsize, store.mover.arena
    for begin in range(0, slot.numel, CHUNK_NUMEL):
        numel = min(CHUNK_NUMEL, slot.numel - begin)
        with store.driver.op(
            (OpKind.FORWARD, ("repack", source.index)), source.name, [Access(source.parameters.id, AccessMode.READ)]
        ):
            assert source.parameters.frame is not None
            values: Tensor = arena.view(
                source.parameters.frame, (slot.offset + begin) * size, slot.dtype, numel
            ).clone()
        with store.driver.op(
            (OpKind.FORWARD, ("repack", into.index)), into.name, [Access(into.parameters.id, AccessMode.MODIFY)]
        ):
            assert into.parameters.frame is not None
            arena.view(into.parameters.frame, (at.offset + begin) * size, at.dtype, numel).copy_(values)
