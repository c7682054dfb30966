"""Going on from a commit of other ranks: every tensor of this process is filled with its elements of each parameter,
one after the other, so that nothing but a tensor and some chunks of the page files are in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from offload.commits.stored_values import MASTER, VALUES, StoredValues
from offload.store.page_store import PageStore
from optim.unit import Unit
from pagemem.residency.paged_tensor import PagedTensor
from scheduler.planning.trace import Access, AccessMode, OpKind


def import_values(store: PageStore, values: StoredValues, n_states: int) -> None:
    """Fill all tensors of a store. Between two steps; nobody has a view of any.

    Args:
        n_states: optimizer states of each element.

    Raises:
        CommitError, StorageError, BudgetError: a value is not there, cannot be read, or has no room. Some tensors have
            the commit's values then, and others not.
    """
    for unit in store.index.units:
        for tensor, what, first, begin, end in _tensors_of(unit, n_states):
            if what < 0 or any(values.has(slot.whole_name, state) for slot in unit.slots for state in range(n_states)):
                _fill(store, unit, values, (tensor, what, first, begin, end), n_states)
        unit.version += 1
        store.updated(unit)


#: A tensor, what it holds, the unit's element that it begins with, and the elements of the unit that it is to have.
_Place = tuple[PagedTensor, int, int, int, int]


def _tensors_of(unit: Unit, n_states: int) -> Iterator[_Place]:
    first = unit.first
    kept = unit.sharing.own if unit.sharing is not None and unit.sharing.cuts_parameters else (0, unit.numel)
    yield unit.parameters, VALUES, first, *kept
    for part in unit.slices:
        if part.master is not None:
            yield part.master, MASTER, part.begin, part.begin, part.end
        if part.states is not None and n_states:
            yield part.states, 0, part.begin, part.begin, part.end


def _fill(store: PageStore, unit: Unit, values: StoredValues, place: _Place, n_states: int) -> None:
    tensor, what, first, begin, end = place
    dtype = unit.dtype if what == VALUES else torch.float32
    key = OpKind.FORWARD, ("import", unit.index, what, begin)
    with store.driver.op(key, tensor.name, [Access(tensor.id, AccessMode.CREATE)]):
        store.mover.tenants.bytes_of(tensor).zero_()
        for state in range(n_states) if what >= 0 else [what]:
            at = max(state, 0) * (end - begin) + begin - first
            flat = store.mover.tenants.view(tensor, dtype, at, end - begin)
            _fill_slots(unit, values, state, begin, flat)


def _fill_slots(unit: Unit, values: StoredValues, what: int, begin: int, flat: Tensor) -> None:
    """Fill elements of a unit from ``begin`` on."""
    end = begin + flat.numel()
    for slot in unit.slots:
        low, high = max(begin, slot.offset), min(end, slot.end)
        if low < high:
            first = slot.first + low - slot.offset
            values.read(slot.whole_name, what, first, flat[low - begin : high - begin])
