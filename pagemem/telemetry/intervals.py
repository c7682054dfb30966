"""Arithmetic on stretches of time, or of bytes. Pure; intervals are (begin, end) in seconds, in any order, and may
overlap."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import TypeVar

Interval = tuple[float, float]
Number = TypeVar("Number", int, float)


def clipped(intervals: Iterable[Interval], begin_s: float, end_s: float) -> list[Interval]:
    """What of each lies between ``begin_s`` and ``end_s``; those that have nothing there are left out."""
    cut = [(max(begin, begin_s), min(end, end_s)) for begin, end in intervals]
    return [(begin, end) for begin, end in cut if end > begin]


def union(intervals: Iterable[tuple[Number, Number]]) -> list[tuple[Number, Number]]:
    """The same time or bytes as disjoint intervals, in order."""
    found: list[tuple[Number, Number]] = []
    for begin, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def without(
    intervals: Iterable[tuple[Number, Number]], others: Iterable[tuple[Number, Number]]
) -> list[tuple[Number, Number]]:
    """What of ``intervals`` is not also the others', as disjoint intervals in order."""
    gaps: list[tuple[Number, Number]] = []
    taken, place = union(others), 0
    for begin, end in union(intervals):
        while place < len(taken) and taken[place][1] <= begin:
            place += 1
        look = place
        while look < len(taken) and taken[look][0] < end:
            if taken[look][0] > begin:
                gaps.append((begin, taken[look][0]))
            begin = max(begin, taken[look][1])
            look += 1
        if end > begin:
            gaps.append((begin, end))
    return gaps


def total_s(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one was under way."""
    return sum(end - begin for begin, end in union(intervals))


def shares(intervals: Iterable[Interval], begin_s: float, end_s: float, n_buckets: int) -> list[float]:
    """For each of ``n_buckets`` equal parts of the time, the share of it (0 to 1) in which at least one was under way.

    Raises:
        ValueError: there is no time, or no bucket.
    """
    if end_s <= begin_s or n_buckets < 1:
        raise ValueError(f"{n_buckets} buckets between {begin_s} and {end_s} s; there must be some of both")
    width_s = (end_s - begin_s) / n_buckets
    found = [0.0] * n_buckets
    for begin, end in union(clipped(intervals, begin_s, end_s)):
        first = min(int((begin - begin_s) / width_s), n_buckets - 1)
        last = min(int((end - begin_s) / width_s), n_buckets - 1)
        for bucket in range(first, last + 1):
            left_s = begin_s + bucket * width_s
            found[bucket] += max(0.0, min(end, left_s + width_s) - max(begin, left_s)) / width_s
    return [min(1.0, share) for share in found]


def tracks(intervals: Sequence[Interval]) -> list[int]:
    """A track for each, numbered from 0, so that no two on one track overlap; as few tracks as that takes."""
    found = [0] * len(intervals)
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    n_tracks = 0
    for index in sorted(range(len(intervals)), key=lambda index: intervals[index]):
        begin, end = intervals[index]
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            track = heapq.heappop(free)
        else:
            track, n_tracks = n_tracks, n_tracks + 1
        found[index] = track
        heapq.heappush(busy, (end, track))
    return found
