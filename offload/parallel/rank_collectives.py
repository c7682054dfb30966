"""Collectives between processes, whose sums are made in rank order.

A gradient is exchanged by range: every rank sends each owner its part, chunk by chunk, and the owner adds them up in
rank order. Where groups of shard ranks are replicas of each other, the partial sum goes on from group to group, and the
last one's result back to all, so that as little as possible crosses between groups:

    replica 0: ((0 + 1) + ... S-1) --partial--> replica 1: ... + S + ... 2S-1 --partial--> ... --sum--> all replicas

Bytes that a rank sends, of a unit of B bytes in S shards and R replicas, up to the rounding of ranges:

    gather, fill     B / S * (S - 1)
    reduce_scatter   B / S * (S - 1), and B / S to the next replica, or from the last one to each other one
    of one range     2 * B / N * (N - 1), over N = S * R ranks

Source: ZeRO (Rajbhandari et al., SC 2020); the order of sums is this engine's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from offload.parallel.channel import Channel, Message
from offload.parallel.sharding import cut_ranges
from offload.parallel.stop_signal import StopSignal
from pagemem.ranks.collectives import ShardLayout
from pagemem.units import MiB

#: Memory for the parts of other ranks that are being summed, and for those on their way. Chosen.
STAGING_BYTES: Final = 16 * MiB


class RankCollectives:
    """Collectives of one rank; see `pagemem.ranks.collectives.Collectives`.

    Args:
        lane: of the comm lane's thread. agreement: of the training thread. beside: of the commit thread.
        stop: ends the waits of all ranks. who: this rank, in words.
        n_shards: ranks in a group that has the whole model.
    """

    def __init__(
        self, lane: Channel, agreement: Channel, beside: Channel, stop: StopSignal, who: str, n_shards: int
    ) -> None:
        self._lane, self._agreement, self._beside = lane, agreement, beside
        self._stop, self._who = stop, who
        self._n_shards = n_shards
        self._replica, self._shard_rank = divmod(lane.rank, n_shards)
        first = self._replica * n_shards
        self._group = range(first, first + n_shards)  # world ranks of the own group, in order
        self._world = range(lane.n_ranks)

    @property
    def rank(self) -> int:
        """See the protocol."""
        return self._lane.rank

    @property
    def n_ranks(self) -> int:
        """See the protocol."""
        return self._lane.n_ranks

    @property
    def n_shards(self) -> int:
        """See the protocol."""
        return self._n_shards

    @property
    def shard_rank(self) -> int:
        """See the protocol."""
        return self._shard_rank

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent on the comm lane so far, votes included."""
        return self._lane.sent_bytes

    def exchange(self, words: tuple[int, ...]) -> Sequence[Sequence[int]]:
        """See the protocol."""
        return [other.tolist() for other in self._lane.exchange(torch.tensor(words, dtype=torch.int64))]

    def agree(self, values: Sequence[float]) -> Sequence[Sequence[float]]:
        """See the protocol."""
        return [other.tolist() for other in self._agreement.exchange(torch.tensor(values, dtype=torch.float64))]

    def agree_beside(self, values: Sequence[float]) -> Sequence[Sequence[float]]:
        """See the protocol."""
        return [other.tolist() for other in self._beside.exchange(torch.tensor(values, dtype=torch.float64))]

    def gather(self, shard: torch.Tensor, into: torch.Tensor, layout: ShardLayout) -> None:
        """See the protocol."""
        own = layout.part(into, self._shard_rank)
        if shard.data_ptr() != own.data_ptr():
            own.copy_(shard)
        self._gather(shard, into, layout.ranges, self._group, self._shard_rank)

    def fill(self, whole: torch.Tensor, layout: ShardLayout) -> None:
        """See the protocol."""
        self._gather(layout.part(whole, self._shard_rank), whole, layout.ranges, self._group, self._shard_rank)

    def reduce_scatter(self, whole: torch.Tensor, into: torch.Tensor, layout: ShardLayout) -> None:
        """See the protocol."""
        if len(layout.ranges) == 1:
            ranges = cut_ranges(layout.numel, self.n_ranks)
            begin, end = ranges[self.rank]
            self._reduce(whole, into[begin:end], ranges, self._world, replicas=1)
            self._gather(into[begin:end], into, ranges, self._world, self.rank)
        else:
            self._reduce(whole, into, layout.ranges, self._group, replicas=self.n_ranks // self._n_shards)

    def stop(self, why: str) -> None:
        """See the protocol."""
        self._stop.set(f"{self._who}: {why}")

    def _gather(
        self, own: torch.Tensor, into: torch.Tensor, ranges: Sequence[tuple[int, int]], group: Sequence[int], place: int
    ) -> None:
        for away in range(1, len(group)):
            to, source = (place + away) % len(group), (place - away) % len(group)
            self._lane.send(own, group[to])
            begin, end = ranges[source]
            self._lane.receive(into[begin:end], group[source])
        self._lane.wait()

    def _reduce(
        self, whole: torch.Tensor, into: torch.Tensor, ranges: Sequence[tuple[int, int]], group: Sequence[int], *,
        replicas: int,
    ) -> None:  # fmt: skip
        """Fill ``into`` with the sum of the own range, chunk by chunk: the next one's parts are on their way while one
        is added up."""
        lane, place = self._lane, group.index(self.rank)
        chunk = max(1, STAGING_BYTES // 2 // max(1, len(group) - 1) // whole.element_size())
        n_chunks = max(1, *(-(-(end - begin) // chunk) for begin, end in ranges))
        spans = [slice(number * chunk, (number + 1) * chunk) for number in range(n_chunks)]
        before = self.rank - len(group) if self._replica > 0 and replicas > 1 else None
        others = [replica * len(group) + place for replica in range(replicas - 1)]  # than the last replica
        last = (replicas - 1) * len(group) + place
        unsent: list[Sequence[Message]] = []
        parts, posted = self._begin_chunk(whole, ranges, group, spans[0])
        for number, span in enumerate(spans):
            lane.wait(posted)
            found = parts
            if number + 1 < n_chunks:
                parts, posted = self._begin_chunk(whole, ranges, group, spans[number + 1])
            sum_of = into[span]
            if before is not None:
                found = [torch.empty_like(sum_of), *found]
                lane.receive(found[0], before)
                lane.wait()
            _add_up(found, sum_of)
            if replicas > 1:
                for to in others if self.rank == last else [self.rank + len(group)]:
                    lane.send(sum_of, to)
                unsent.append(lane.take_posted())
        for waiting in unsent:
            lane.wait(waiting)
        if replicas > 1 and self.rank != last:
            for span in spans:
                lane.receive(into[span], last)
            lane.wait()

    def _begin_chunk(
        self, whole: torch.Tensor, ranges: Sequence[tuple[int, int]], group: Sequence[int], span: slice
    ) -> tuple[list[torch.Tensor], Sequence[Message]]:
        """Begin to have a chunk of the own range come from all ranks of a group, and theirs go; returns the parts, in
        rank order, and what is to be waited for."""
        place = group.index(self.rank)
        cut = [whole[begin:end][span] for begin, end in ranges]
        parts = [cut[place] if source == place else torch.empty_like(cut[place]) for source in range(len(group))]
        for away in range(1, len(group)):
            to, source = (place + away) % len(group), (place - away) % len(group)
            self._lane.send(cut[to], group[to])
            self._lane.receive(parts[source], group[source])
        return parts, self._lane.take_posted()


def _add_up(parts: Sequence[torch.Tensor], into: torch.Tensor) -> None:
    """((0 + 1) + 2) + ..., each rounded to their dtype."""
    if len(parts) == 1:
        into.copy_(parts[0])
        return
    torch.add(parts[0], parts[1], out=into)
    for part in parts[2:]:
        into.add_(part)
