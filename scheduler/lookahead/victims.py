"""Tenants of a tier in the order in which they had best leave: furthest next use first (Belady). Pure.

Where memory has thousands of tenants they cannot all be ranked for every load. Two orders are kept instead: of all
tenants, and of the *settled* ones, whose frames are free to be overwritten because nothing, or nothing any more, has to
be copied out first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Final

from sortedcontainers import SortedList

from pagemem.frames.page import TensorId

#: Settled tenants that are named before all others.
SETTLED_FIRST: Final = 6

_Entry = tuple[float, TensorId]


@dataclass(slots=True)
class Victims:
    """Who may leave, and in which order. All methods are O(log n)."""

    _next_use: dict[TensorId, float] = field(default_factory=dict)
    _clean_at_s: dict[TensorId, float] = field(default_factory=dict)  # of those that are not settled
    _all: SortedList[_Entry] = field(default_factory=SortedList)
    _settled: SortedList[_Entry] = field(default_factory=SortedList)
    _settling: list[_Entry] = field(default_factory=list)  # a heap; entries may be out of date

    def used(self, tensor: TensorId, next_use: float) -> None:
        """A tenant has been used, and is again at op ``next_use``; infinite if what it holds is of no use any more."""
        self._take_out(tensor)
        if next_use == math.inf:
            self._clean_at_s.pop(tensor, None)
        self._next_use[tensor] = next_use
        self._all.add((-next_use, tensor))
        if tensor not in self._clean_at_s:
            self._settled.add((-next_use, tensor))

    def changed(self, tensor: TensorId, clean_at_s: float) -> None:
        """A tenant has changed; its copy out will be over at ``clean_at_s``."""
        self._settled.discard((-self._next_use[tensor], tensor))
        self._clean_at_s[tensor] = clean_at_s
        heapq.heappush(self._settling, (clean_at_s, tensor))

    def left(self, tensor: TensorId) -> None:
        """A tenant is gone."""
        self._take_out(tensor)
        self._next_use.pop(tensor, None)
        self._clean_at_s.pop(tensor, None)

    def settle(self, until_s: float) -> None:
        """Copies out that are over by then are over."""
        while self._settling and self._settling[0][0] <= until_s:
            clean_at_s, tensor = heapq.heappop(self._settling)
            if self._clean_at_s.get(tensor) == clean_at_s:
                del self._clean_at_s[tensor]
                self._settled.add((-self._next_use[tensor], tensor))

    def in_order(self) -> Iterator[TensorId]:
        """The best settled ones, and then all; some are named twice."""
        return (tensor for _, tensor in chain(islice(self._settled, SETTLED_FIRST), self._all))

    def _take_out(self, tensor: TensorId) -> None:
        before = self._next_use.get(tensor)
        if before is not None:
            self._all.discard((-before, tensor))
            self._settled.discard((-before, tensor))
