"""Other ranks of a rehearsal: they do what this one does, say what it says, and move nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagemem.ranks.collectives import ShardLayout


class SilentRanks:
    """Collectives of the first of so many ranks; see `pagemem.ranks.collectives.Collectives`."""

    rank = 0
    shard_rank = 0

    def __init__(self, n_ranks: int, n_shards: int) -> None:
        self.n_ranks, self.n_shards = n_ranks, n_shards

    def exchange(self, words: tuple[int, ...]) -> Sequence[Sequence[int]]:
        """See the protocol."""
        return [words] * self.n_ranks

    def gather(self, shard: torch.Tensor, into: torch.Tensor, layout: ShardLayout) -> None:
        """See the protocol."""

    def reduce_scatter(self, whole: torch.Tensor, into: torch.Tensor, layout: ShardLayout) -> None:
        """See the protocol."""

    def fill(self, whole: torch.Tensor, layout: ShardLayout) -> None:
        """See the protocol."""

    def agree(self, values: Sequence[float]) -> Sequence[Sequence[float]]:
        """See the protocol."""
        return [values] * self.n_ranks

    def agree_beside(self, values: Sequence[float]) -> Sequence[Sequence[float]]:
        """See the protocol."""
        return [values] * self.n_ranks

    def stop(self, why: str) -> None:
        """See the protocol."""
