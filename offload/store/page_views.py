"""Tensors over the memory of paged parameters that a model's construction leaves behind: other parameters, and views in
use."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from offload.cutting.cut_parameter import CutParameter
from offload.parameters.binder import Binder
from offload.parameters.paged_parameter import PagedParameter
from optim.unit import Unit


def adopt_view(binder: Binder, units: Sequence[Unit], name: str, parameter: nn.Parameter) -> None:
    """Have a parameter over the memory of a paged one (``nn.Parameter(paged.data)``) be another name of that one's
    pages.

    Raises:
        ValueError: it is over a part of it, or over another shape.
    """
    if (
        isinstance(parameter, (PagedParameter, CutParameter))
        or is_lazy(parameter)
        or parameter.device.type == "meta"
        or not parameter.numel()
    ):
        return
    arena = binder.mover.arena
    located = arena.locate(parameter)
    if located is None:
        return
    frame, offset = located
    unit = next(
        u for u in units if u.parameters.frame is not None and 0 <= frame - u.parameters.frame < u.parameters.n_frames
    )
    assert unit.parameters.frame is not None
    begin = ((frame - unit.parameters.frame) * arena.page_bytes + offset) // unit.dtype.itemsize
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
    binder.adopt(parameter, unit, slot)


def check_unviewed(binder: Binder, units: Sequence[Unit], model: nn.Module) -> None:
    """Raise ValueError where a view of a parameter is in use: it would not follow the parameter."""
    binder.mover.collect_leases()
    names = {
        p._place.unit: name for name, p in reversed(list(model.named_parameters())) if isinstance(p, PagedParameter)
    }
    for unit in units:
        if unit.compute.leases:
            raise ValueError(
                f"a view of {names.get(unit, unit.name)}, taken while the model was built, is still in use (a "
                "variable, or an attribute such as torch.nn.utils.spectral_norm leaves); delete or clone it before "
                "the engine is made"
            )
