"""How the ranks of a run share a unit: which of its elements each one updates, and what it keeps of the others."""

from __future__ import annotations

from dataclasses import dataclass

from pagemem.ranks.collectives import ShardLayout
from pagemem.residency.paged_tensor import PagedTensor


@dataclass(slots=True, eq=False)
class Sharing:
    """One unit's, on one rank.

    Attributes:
        layout: which elements of the unit each shard rank updates; a single range is everybody's.
        shard_rank: this rank's place among the ranges.
        cuts_parameters: whether this rank keeps the parameters of its own range only, and compute uses ``unsharded``.
        unsharded: all of the unit's parameters, gathered for compute; None: this rank keeps them all.
        sums: the own range of the gradients' sum over all ranks, once there has been one.
        reduced: whether the step's gradients are in ``sums``, no longer in the unit's own.
    """

    layout: ShardLayout
    shard_rank: int
    cuts_parameters: bool
    unsharded: PagedTensor | None = None
    sums: PagedTensor | None = None
    reduced: bool = False

    @property
    def own(self) -> tuple[int, int]:
        """The elements of the unit's layout that this rank updates."""
        return self.layout.ranges[self.layout.place(self.shard_rank)]

    @property
    def room_numel(self) -> int:
        """Elements of the largest range: what tensors of a range have room for on every rank, so that plans are
        equal."""
        return self.layout.shard_bytes // self.layout.dtype.itemsize

    @property
    def first(self) -> int:
        """The element of the unit's layout that the kept parameters begin with."""
        return self.own[0] if self.cuts_parameters else 0
