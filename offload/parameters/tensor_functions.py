"""Which torch functions need no values of a tensor, and which hand its memory to somebody who does not tell us what he
does with it."""

from __future__ import annotations

from typing import Any, Final

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


def _metadata_functions() -> frozenset[Any]:
    found: set[Any] = set()
    for name in _ATTRIBUTES:
        descriptor: Any = getattr(Tensor, name, None)
        if hasattr(descriptor, "__get__"):
            found.add(descriptor.__get__)
    found.update(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name))
    found.update(
        {
            torch.is_floating_point,
            torch.is_complex,
            torch.numel,
            torch.is_tensor,
            torch._has_compatible_shallow_copy_type,
        }
    )
    return frozenset(found)


#: Torch functions that need no values: a tensor whose values are elsewhere answers them as it is.
METADATA: Final = _metadata_functions()
_TENSOR: Any = Tensor  # Some of its methods are not in its type stub.
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
