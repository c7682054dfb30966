"""``embedding`` with a table in slices of rows, one of which is in memory at a time.

The backward pass is torch's own, slice by slice, of the tokens that a slice has, in their order: its sums have the bits
of those of the whole table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from offload.cutting.cut_linear import Call


def _found(indices: Tensor, first: int, n_rows: int) -> tuple[Tensor, Tensor] | None:
    """Which tokens a slice has, and their rows there; None: nobody knows, on torch's meta device."""
    if indices.is_meta:
        return None
    mask = (indices >= first) & (indices < first + n_rows)
    return mask, indices[mask] - first


def _look_up(output: Tensor, indices: Tensor, weight: Tensor, first: int) -> None:
    found = _found(indices, first, weight.shape[0])
    if found is None:
        torch.embedding(weight, indices)
    else:
        mask, rows = found
        output[mask] = torch.embedding(weight, rows)


class _EmbeddingSlice(torch.autograd.Function):
    """The rows that one slice has."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, indices: Tensor, weight: Tensor, first: int, padding: int, by_frequency: bool
    ) -> Tensor:
        """Fill in rows of ``output``, (tokens, features), in place."""
        _look_up(output, indices, weight, first)
        ctx.mark_dirty(output)
        ctx.save_for_backward(indices)
        ctx.set_materialize_grads(False)
        ctx.first, ctx.n_rows, ctx.padding, ctx.by_frequency = first, weight.shape[0], padding, by_frequency
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor | None) -> tuple[Any, ...]:
        """The gradient of one slice."""
        if outer is None:
            return (None,) * 6
        (indices,) = ctx.saved_tensors
        padding = ctx.padding - ctx.first
        padding = padding if 0 <= padding < ctx.n_rows else -1
        found = _found(indices, ctx.first, ctx.n_rows)
        mine, rows = (outer, indices) if found is None else (outer[found[0]], found[1])
        gradient = torch.ops.aten.embedding_dense_backward(mine, rows, ctx.n_rows, padding, ctx.by_frequency)
        return outer if ctx.needs_input_grad[0] else None, None, gradient, None, None, None


def cut_embedding(
    indices: Tensor,
    slices: Sequence[Tensor],
    call: Call,
    *,
    padding_idx: int | None = None,
    by_frequency: bool = False,
) -> Tensor:
    """``torch.nn.functional.embedding(indices, weight)`` of a weight in slices.

    Args:
        indices: integers of any shape. slices: (rows, features) each, paged.
        call: calls a function with one slice bound.

    Raises:
        IndexError: there is no such row.
    """
    n_rows = sum(part.shape[0] for part in slices)
    flat = indices.reshape(-1)
    if flat.numel() and not flat.is_meta and not (int(flat.min()) >= 0 and int(flat.max()) < n_rows):
        raise IndexError(f"index out of range: the embedding has {n_rows} rows")
    padding = -1 if padding_idx is None else padding_idx + (n_rows if padding_idx < 0 else 0)
    output = slices[0].new_empty((flat.shape[0], *slices[0].shape[1:]), requires_grad=False)
    with_graph, first = torch.is_grad_enabled() and slices[0].requires_grad, n_rows
    for part in reversed(slices):
        first -= part.shape[0]
        if with_graph:
            output = call(_apply, part, output, flat, first, padding, by_frequency)
        else:
            with torch.no_grad():
                call(_looked_up, part, output, flat, first)
    return output.view(*indices.shape, *slices[0].shape[1:])


def _looked_up(part: Tensor, output: Tensor, indices: Tensor, first: int) -> None:
    _look_up(output, indices, part, first)


def _apply(part: Tensor, output: Tensor, indices: Tensor, first: int, padding: int, by_frequency: bool) -> Any:
    return _EmbeddingSlice.apply(output, indices, part, first, padding, by_frequency)  # type: ignore[no-untyped-call]
