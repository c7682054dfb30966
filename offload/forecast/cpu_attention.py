"""Attention of meta tensors as a CPU computes it: in one kernel, where torch would take it apart into a dozen."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

_ATTENTION: Final = functional.scaled_dot_product_attention


class AttentionOfCpu:
    """While it is entered, attention is dispatched as torch's kernel for CPUs wherever torch would choose that on a
    CPU.

    For callers of ``torch.nn.functional.scaled_dot_product_attention`` by that name, in the whole process: a mode of
    torch's would be off in what backward recomputes.
    """

    def __enter__(self) -> None:
        functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        functional.scaled_dot_product_attention = _ATTENTION


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    if attn_mask is not None or dropout_p or options.get("enable_gqa") or not _in_one_kernel(query, key, value):
        return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **options)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = kernel(query, key, value, dropout_p, is_causal, scale=options.get("scale"))[0]
    return result


def _in_one_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """What torch asks for (aten/src/ATen/native/transformers/sdp_utils_cpp.cpp), for tensors without a mask."""
    enabled: bool = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    alike = all(
        t.dim() == 4 and t.stride(-1) == 1 and t.size(-1) == query.size(-1) and t.numel() for t in (query, key, value)
    )
    return alike and query.shape[:2] == key.shape[:2] == value.shape[:2] and enabled
