"""Torch functions of parameters: which need no values of a tensor, and which hand out its memory so that torch counts
no writes to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

_ATTRIBUTES: Final = (
    "shape",
    "dtype",
    "device",
    "layout",
    "requires_grad",
    "grad_fn",
    "is_leaf",
    "ndim",
    "names",
    "_version",
    "itemsize",
    "nbytes",
    "is_sparse",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_quantized",
    "is_nested",
    "is_mkldnn",
    "is_mps",
    "is_xpu",
    "_backward_hooks",
    "_post_accumulate_grad_hooks",
    "retains_grad",
    "output_nr",
    "_grad",
    "_base",
    "_cdata",
)
_METHODS: Final = (
    "size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "is_signed", "is_inference",
    "register_hook", "get_device", "__len__", "__hash__", "ndimension", "is_shared",
)  # fmt: skip


AnyTensor = TypeVar("AnyTensor", bound=Tensor)
_TENSOR: Any = Tensor  # Its attributes are descriptors here, which its type stub does not say.

#: Torch functions that need no values: a tensor whose values are elsewhere answers them as it is.
METADATA: Final[frozenset[Any]] = frozenset(
    {getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)}
    | {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}
    | {
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
        torch.is_tensor,
        torch._has_compatible_shallow_copy_type,
    }
)
#: Functions after which values may change without the tensor's version saying so.
EXPORTS: Final[frozenset[Any]] = frozenset(
    {
        Tensor.numpy,
        Tensor.data_ptr,
        Tensor.untyped_storage,
        Tensor.storage,
        Tensor.__array__,
        Tensor.__dlpack__,
        _TENSOR.apply_,
        _TENSOR.map_,
    }
)
GET_DATA: Final = _TENSOR.data.__get__
#: What gives something out through which torch does not count writes.
UNCOUNTED: Final = EXPORTS | {GET_DATA}
SET_DATA: Final = _TENSOR.data.__set__
GET_GRAD: Final = _TENSOR.grad.__get__
SET_GRAD: Final = _TENSOR.grad.__set__
REQUIRES_GRAD: Final = frozenset({Tensor.requires_grad_, _TENSOR.requires_grad.__set__})

#: Context in which tensors of our classes are tensors like all others.
no_torch_function: Final = torch._C.DisableTorchFunctionSubclass


def is_bare(parameter: Tensor) -> bool:
    """Whether torch uses a parameter without asking: it is ordinary, or bound between uses, too."""
    return type(parameter).__torch_function__ is torch._C._disabled_torch_function_impl


def among(kind: type[AnyTensor], values: Iterable[Any]) -> Iterator[AnyTensor]:
    """Tensors of a class among arguments, and lists and tuples of arguments."""
    for value in values:
        if isinstance(value, kind):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from among(kind, value)
