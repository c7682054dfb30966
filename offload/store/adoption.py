"""A store takes a finished model over, and gives it back.

While a model is built it is not known which parameters it will keep, tie or replace, nor the order of its modules, so
units are made of what there is. Once the model is complete, units that differ from those of the finished model are
rebuilt from their pages. So a model has the same units, and needs the same budget, whether it was built plainly or
under `deferred_init`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from offload.cutting.cut_parameter import CutParameter
from offload.cutting.cuttable import row_blocks
from offload.cutting.make_cut import make_whole, release
from offload.parameters.grouping import Group, common_name, groups_of, units_of
from offload.parameters.inner_tensors import all_parameters, conceal, forbid_repacking, is_slice, is_wrapper, owner_of
from offload.parameters.paged_parameter import PagedParameter
from offload.store.masters import add_masters, narrow
from offload.store.new_units import Sources, of_slices, pieces_in_unit
from offload.store.page_store import PageStore
from offload.store.sharing import gather_units, share_units
from optim.unit import Slot, Unit
from pagemem.sources.source_files import Origin, SourcePiece


def adopt(store: PageStore, model: nn.Module, optimized: Collection[int]) -> None:
    """Page what is still ordinary in ``model``, which `check_parameters` has seen, name everything as it does, and drop
    units it does not use.

    Args:
        optimized: ``id`` of every parameter that the optimizer has; units without any get no masters.

    Raises:
        BudgetError: the arena, or the device, cannot hold a unit.
    """
    _repack(store, model)
    if store.collectives is not None:
        share_units(store, store.collectives)
    trained: set[Unit] = set()
    for order, (name, parameter) in enumerate(all_parameters(model)):
        if isinstance(parameter, PagedParameter):
            parameter._place.slot.name, parameter._place.slot.order = name, order
            if id(owner_of(parameter)) in optimized:
                trained.add(parameter._place.unit)
    names: Counter[str] = Counter()
    for unit in store.index.units:
        name = common_name([slot.name for slot in unit.slots])
        names[name] += 1  # Parameters of several dtypes in one module are several units.
        unit.name = unit.parameters.name = name if names[name] == 1 else f"{name} ({names[name]})"
        _convert(store, unit, store.compute_dtype or unit.dtype, trained=unit in trained)
    gather_units(store)
    if store.device_tier is not None:
        store.compute_on(store.device_tier)
    device = None if store.accelerator is None else store.accelerator.torch_device
    for _, parameter in all_parameters(model):
        if isinstance(parameter, PagedParameter):
            parameter._place.follow(parameter)
        elif device is not None and not is_wrapper(parameter):
            parameter.data = parameter.data.to(device)
    release(model.parameters())
    forbid_repacking(model)
    _move_buffers(model, store.compute_dtype, device)


def page_model(store: PageStore, model: nn.Module, sources: Sources) -> None:
    """Move all parameters of a model on meta to pages, in the units that the engine wants. Nothing is read.

    Args:
        sources: where the values are. Parameters that are not in it have none until they are written whole.

    Raises:
        As `UnitMaker.make`.
    """
    for module in model.modules():
        store.watch_over(module)
    groups = _cut_groups(store, model)
    for group in units_of(groups, store.page_bytes):
        store.maker.make(group, of_slices(sources))
    release(model.parameters())


def give_sources(store: PageStore, sources: Sources) -> list[nn.Parameter]:
    """Have parameters that are in pages take values of files for theirs, between two steps; nothing is read.

    Args:
        sources: where the values are, in the parameters' dtypes.

    Returns:
        Those that must be written to instead: others of their unit are not in ``sources``, or views of them are in
        use, or they stay in memory for good.

    Raises:
        StorageError: a file cannot be opened, or is not as it was, or an update or a commit under way fails; what was
            taken until then stays so.
        ValueError: pieces do not fit a parameter; names it.
        RuntimeError: a parameter has its update of the step under way already. Nothing was taken.
    """
    whole, sources = sources, of_slices(sources)
    paged = [parameter for parameter in sources if isinstance(parameter, PagedParameter)]
    for parameter in paged:
        store.binder.note_early_use(parameter._place.unit, [parameter._place])
    if store.binder.updater is not None:
        store.binder.updater.drain()
    store.driver.quiesce()
    store.mover.collect_leases()
    slots = {parameter._place.slot: parameter for parameter in paged}
    pieces = {slot: pieces_in_unit(parameter, slot, sources[parameter]) for slot, parameter in slots.items()}
    units = dict.fromkeys(parameter._place.unit for parameter in paged)
    taken = {unit for unit in units if _take(store, unit, pieces)}
    store.binder.state_copies.forget()
    left = {id(owner_of(parameter)) for parameter in paged if parameter._place.unit not in taken}
    return [parameter for parameter in whole if id(parameter) in left]


def _take(store: PageStore, unit: Unit, pieces: Mapping[Slot, Sequence[SourcePiece]]) -> bool:
    tensor = unit.parameters
    covered = all(pieces.get(slot) or not slot.numel for slot in unit.slots)
    on_device = unit.device_resident or (unit.device is not None and unit.device.held)
    if not covered or tensor.held or on_device:
        return False
    store.mover.make_writable(tensor)
    in_files = [piece for slot in unit.slots for piece in pieces.get(slot, ())]
    if in_files and unit.sharing is not None and unit.sharing.cuts_parameters:
        size, (begin, end) = unit.dtype.itemsize, unit.sharing.own
        in_files = Origin.of(in_files, unit.numel * size).part(begin * size, end * size)
    if in_files:
        store.mover.originate(tensor, Origin.of(in_files, tensor.n_bytes))
    unit.version += 1
    for slot in unit.slots:
        slot.edited = True
    store.binder.without_values.discard(unit.slots)
    store.updated(unit)
    return True


def _convert(store: PageStore, unit: Unit, dtype: torch.dtype, *, trained: bool) -> None:
    """Have a unit go on in ``dtype``; one that is trained in 16 bits gets fp32 masters, with the values as they were
    built."""
    if not unit.dtype.is_floating_point:
        return  # quantised
    if trained and dtype is not torch.float32:
        add_masters(store.mover, store.driver, unit)
    if dtype is not unit.dtype:
        store.narrow(unit, narrow(store.mover, store.driver, unit, dtype), dtype)


def give_back(store: PageStore, model: nn.Module) -> None:
    """Make a model whole and ordinary again, which needs as much memory beside the budget.

    Raises:
        StorageError: some values cannot be read; those parameters are still paged.
    """
    device = store.parts.device
    for _, parameter in list(all_parameters(model)):
        if isinstance(parameter, CutParameter):
            make_whole(parameter, device)
        elif isinstance(parameter, PagedParameter) and not is_slice(parameter):
            store.binder.give_back(parameter, device)
        elif not (parameter.is_meta or is_wrapper(parameter)):
            parameter.data = parameter.data.to(device)
    conceal(model)
    _move_buffers(model, None, torch.device(device))


def _repack(store: PageStore, model: nn.Module) -> None:
    """Have exactly the units of ``model``, in its order; all other pages are given back.

    Raises:
        BudgetError: the arena cannot hold a unit; what was paged still is.
    """
    store.flush()
    wanted = units_of(_cut_groups(store, model), store.page_bytes)
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
        made, owners = store.maker.make(group)
        units.append(made)
        left.subtract(owners)
        for source in dict.fromkeys(owners):
            if not left[source]:
                store.forget(source)
    store.index.units = units
    for index, unit in enumerate(units):
        unit.index = index
    release(model.parameters())


def _cut_groups(store: PageStore, model: nn.Module) -> list[Group]:
    """The groups of a model, of which what does not fit is cut."""
    blocks = row_blocks(model.named_modules())
    return [part for group in groups_of(model.named_modules(), set()) for part in store.cut(group, blocks)]


def _unit_of(group: Group) -> Unit | None:
    """The unit that has exactly the parameters of ``group``, in order; None where there is none."""
    places = [parameter._place for _, parameter in group if isinstance(parameter, PagedParameter)]
    if len(places) < len(group) or [place.slot for place in places] != places[0].unit.slots:
        return None
    return places[0].unit


def _move_buffers(model: nn.Module, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Have buffers where compute is, and persistent floating-point ones (running means, ...) in the parameters' dtype.

    Others (rotary frequencies, ...) are computed and not trained: they keep the precision that they were made in, as
    transformers' do.
    """
    moved: dict[int, torch.Tensor] = {}  # one buffer may be several modules'
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in moved:
                    narrows = buffer.is_floating_point() and name not in module._non_persistent_buffers_set
                    moved[id(buffer)] = buffer.to(device=device, dtype=dtype if narrows else None)
                module._buffers[name] = moved[id(buffer)]
