"""Packing: small tensors into units, units into pages, and pages of a tier closer together. Pure arithmetic.

`pack_units` and `choose_page_bytes` decide before there are pages. `Tenancy` and `safe_order` are the two halves of
making room for one flat view in a tier that has none: which frames are cheapest to clear, and in what order pages can be
copied. Who owns what is not kept here, see `pagemem.allocator`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from pagemem.free_runs import FreeRuns, overlap
from pagemem.page import Extent, FrameId, PageMove, TensorId
from pagemem.units import KiB, MiB, round_up

MIN_PAGE_BYTES: Final = 64 * KiB
#: What `choose_page_bytes` chooses from ends here: longer requests are hardly faster, and more is lost by rounding.
MAX_CHOSEN_PAGE_BYTES: Final = 4 * MiB
#: Bytes that rounding may add to each byte asked for, and frames a budget must hold for moves to find places.
MAX_WASTE_RATIO: Final = 0.03
MIN_FRAMES: Final = 256
#: Windows offered for clearing, cheapest first: whether the tenants of one find places elsewhere is a packing problem.
MAX_WINDOWS: Final = 256


def pack_units(sizes_bytes: Sequence[int], page_bytes: int, *, across_large: bool = False) -> list[list[int]]:
    """Group items, in order, into units: small neighbours join while their sum stays within one page.

    Args:
        sizes_bytes: size of each item, in the order of use.
        page_bytes: items of at least this size are units by themselves.
        across_large: whether small items may join with a large one between them. Wastes less, but the page of such a
            unit is needed for longer.

    Returns:
        Indices into ``sizes_bytes``, a list a unit, units ordered by their first item.

    Raises:
        ValueError: a size or the page size is not positive.
    """
    if page_bytes <= 0 or any(size <= 0 for size in sizes_bytes):
        raise ValueError(f"sizes must be positive; the page has {page_bytes} bytes, the smallest item {min(sizes_bytes, default=0)}")
    units: list[list[int]] = []
    open_unit: list[int] | None = None
    open_bytes = 0
    for item, size_bytes in enumerate(sizes_bytes):
        if size_bytes >= page_bytes:
            units.append([item])
            open_unit = open_unit if across_large else None
        elif open_unit is not None and open_bytes + size_bytes <= page_bytes:
            open_unit.append(item)
            open_bytes += size_bytes
        else:
            open_unit, open_bytes = [item], size_bytes
            units.append(open_unit)
    return units


def rounding_ratio(unit_bytes: Sequence[int], page_bytes: int) -> float:
    """Bytes added by rounding every unit up to whole pages, for each byte asked for; 0 when nothing is."""
    asked_bytes = sum(unit_bytes)
    added_bytes = sum(round_up(n_bytes, page_bytes) - n_bytes for n_bytes in unit_bytes)
    return added_bytes / asked_bytes if asked_bytes else 0.0


def choose_page_bytes(unit_bytes: Sequence[int], budget_bytes: int) -> int:
    """The largest page that wastes little when every unit takes whole pages of its own, as flat views do.

    Args:
        unit_bytes: size of each unit.
        budget_bytes: what the tier may use.

    Returns:
        The largest power of two from 64 KiB to 4 MiB for which rounding adds at most 3 % and the budget holds at least
        256 frames; 64 KiB when there is none.

    Raises:
        ValueError: a size or the budget is not positive.
    """
    if budget_bytes <= 0 or any(n_bytes <= 0 for n_bytes in unit_bytes):
        raise ValueError(f"sizes must be positive; the budget has {budget_bytes} bytes, the smallest unit {min(unit_bytes, default=0)}")
    page_bytes = MAX_CHOSEN_PAGE_BYTES
    while page_bytes > MIN_PAGE_BYTES:
        if budget_bytes // page_bytes >= MIN_FRAMES and rounding_ratio(unit_bytes, page_bytes) <= MAX_WASTE_RATIO:
            break
        page_bytes //= 2
    return page_bytes


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

    All ``n_bytes`` leave, or, when ``bytes_a_frame`` is set, that much for each frame in the window. ``stays``: nothing may.
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
