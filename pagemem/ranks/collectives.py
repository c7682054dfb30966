"""What connects ranks, as the comm lane uses it: a protocol that torch.distributed, or a test, stands behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Which elements of a whole tensor are the shard of each rank.

    Attributes:
        dtype: of the elements.
        ranges: [start, end) of each shard rank, in their order; adjacent, from 0 on. They need not be of one length,
            and may be empty. A single one is every rank's.

    Raises:
        ValueError: they are not adjacent, or do not begin at 0.
    """

    dtype: torch.dtype
    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        at = 0
        for rank, (start, end) in enumerate(self.ranges):
            if start != at or end < start:
                raise ValueError(f"rank {rank} has elements [{start}, {end}); begin at {at} and end there or later")
            at = end

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return self.ranges[-1][1]

    @property
    def n_bytes(self) -> int:
        """Of the whole tensor."""
        return self.numel * self.dtype.itemsize

    @property
    def shard_bytes(self) -> int:
        """Of the largest shard, which is what a paged tensor of a shard has on every rank, so that plans are equal."""
        return max(end - start for start, end in self.ranges) * self.dtype.itemsize

    def place(self, shard_rank: int) -> int:
        """The place of a shard rank's range."""
        return shard_rank if len(self.ranges) > 1 else 0

    def part(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's elements of a whole flat tensor of this dtype, as a view."""
        start, end = self.ranges[rank]
        return whole[start:end]

    def own(self, shard: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's elements, out of a flat tensor that has room for the largest shard, as a view."""
        start, end = self.ranges[rank]
        return shard[: end - start]


class Collectives(Protocol):
    """Collectives over all ranks. Each call returns when this rank's part is made, and raises when it cannot be.

    Promised to whoever implements it:

    - `exchange`, `gather`, `reduce_scatter` and `fill` are called on one thread, that of the comm lane, one at a time,
      and on all ranks in the same order with the same layouts: before each of the latter three all ranks have exchanged
      what comes next, and agree. So one process group with its usual rule of order will do.
    - `agree` is called on the training thread, on all ranks in the same order, perhaps while the other thread is inside
      one of the above: it needs a process group of its own. No lock is held meanwhile.
    - Tensors are flat, contiguous, on one device, and stay where they are and as they are until the call returns, but
      for ``into``, which nobody reads before. Shards lie in pages, not in the whole tensor, so an implementation that
      wants equal parts, or both in one buffer, brings its own.
    - Nothing is called any more after one call has raised, but `stop`.
    """

    @property
    def rank(self) -> int:
        """This rank's number, from 0 on."""

    @property
    def n_ranks(self) -> int:
        """How many ranks there are."""

    @property
    def n_shards(self) -> int:
        """Ranks among which a unit is cut. World rank = replica * n_shards + shard_rank."""

    @property
    def shard_rank(self) -> int:
        """This rank's place among them: that of its range in a layout."""

    def exchange(self, words: tuple[int, ...]) -> Sequence[Sequence[int]]:
        """What every rank has called it with, in rank order. As many 64-bit integers on all ranks."""

    def gather(self, shard: torch.Tensor, into: torch.Tensor, layout: ShardLayout) -> None:
        """Fill ``into`` (the whole tensor) with the shards of all ranks; ``shard`` has this rank's elements, and may be
        a part of ``into``."""

    def reduce_scatter(self, whole: torch.Tensor, into: torch.Tensor, layout: ShardLayout) -> None:
        """Fill ``into`` (this rank's elements) with the sum over all ranks' ``whole``, added up in rank order: ((0 + 1)
        + 2) + ..., so that the bits do not depend on who adds."""

    def fill(self, whole: torch.Tensor, layout: ShardLayout) -> None:
        """Fill the parts of a whole tensor that are other shard ranks' with theirs; this rank's is right already."""

    def agree(self, values: Sequence[float]) -> Sequence[Sequence[float]]:
        """What every rank has called it with, in rank order. As many on all ranks."""

    def agree_beside(self, values: Sequence[float]) -> Sequence[Sequence[float]]:
        """As `agree`, on the commit thread, beside all of the above: over a process group of its own."""

    def stop(self, why: str) -> None:
        """End calls that wait, here and on all other ranks, now and from now on, with a `RankError` that says ``why``.
        Any thread; idempotent. Does not wait."""
