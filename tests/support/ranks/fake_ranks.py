"""Ranks that are threads of one process: collectives that meet in memory, and a run of one body on every rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from pagemem.errors import RankError
from pagemem.ranks.collectives import ShardLayout

TIMEOUT_S = 60.0
T = TypeVar("T")


class Meeting:
    """Where ranks meet: each call of a rank waits for the same call of all others.

    Attributes:
        log: (channel, what was called) of each meeting of rank 0, in order.
        broken: called with a rank and what it does next; raises to break it.
    """

    def __init__(self, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self.log: list[tuple[str, str]] = []
        self.broken: Callable[[int, str], None] = lambda rank, what: None
        self._changed = threading.Condition()
        self._rounds: dict[tuple[str, int], dict[int, Any]] = {}
        self._left: dict[tuple[str, int], int] = {}
        self._stopped: str | None = None

    def meet(self, rank: int, channel: str, number: int, thing: T) -> list[T]:
        """What all ranks came with, in rank order."""
        at = channel, number
        with self._changed:
            there = self._rounds.setdefault(at, {})
            there[rank] = thing
            self._changed.notify_all()
            ready = self._changed.wait_for(lambda: len(there) == self.n_ranks or self._stopped is not None, TIMEOUT_S)
            if not ready:
                self._stopped = f"ranks {sorted(set(range(self.n_ranks)) - there.keys())} did not come"
            if len(there) < self.n_ranks:
                self._changed.notify_all()
                raise RankError(f"{self._stopped}")
            self._left[at] = self._left.get(at, 0) + 1
            if self._left[at] == self.n_ranks:
                del self._rounds[at], self._left[at]
            return [there[other] for other in range(self.n_ranks)]

    def stop(self, why: str) -> None:
        """Nobody waits for others any more."""
        with self._changed:
            self._stopped = self._stopped or why
            self._changed.notify_all()


class MemoryCollectives:
    """Collectives of one rank; see `pagemem.ranks.collectives.Collectives`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank, self.n_ranks = rank, meeting.n_ranks
        self._meeting = meeting
        self._numbers = {"lane": 0, "agree": 0, "beside": 0}

    def _meet(self, channel: str, what: str, thing: T) -> list[T]:
        self._meeting.broken(self.rank, what)
        number = self._numbers[channel]
        self._numbers[channel] += 1
        if self.rank == 0:
            self._meeting.log.append((channel, what))
        return self._meeting.meet(self.rank, channel, number, thing)

    def exchange(self, words: tuple[int, ...]) -> Sequence[Sequence[int]]:
        """See the protocol."""
        return self._meet("lane", "exchange", words)

    def gather(self, shard: torch.Tensor, into: torch.Tensor, layout: ShardLayout) -> None:
        """See the protocol."""
        for rank, part in enumerate(self._meet("lane", "gather", shard.clone())):
            layout.part(into, rank).copy_(part)

    @property
    def n_shards(self) -> int:
        """See the protocol: all of them."""
        return self.n_ranks

    @property
    def shard_rank(self) -> int:
        """See the protocol."""
        return self.rank

    def fill(self, whole: torch.Tensor, layout: ShardLayout) -> None:
        """See the protocol."""
        for rank, part in enumerate(self._meet("lane", "fill", layout.part(whole, self.rank).clone())):
            if rank != self.rank:
                layout.part(whole, rank).copy_(part)

    def reduce_scatter(self, whole: torch.Tensor, into: torch.Tensor, layout: ShardLayout) -> None:
        """See the protocol."""
        place = layout.place(self.rank)
        first, *others = (layout.part(other, place) for other in self._meet("lane", "reduce", whole.clone()))
        into.copy_(first)
        for other in others:
            into.add_(other)

    def agree(self, values: Sequence[float]) -> Sequence[Sequence[float]]:
        """See the protocol."""
        return self._meet("agree", "agree", list(values))

    def agree_beside(self, values: Sequence[float]) -> Sequence[Sequence[float]]:
        """See the protocol."""
        return self._meet("beside", "agree beside", list(values))

    def stop(self, why: str) -> None:
        """See the protocol."""
        self._meeting.stop(why)


def on_all_ranks(meeting: Meeting, body: Callable[[int], T]) -> list[T | BaseException]:
    """What ``body`` returns on each rank, or what it raises, which stops the others."""
    found: list[T | BaseException] = [AssertionError("it hangs")] * meeting.n_ranks

    def run(rank: int) -> None:
        try:
            found[rank] = body(rank)
        except BaseException as error:
            found[rank] = error
            meeting.stop(f"rank {rank} raised {error!r}")

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(meeting.n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
    return found
