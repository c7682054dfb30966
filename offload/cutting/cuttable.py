"""Which parameters can be cut into slices of rows, and into which: arithmetic over shapes.

A matrix that is looked up or multiplied by rows is used slice by slice: each slice is a unit of its own, so that the
largest matrix no longer has to fit into the budget at once. Slices of a linear layer's or an embedding's weight begin
at multiples of `ROW_BLOCK` rows; of weights of several experts, at any expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from math import gcd
from typing import Final

from torch import nn

from optim.layout import SLOT_ALIGN_NUMEL

#: Rows of a weight are the dimension that the gradient of a linear layer's input sums over. MKL adds this sum up in
#: blocks of so many, one after another: sums of slices that begin there have the bits of the sum of all. Measured with
#: torch 2.11 to 2.13 on a CPU with AVX-512; where blocks are others, sums differ by rounding.
ROW_BLOCK: Final = 192


def row_blocks(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, int]:
    """Parameters that can be cut, by ``id``: of how many rows slices are a multiple. The first module that has a
    parameter decides."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    for _, module in modules:
        blocks = _blocks_of(module)
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if key in blocks and type(parameter) is nn.Parameter and parameter.ndim >= 2:
                found[id(parameter)] = blocks[key]
    return found


def block_of(module: nn.Module, key: str, parameter: nn.Parameter) -> dict[int, int]:
    """`row_blocks` of a parameter that is about to be a module's, under this name."""
    blocks = _blocks_of(module)
    return {id(parameter): blocks[key]} if key in blocks and parameter.ndim >= 2 else {}


def _blocks_of(module: nn.Module) -> dict[str, int]:
    """Names of a module's own parameters that it uses in ways that slices know."""
    kind = type(module)
    experts = getattr(module, "num_experts", None)
    if isinstance(experts, int) and _takes_experts_one_by_one(module):
        fused = {key: p for key, p in module._parameters.items() if p is not None and p.ndim == 3}
        # An update rounds alike where a slice is whole vectors of its kernel.
        return {
            key: SLOT_ALIGN_NUMEL // gcd(SLOT_ALIGN_NUMEL, p.shape[1] * p.shape[2])
            for key, p in fused.items()
            if p.shape[0] == experts and p.numel()
        }
    # Attention of torch gives the weight of its output projection to a function that needs all of it.
    linear = isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if (linear and kind.forward is nn.Linear.forward) or kind.forward is nn.Embedding.forward:
        return {"weight": ROW_BLOCK}
    return {}


def _takes_experts_one_by_one(module: nn.Module) -> bool:
    """Whether a module of transformers with the weights of several experts computes with one of them at a time, as its
    eager implementation does."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None) in (None, "eager")


def slice_rows(n_rows: int, block: int, n_slices: int) -> tuple[int, ...]:
    """Rows of each of ``n_slices`` slices of about equal size, which begin at multiples of ``block`` rows; what is left
    over is in the last one. ``n_slices`` is at most the number of whole blocks."""
    blocks = n_rows // block
    edges = [block * -(-blocks * number // n_slices) for number in range(n_slices)] + [n_rows]
    return tuple(end - begin for begin, end in pairwise(edges))


def fewest_slices(n_rows: int, block: int, fits: Callable[[int], bool]) -> tuple[int, ...]:
    """Rows of each slice, where as few slices are made as it takes for the largest to fit, at least two.

    Args:
        fits: whether a slice of so many rows does; with more rows it never fits better.

    Returns:
        The smallest slices there are where even those do not fit; one entry where there is nothing to cut.
    """
    most = n_rows // block
    if most < 2:
        return (n_rows,)
    least, n_slices = 2, most
    while least < n_slices:
        middle = (least + n_slices) // 2
        if fits(max(slice_rows(n_rows, block, middle))):
            n_slices = middle
        else:
            least = middle + 1
    return slice_rows(n_rows, block, n_slices)
