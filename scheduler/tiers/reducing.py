"""Sums over all ranks that become shards: what goes the other way than a gather."""

from __future__ import annotations

import torch

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
    """

    kind = CollectiveKind.REDUCE_SCATTER

    def __init__(
        self,
        below: HostMover,
        whole: torch.Tensor,
        into: PagedTensor,
        layout: ShardLayout,
        source: tuple[Mover, PagedTensor] | None,
    ) -> None:
        super().__init__(into.name, into.id, layout.n_bytes)
        self._below, self._whole, self._into, self._layout, self._source = below, whole, into, layout, source
        self._bytes = below.begin_arrival(into)
        if source is not None:
            hold(*source)

    def vote(self) -> Vote:
        """As `Collective.vote`."""
        return Vote.TAKE

    def make(self, collectives: Collectives) -> None:
        """As `Collective.make`."""
        shard = self._bytes.view(self._layout.dtype)
        own = self._layout.own(shard, collectives.rank)
        collectives.reduce_scatter(self._whole, own, self._layout)
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
