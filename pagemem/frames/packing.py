"""Packing the pages of a tier closer together. Pure arithmetic.

`Tenancy` and `safe_order` are the two halves of making room for one flat view in a tier that has none: which frames are
cheapest to clear, and in what order pages can be copied. Who owns what is not kept here, see `pagemem.frames.book`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from pagemem.frames.free_runs import FreeRuns, overlap
from pagemem.frames.page import Extent, FrameId, PageMove, TensorId

#: Windows offered for clearing, cheapest first: whether the tenants of one find places elsewhere is a packing problem.
MAX_WINDOWS: Final = 256


def in_place_bytes(extents: Sequence[Extent]) -> dict[int, int]:
    """First frame of a window -> bytes that would already lie where they belong in it."""
    found: dict[int, int] = {}
    for page, extent in enumerate(extents):
        if extent.offset_bytes == 0:
            first = extent.frame - page
            found[first] = found.get(first, 0) + extent.length_bytes
    return found


@dataclass(frozen=True, slots=True)
class Stretch:
    """Frames [begin, end) that are not free, and what leaves when a window has one of them.

    All ``n_bytes`` leave, or, when ``bytes_a_frame`` is set, that much for each frame in the window. ``stays``: nothing
    may.
    """

    begin: int
    end: int
    tenants: tuple[TensorId, ...]
    n_bytes: int
    bytes_a_frame: int
    stays: bool


class Tenancy:
    """The taken stretches of a tier in order, with sums that price any window of frames in O(log n)."""

    def __init__(self, stretches: Iterable[Stretch]) -> None:
        self._all = list(stretches)
        self._begins = [stretch.begin for stretch in self._all]
        self._ends = [stretch.end for stretch in self._all]
        self._bytes = [0, *accumulate(stretch.n_bytes for stretch in self._all)]
        self._staying = [0, *accumulate(stretch.stays for stretch in self._all)]

    def windows(
        self, n_frames: int, end: int, in_place: dict[int, int]
    ) -> Iterator[tuple[FrameId, tuple[TensorId, ...]]]:
        """First frame and tenants of the `MAX_WINDOWS` cheapest windows in [0, ``end``), cheapest and lowest first."""
        # Sliding a window changes its price at the ends of stretches only, so all others cost at least as much.
        firsts = {0, end - n_frames, *self._ends, *(begin - n_frames for begin in self._begins), *in_place}
        priced = ((self._price(first, n_frames, in_place), first) for first in firsts if 0 <= first <= end - n_frames)
        for _, first in heapq.nsmallest(MAX_WINDOWS, ((price, first) for price, first in priced if price is not None)):
            there = self._all[slice(*self._span(first, n_frames))]
            yield FrameId(first), tuple(dict.fromkeys(tenant for stretch in there for tenant in stretch.tenants))

    def _span(self, first: int, n_frames: int) -> tuple[int, int]:
        return bisect_right(self._ends, first), bisect_left(self._begins, first + n_frames)

    def _price(self, first: int, n_frames: int, in_place: dict[int, int]) -> int | None:
        """Bytes to copy away, less those of the tensor that need not be copied; None when a tenant stays."""
        low, high = self._span(first, n_frames)
        if self._staying[high] != self._staying[low]:
            return None
        price = self._bytes[high] - self._bytes[low] - in_place.get(first, 0)
        if low < high:
            left, right = self._all[low], self._all[high - 1]
            price -= left.bytes_a_frame * max(0, first - left.begin)
            price -= right.bytes_a_frame * max(0, right.end - first - n_frames)
        return price


def safe_order(copies: Sequence[PageMove], free: FreeRuns) -> list[PageMove] | None:
    """Copies in an order in which none writes over what has not been copied yet.

    Copies that wait for each other in a ring are broken up by way of a spare frame, one that holds nothing just then.

    Args:
        copies: sources apart from each other, and targets too; a target may be what is a source of others.
        free: the free frames once all copies are made.

    Returns:
        The copies, with those to spare frames; None when a ring finds no spare frame.
    """
    lying = [copy.source for copy in copies]  # Where each one's bytes are.
    waits_for, waited_for_by = _who_waits(copies)
    spares = _Spares(free, lying)
    ready = [number for number in reversed(range(len(copies))) if not waits_for[number]]
    pending = dict.fromkeys(range(len(copies)))
    ordered: list[PageMove] = []
    while pending:
        if ready:
            number = ready.pop()
            del pending[number]
            target = copies[number].target
        else:
            number, spare = _in_a_ring(next(iter(pending)), waits_for), spares.take()
            if spare is None:
                return None
            target = Extent(FrameId(spare), 0, lying[number].length_bytes)
        ordered.append(PageMove(copies[number].tensor, lying[number], target))
        spares.left(lying[number].frame)
        lying[number] = target
        for other in waited_for_by[number]:
            waits_for[other].discard(number)
            if not waits_for[other]:
                ready.append(other)
        waited_for_by[number] = []
    return ordered


def _who_waits(copies: Sequence[PageMove]) -> tuple[list[set[int]], list[list[int]]]:
    """For each copy, by number: those whose sources lie in its target (perhaps itself), and those that wait for it."""
    at: dict[int, list[int]] = {}
    for number, copy in enumerate(copies):
        at.setdefault(copy.source.frame, []).append(number)
    waits_for: list[set[int]] = []
    waited_for_by: list[list[int]] = [[] for _ in copies]
    for number, copy in enumerate(copies):
        others = {other for other in at.get(copy.target.frame, ()) if overlap(copies[other].source, copy.target)}
        waits_for.append(others)
        for other in others:
            waited_for_by[other].append(number)
    return waits_for, waited_for_by


def _in_a_ring(number: int, waits_for: Sequence[set[int]]) -> int:
    """A copy that waits, through others, for itself; found by following what ``number`` waits for."""
    seen: set[int] = set()
    while number not in seen:
        seen.add(number)
        number = min(waits_for[number])
    return number


class _Spares:
    """Frames that are nobody's target and hold nothing at the moment, while copies are being put in order."""

    def __init__(self, free: FreeRuns, sources: Iterable[Extent]) -> None:
        self._free = free
        self._left_at = Counter(source.frame for source in sources)
        busy = frozenset(self._left_at)
        self._untouched = (f for start, length in free for f in range(start, start + length) if f not in busy)
        self._vacated: list[int] = []

    def take(self) -> int | None:
        frame = self._vacated.pop() if self._vacated else next(self._untouched, None)
        if frame is not None:
            self._left_at[FrameId(frame)] += 1
        return frame

    def left(self, frame: FrameId) -> None:
        """Note that one source in ``frame`` has been copied away."""
        self._left_at[frame] -= 1
        if not self._left_at[frame] and self._free.holds(frame, 1):
            self._vacated.append(frame)
