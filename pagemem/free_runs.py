"""The free frames of one tier, as maximal runs indexed by place and by length. Pure integers, O(log n) a call."""

from __future__ import annotations

from sortedcontainers import SortedDict, SortedList


class FreeRuns:
    """Maximal runs of adjacent free frames; neighbours are joined as soon as they touch."""

    def __init__(self) -> None:
        self._by_start: SortedDict[int, int] = SortedDict()
        self._by_length: SortedList[tuple[int, int]] = SortedList()
        self.n_frames = 0

    def add(self, start: int, length: int) -> None:
        """Free ``length`` frames from ``start`` on.

        Raises:
            AssertionError: one of them is free already; nothing was changed.
        """
        place = self._by_start.bisect_left(start)
        after = self._by_start.peekitem(place) if place < len(self._by_start) else None
        before = self._by_start.peekitem(place - 1) if place else None
        if (after is not None and after[0] < start + length) or (before is not None and sum(before) > start):
            raise AssertionError(f"frames {start}..{start + length} are partly free already")
        self.n_frames += length
        if after is not None and after[0] == start + length:
            self._remove(*after)
            length += after[1]
        if before is not None and sum(before) == start:
            self._remove(*before)
            start, length = before[0], before[1] + length
        self._insert(start, length)

    def take(self, start: int, length: int) -> bool:
        """Take exactly these frames; False, and nothing changed, when one of them is not free."""
        place = self._by_start.bisect_right(start) - 1
        if place < 0:
            return False
        run_start, run_length = self._by_start.peekitem(place)
        if run_start + run_length < start + length:
            return False
        self._remove(run_start, run_length)
        self.n_frames -= length
        if run_start < start:
            self._insert(run_start, start - run_start)
        if start + length < run_start + run_length:
            self._insert(start + length, run_start + run_length - start - length)
        return True

    def best_fit(self, length: int) -> int | None:
        """Start of the shortest run that holds ``length`` frames, the lowest of equals."""
        place = self._by_length.bisect_left((length, -1))
        return self._by_length[place][1] if place < len(self._by_length) else None

    def longest(self) -> tuple[int, int]:
        """Start and length of a longest run; (0, 0) when nothing is free."""
        if not self._by_length:
            return (0, 0)
        length, start = self._by_length[-1]
        return start, length

    def runs(self) -> list[tuple[int, int]]:
        """All runs as (start, length), in order of place."""
        return list(self._by_start.items())

    def validate(self) -> None:
        """Raise AssertionError when the two indices differ or runs touch."""
        if sorted((length, start) for start, length in self._by_start.items()) != list(self._by_length):
            raise AssertionError("free runs: the index by length is not that by place")
        if sum(self._by_start.values()) != self.n_frames:
            raise AssertionError(f"free runs: {self.n_frames} frames counted, {sum(self._by_start.values())} listed")
        end = -1
        for start, length in self._by_start.items():
            if start <= end or length <= 0:
                raise AssertionError(f"free runs: ({start}, {length}) touches the run before it or is empty")
            end = start + length

    def _insert(self, start: int, length: int) -> None:
        self._by_start[start] = length
        self._by_length.add((length, start))

    def _remove(self, start: int, length: int) -> None:
        del self._by_start[start]
        self._by_length.remove((length, start))
