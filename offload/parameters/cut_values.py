"""The values of cut parameters, slice by slice: copies of all of them, and writes of all of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from offload.parameters.paged_parameter import PagedParameter, Revealed
from offload.parameters.tensor_functions import no_torch_function
from pagemem.files.spilled import SpilledTensor


def slice_name(begin: int, end: int) -> str:
    """What the name of a slice of rows ends with."""
    return f"[{begin}:{end}]"


def is_slice(parameter: Tensor) -> bool:
    """Whether a parameter is a slice of a cut one."""
    return hasattr(parameter, "_slice_of")


def owner_of(parameter: Any) -> Any:
    """The parameter that a slice is of; any other one itself."""
    return getattr(parameter, "_slice_of", parameter)


class SlicedParameter(Revealed, nn.Parameter):
    """A parameter whose values are in slices of its rows.

    Attributes:
        slices: in order; paged parameters once their units are made.
        released: whether all of them are in pages, so that it has no values of its own.
        gathered: its placeholder, while a copy of all values is in its place.
    """

    slices: list[nn.Parameter]
    released: bool
    gathered: Tensor | None

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First row and end of each slice."""
        ends = [0]
        for part in self.slices:
            ends.append(ends[-1] + part.shape[0])
        return list(pairwise(ends))


def name_of(parameter: SlicedParameter) -> str:
    first = parameter.slices[0]
    return first._place.slot.name.rpartition("[")[0] if isinstance(first, PagedParameter) else "a cut parameter"


def binder_of(parameter: SlicedParameter) -> Any:
    first = parameter.slices[0]
    assert isinstance(first, PagedParameter)
    return first._place.binder


def write(parameter: SlicedParameter, values: Tensor, non_blocking: bool = False) -> SlicedParameter:
    """``parameter.copy_(values)``, slice by slice."""
    if parameter.gathered is not None:
        with no_torch_function():
            Tensor.copy_(parameter, values)
        return parameter
    if isinstance(values, SlicedParameter):
        values = gathered_copy(values)
    whole = values.expand(parameter.shape)
    for part, (begin, end) in zip(parameter.slices, parameter.ranges, strict=True):
        part.copy_(whole[begin:end])
    return parameter


def read_into(parameter: SlicedParameter, put: Callable[[int, Tensor], object]) -> None:
    """Give flat values away, slice by slice, each with the place of its first one."""
    begin, binder = 0, binder_of(parameter)
    for part in parameter.slices:
        with binder.using([part]), no_torch_function(), torch.no_grad():
            put(begin, part.detach().view(-1))
        begin += part.numel()


def gathered_copy(parameter: SlicedParameter) -> Tensor:
    """A copy of all values, in a file beside the page files where it is large.

    Raises:
        DiskFullError, StorageError: there is no room for it, or values cannot be read.
    """
    if parameter.is_meta:
        return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    whole = SpilledTensor(binder_of(parameter).state_copies.spill_folder, parameter.shape, parameter.dtype)
    read_into(parameter, whole.put)
    return whole.tensor
