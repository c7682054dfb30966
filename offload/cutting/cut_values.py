"""The values of cut parameters, slice by slice: copies of all of them, and writes of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offload.parameters.inner_tensors import SlicedParameter
from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.tensor_functions import no_torch_function
from pagemem.files.spilled import SpilledTensor


def name_of(parameter: SlicedParameter) -> str:
    """The model's name of it, once it has slices in pages."""
    first = parameter.slices[0]
    return first._place.slot.name.rpartition("[")[0] if isinstance(first, PagedParameter) else "a cut parameter"


def binder_of(parameter: SlicedParameter) -> Any:
    """What binds its slices."""
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


def shares(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that are not paged lie in the same memory."""
    if one.layout is not torch.strided or one.is_meta or other.is_meta:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
