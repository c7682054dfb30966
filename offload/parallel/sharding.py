"""Which elements of a unit each shard rank has. Pure arithmetic.

A unit's flat layout is cut at multiples of `BLOCK_NUMEL` elements into one range for each rank, in rank order. Ranges
differ by a block at most, and which ranks have the larger ones rotates from unit to unit, so that totals are even.

Source: ZeRO (Rajbhandari et al., SC 2020), in the flat layout of FSDP (Zhao et al., VLDB 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from optim.layout import SLICE_ALIGN_NUMEL
from pagemem.units import ceil_div

#: Fused kernels round alike on both sides of such a cut.
BLOCK_NUMEL: Final = SLICE_ALIGN_NUMEL

#: Elements [start, end) of each rank, in rank order: adjacent, from 0 on.
Ranges = tuple[tuple[int, int], ...]


def cut_ranges(numel: int, n_ranks: int, first: int = 0) -> Ranges:
    """Cut ``numel`` elements for ``n_ranks`` ranks.

    Args:
        first: the rank that gets the first of the blocks that cannot be shared evenly, the ranks after it the others.

    Raises:
        ValueError: there are no ranks, or fewer than no elements.
    """
    if n_ranks < 1 or numel < 0:
        raise ValueError(f"{numel} elements for {n_ranks} ranks; give at least one rank, and 0 elements or more")
    n_blocks = ceil_div(numel, BLOCK_NUMEL)
    each, left = divmod(n_blocks, n_ranks)
    ranges: list[tuple[int, int]] = []
    block = 0
    for rank in range(n_ranks):
        n_own = each + ((rank - first) % n_ranks < left)
        start, block = block, block + n_own
        ranges.append((min(start * BLOCK_NUMEL, numel), min(block * BLOCK_NUMEL, numel)))
    return tuple(ranges)


def cut_units(numels: Iterable[int], n_ranks: int) -> Iterator[Ranges]:
    """The ranges of each unit of a model, by their elements; the first owner is the one after the last that got a block
    more, so that no rank has over a block more than another in all, but for the units' ends.

    Raises:
        ValueError: as `cut_ranges`.
    """
    first = 0
    for numel in numels:
        yield cut_ranges(numel, n_ranks, first)
        first = (first + ceil_div(numel, BLOCK_NUMEL)) % n_ranks
