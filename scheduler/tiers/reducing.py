"""Sums over all ranks that become shards, and what goes back: the parts of a tensor that other ranks have changed."""

from __future__ import annotations

import torch

from pagemem.errors import RankError
from pagemem.ranks.collectives import Collectives, ShardLayout
from pagemem.ranks.comm_lane import Collective, CollectiveKind, Vote
from pagemem.residency.gather_ticket import hold, let_go
from pagemem.residency.host_mover import HostMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor


class ReduceScatter(Collective):
    """The sum over all ranks of a tensor, whose own range comes to a dirty tensor of host memory that is arriving until
    then.

    Args:
        whole: flat, of the layout's dtype. source: the paged tensor that it is a view of, which stays; None: it is
            memory that is not paged.
        into: the shard; what of it is beyond the own range is zeroed.
        parts: a number for what of ``whole`` is to be summed, equal on all ranks.
        divisor: what the sum is divided by.
    """

    kind = CollectiveKind.REDUCE_SCATTER

    def __init__(
        self,
        below: HostMover,
        whole: torch.Tensor,
        into: PagedTensor,
        layout: ShardLayout,
        source: tuple[Mover, PagedTensor] | None,
        parts: int,
        divisor: int,
    ) -> None:
        super().__init__(into.name, into.id, layout.n_bytes)
        self._parts, self._divisor = parts, divisor
        self._below, self._whole, self._into, self._layout, self._source = below, whole, into, layout, source
        self._bytes = below.begin_arrival(into)
        if source is not None:
            hold(*source)

    @property
    def mark(self) -> int:
        """As `Collective.mark`: what is to be summed."""
        return self._parts

    def vote(self) -> Vote:
        """As `Collective.vote`."""
        return Vote.TAKE

    def make(self, collectives: Collectives) -> None:
        """As `Collective.make`.

        Raises:
            RankError: ranks have other parts.
        """
        for rank, parts in enumerate(self.marks):
            if parts != self.marks[0]:
                raise RankError(
                    f"ranks 0 and {rank} have not the same gradients for {self.name}; use the same parameters on all "
                    "ranks in each step (one that a rank does not need: add 0 * parameter.sum() to its loss)"
                )
        shard = self._bytes.view(self._layout.dtype)
        own = self._layout.own(shard, self._layout.place(collectives.shard_rank))
        collectives.reduce_scatter(self._whole, own, self._layout)
        if self._divisor != 1:
            own.div_(self._divisor)
        shard[own.numel() :].zero_()

    def ended(self) -> None:
        """As `Collective.ended`."""
        self._whole = self._bytes = torch.empty(0)
        with self._below.changed:
            if self.error is not None:
                self._below.monitor.note_failure(self.error)
                self._below.discard_soon(self._into)  # there is nothing in it that could be used
            self._below.end_arrival(self._into)
        if self._source is not None:
            mover, tensor = self._source
            with mover.changed:
                let_go(mover, tensor)
                mover.monitor.notify()


class Fill(Collective):
    """The parts of all other ranks come to a dirty tensor of host memory, which is arriving until then.

    Args:
        into: of the layout's elements, of which those of the own range are right.
    """

    kind = CollectiveKind.FILL

    def __init__(self, below: HostMover, into: PagedTensor, layout: ShardLayout) -> None:
        super().__init__(into.name, into.id, layout.n_bytes)
        self._below, self._into, self._layout = below, into, layout
        self._bytes = below.begin_arrival(into)

    def vote(self) -> Vote:
        """As `Collective.vote`."""
        return Vote.TAKE

    def make(self, collectives: Collectives) -> None:
        """As `Collective.make`."""
        whole = self._bytes.view(self._layout.dtype)[: self._layout.numel]
        collectives.fill(whole, self._layout)

    def ended(self) -> None:
        """As `Collective.ended`. After an error the parts of other ranks are of the step before."""
        self._bytes = torch.empty(0)
        with self._below.changed:
            if self.error is not None:
                self._below.monitor.note_failure(self.error)
            self._below.end_arrival(self._into)
