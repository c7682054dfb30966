"""Makes ordinary parameters cut ones, and whole again; and `gathered`, which keeps values in memory for a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from offload.cutting.cut_parameter import CutParameter
from offload.cutting.cut_values import binder_of, gathered_copy, read_into, write
from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.tensor_functions import among, no_torch_function
from offload.parameters.without_values import assign


def cut_parameter(parameter: nn.Parameter, rows: Sequence[int]) -> list[nn.Parameter]:
    """Make an ordinary parameter a cut one, in slices of so many rows, which are views of its values until each has a
    unit; returns them."""
    slices: list[nn.Parameter] = []
    with torch.no_grad():
        for values in torch.split(parameter.detach(), list(rows)):
            part: Any = nn.Parameter(values, parameter.requires_grad)
            part._slice_of = parameter
            slices.append(part)
    parameter.__class__ = CutParameter
    assert isinstance(parameter, CutParameter)
    parameter.slices, parameter.gathered, parameter.released = slices, None, False
    return slices


def let_go(parameter: CutParameter) -> None:
    """Once all slices are in pages: hold no values any more, and follow their dtype and device."""
    placeholder = parameter.slices[0]._place.placeholder  # type: ignore[attr-defined]
    with no_torch_function():
        strides = (0,) * parameter.ndim
        assign(parameter, placeholder.as_strided(parameter.shape, strides))
    parameter.released = True


def release(parameters: Iterable[nn.Parameter]) -> None:
    """`let_go` of all cut parameters among these."""
    for parameter in parameters:
        if isinstance(parameter, CutParameter):
            let_go(parameter)


def make_whole(parameter: CutParameter, device: str) -> None:
    """Make a cut parameter an ordinary one again, with its values, on ``device``.

    Raises:
        StorageError: they cannot be read; the parameter is still cut.
    """
    if parameter.released:
        binder = binder_of(parameter)
        without = any(part._place.slot in binder.without_values for part in among(PagedParameter, parameter.slices))
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta" if without else device)
        if not values.is_meta:
            read_into(parameter, lambda begin, flat: values.view(-1)[begin : begin + flat.numel()].copy_(flat))
        assign(parameter, values)
    parameter.__class__ = nn.Parameter  # type: ignore[assignment]
    del parameter.slices, parameter.gathered, parameter.released


@contextmanager
def gathered_whole(parameters: Sequence[CutParameter]) -> Iterator[None]:
    """Have copies of all values of cut parameters in their places inside the block; what is written to them goes back
    to the slices."""
    copies = [(parameter, gathered_copy(parameter)) for parameter in parameters if parameter.gathered is None]
    for parameter, copy in copies:
        with no_torch_function():
            released = parameter.data
            parameter.data = copy
        parameter.gathered = released
    versions = [parameter._version for parameter, _ in copies]
    try:
        yield
    finally:
        for (parameter, copy), version in zip(copies, versions, strict=True):
            changed = parameter._version != version
            with no_torch_function():
                assert parameter.gathered is not None
                parameter.data, parameter.gathered = parameter.gathered, None
            if changed:
                with torch.no_grad():
                    write(parameter, copy)


@contextmanager
def gathered(what: nn.Module | Iterable[Tensor]) -> Iterator[None]:
    """Keep whole parameter values in memory inside the block, readable and writable in place.

    Args:
        what: a module (all its parameters) or parameters. Ordinary parameters are left as they are.

    Raises:
        BudgetError: their units do not all fit in host memory at once; gather fewer. Cut parameters are in files beside
            the page files meanwhile.
    """
    named = list(what.parameters() if isinstance(what, nn.Module) else what)
    parameters = list(among(PagedParameter, named))
    gathering = parameters[0]._place.binder.gather(parameters) if parameters else nullcontext()
    with gathered_whole([one for one in among(CutParameter, named) if one.released]), gathering:
        yield
