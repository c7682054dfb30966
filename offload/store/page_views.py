"""Tensors over the memory of paged parameters that a model's construction leaves behind: other parameters, and views in
use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy

from offload.parameters.paged_parameter import PagedParameter

if TYPE_CHECKING:
    from offload.store.page_store import PageStore


def adopt_view(store: PageStore, name: str, parameter: nn.Parameter) -> None:
    """Have a parameter over the memory of a paged one (``nn.Parameter(paged.data)``) be another name of that one's
    pages.

    Raises:
        ValueError: it is over a part of it, or over another shape.
    """
    if (
        isinstance(parameter, PagedParameter)
        or is_lazy(parameter)
        or parameter.device.type == "meta"
        or not parameter.numel()
    ):
        return
    located = store.mover.arena.locate(parameter.data_ptr())
    if located is None:
        return
    frame, offset = located
    unit = next(
        u
        for u in store.index.units
        if u.parameters.frame is not None and 0 <= frame - u.parameters.frame < u.parameters.n_frames
    )
    assert unit.parameters.frame is not None
    begin = ((frame - unit.parameters.frame) * store.page_bytes + offset) // unit.dtype.itemsize
    slot = next(slot for slot in unit.slots if slot.offset <= begin < slot.end)
    if (slot.offset, slot.shape, slot.dtype) != (
        begin,
        parameter.shape,
        parameter.dtype,
    ) or not parameter.is_contiguous():
        raise ValueError(
            f"{name} is a view of a part of {slot.name}, which is in pages; clone the values: "
            "nn.Parameter(view.clone())"
        )
    store.binder.alias(parameter, unit, slot)


def adopt_views(store: PageStore, model: nn.Module) -> None:
    """`adopt_view` for all of a model's parameters.

    Raises:
        ValueError: one is over a part of another, or over another shape.
    """
    for name, parameter in model.named_parameters():
        adopt_view(store, name, parameter)


def check_unviewed(store: PageStore, model: nn.Module) -> None:
    """Raise ValueError where somebody has a view of a parameter: it would not see what becomes of the parameter."""
    store.mover.collect_leases()
    names = {
        p._place.unit: name for name, p in reversed(list(model.named_parameters())) if isinstance(p, PagedParameter)
    }
    for unit in store.index.units:
        if unit.compute.leases:
            raise ValueError(
                f"a view of {names.get(unit, unit.name)}, taken while the model was built, is still in use (a "
                "variable, or an attribute such as torch.nn.utils.spectral_norm leaves); delete or clone it before "
                "the engine is made"
            )
