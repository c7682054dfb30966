"""``linear`` with a weight in slices of rows, one of which is in memory at a time, and its backward pass, which gives
each slice's gradient away as soon as it is made.

The output's columns are those of the slices, so forward passes and gradients of weights have the bits of the whole
product. The input's gradient is a sum over all rows: slices are added to it in their order, in blocks that the matrix
product itself adds up one after another (`offload.cutting.cuttable`). Sums of 16-bit weights are kept in fp32 and
rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from offload.cutting.cuttable import ROW_BLOCK

#: Calls a function with arguments of which some are paged parameters, which are bound for that long.
Call = Callable[..., Any]
#: Rows that are multiplied at once begin at multiples of this; what is left over is taken in blocks.
_BULK_ROWS: Final = 2 * ROW_BLOCK


class _InputGradient:
    """The gradient of the input while slices are added to it; one for each call of ``linear``."""

    __slots__ = ("rows", "total")

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows: Tensor | None = None

    def add(self, outer: Tensor, weight: Tensor) -> None:
        """Add ``outer @ weight``, of shapes (tokens, rows) and (rows, features)."""
        if outer.dtype is not torch.float32 and outer.dtype is not torch.float64:
            outer, weight = outer.float(), weight.float()
        n_rows = weight.shape[0]
        bulk = n_rows // _BULK_ROWS * _BULK_ROWS
        edges = [0, *range(bulk, n_rows, ROW_BLOCK), n_rows] if bulk else [*range(0, n_rows, ROW_BLOCK), n_rows]
        for begin, end in pairwise(edges):
            if begin == end:
                continue
            if self.total is None:
                self.total = outer[:, begin:end].mm(weight[begin:end])
            else:
                self.total.addmm_(outer[:, begin:end], weight[begin:end])

    def take(self, dtype: torch.dtype) -> Tensor | None:
        """All of it; nothing is kept."""
        total, self.total, self.rows = self.total, None, None
        return None if total is None else total.to(dtype)


def _multiply(output: Tensor, rows: Tensor, weight: Tensor, first: int, *, add: bool) -> None:
    """Columns of the output that belong to a slice, which begin at ``first``."""
    columns = output[:, first : first + weight.shape[0]]
    if add:
        columns.addmm_(rows, weight.t())
    else:
        torch.mm(rows, weight.t(), out=columns)


class _LinearSlice(torch.autograd.Function):
    """One slice's part of the output.

    Backward passes go through the slices in their order, the reverse of forward passes: the first one has the input
    saved, the last one gives its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor | None, rows: Tensor, weight: Tensor, first: int, shared: Any, *flags: bool
    ) -> Tensor:
        """Fill in columns of ``output`` in place.

        Args:
            x: the input, where this slice's backward pass gives its gradient. rows: the same without a graph.
            flags: whether the output has the bias already, and whether this slice's backward pass is the first.
        """
        add, begins = flags
        _multiply(output, rows, weight, first, add=add)
        ctx.mark_dirty(output)
        ctx.save_for_backward(weight, *([rows] if begins else []))
        ctx.set_materialize_grads(False)
        ctx.first, ctx.n_rows, ctx.shared, ctx.begins, ctx.gives = first, weight.shape[0], shared, begins, x is not None
        ctx.wants_input, ctx.dtype = shared.wanted, rows.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor | None) -> tuple[Any, ...]:
        """The gradient of one slice, and its part of the input's."""
        if outer is None:
            return (None,) * 8
        gradient: _InputGradient = ctx.shared
        weight, *saved = ctx.saved_tensors
        if ctx.begins:
            gradient.take(outer.dtype)  # what a backward pass that failed has left
            gradient.rows = saved[0]
        columns = outer[:, ctx.first : ctx.first + ctx.n_rows]
        of_weight = None
        if ctx.needs_input_grad[3]:
            assert gradient.rows is not None
            of_weight = columns.t().mm(gradient.rows)
        if ctx.wants_input:
            gradient.add(columns, weight)
        of_input = gradient.take(ctx.dtype) if ctx.gives else None
        return outer if ctx.needs_input_grad[0] else None, of_input, None, of_weight, None, None, None, None


class _Shared(_InputGradient):
    """What the slices of one call have in common."""

    __slots__ = ("wanted",)

    def __init__(self, wanted: bool) -> None:
        super().__init__()
        self.wanted = wanted


def cut_linear(x: Tensor, slices: Sequence[Tensor], bias: Tensor | None, call: Call) -> Tensor:
    """``torch.nn.functional.linear(x, weight, bias)`` of a weight in slices.

    Args:
        x: (..., features). slices: (rows, features) each, paged. bias: (all rows), paged or not.
        call: calls a function with one slice or the bias bound.
    """
    kind = "cpu" if x.is_meta else x.device.type  # A rehearsal is of a CPU's step.
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return _linear(x.to(dtype), slices, bias, call, dtype)
    return _linear(x, slices, bias, call, None)


def _linear(x: Tensor, slices: Sequence[Tensor], bias: Tensor | None, call: Call, dtype: torch.dtype | None) -> Tensor:
    n_features, n_rows = slices[0].shape[1], sum(part.shape[0] for part in slices)
    if x.shape[-1:] != (n_features,):
        raise RuntimeError(f"linear: an input of shape {tuple(x.shape)} and a weight of {(n_rows, n_features)}")
    # As torch's: the bias comes first, but for inputs that it multiplies otherwise.
    first_bias = bias is not None and (x.ndim == 2 or x.is_contiguous())
    flat = x.reshape(-1, n_features)
    kind = dtype or flat.dtype
    if bias is not None and first_bias:
        output = call(_repeated, bias, flat.shape[0], kind)
    else:
        output = flat.new_empty((flat.shape[0], n_rows))
    with_graph = torch.is_grad_enabled() and (x.requires_grad or slices[0].requires_grad)
    rows, shared, first = flat.detach(), _Shared(flat.requires_grad), n_rows
    for number, part in reversed(list(enumerate(slices))):
        first -= part.shape[0]
        if not with_graph:
            with torch.no_grad():
                call(_multiplied, part, output, rows, first, kind, add=first_bias)
            continue
        gives = flat if number == len(slices) - 1 else None
        flags = first_bias, number == 0
        output = call(_apply, part, output, gives, rows, first, shared, kind, flags)
    made: Tensor = output.view(*x.shape[:-1], n_rows)
    return made if bias is None or first_bias else _with_bias_after(made, bias, call, kind)


def _with_bias_after(output: Tensor, bias: Tensor, call: Call, dtype: torch.dtype) -> Tensor:
    made: Tensor = call(_with_bias, bias, output, dtype)
    return made


def _repeated(bias: Tensor, n_tokens: int, dtype: torch.dtype) -> Tensor:
    return bias.to(dtype).expand(n_tokens, -1).clone()


def _with_bias(bias: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    return output.add_(bias.to(dtype))


def _multiplied(part: Tensor, output: Tensor, rows: Tensor, first: int, dtype: torch.dtype, *, add: bool) -> None:
    _multiply(output, rows, part.to(dtype), first, add=add)


def _apply(
    part: Tensor, output: Tensor, x: Tensor | None, rows: Tensor, first: int, shared: Any, dtype: torch.dtype,
    flags: tuple[bool, bool],
) -> Any:  # fmt: skip
    return _LinearSlice.apply(output, x, rows, part.to(dtype), first, shared, *flags)  # type: ignore[no-untyped-call]
