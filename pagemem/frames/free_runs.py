"""The free space of one tier: runs of whole free frames, and the room left in frames that hold parts of pages.

Both are indexed by place and by size, so that the best fit is found in O(log n). Which tensor gets what is the
allocator's decision (`pagemem.frames.allocator`); here are only integers and the records of `pagemem.frames.page`.
"""

from __future__ import annotations

from sortedcontainers import SortedDict, SortedList

from pagemem.frames.page import Extent, FrameId, FrameRun, TensorId
from pagemem.units import BLOCK_BYTES, round_up


class FreeRuns:
    """Maximal runs of adjacent free frames; neighbours are joined as soon as they touch. Not thread safe."""

    def __init__(self) -> None:
        self.by_start: SortedDict[int, int] = SortedDict()
        self._by_length: SortedList[tuple[int, int]] = SortedList()
        self.n_frames = 0

    def add(self, start: int, length: int) -> None:
        """Free ``length`` >= 1 frames from ``start`` on.

        Raises:
            AssertionError: one of them is free already; nothing was changed.
        """
        place = self.by_start.bisect_left(start)
        after = self.by_start.peekitem(place) if place < len(self.by_start) else None
        before = self.by_start.peekitem(place - 1) if place else None
        if (after is not None and after[0] < start + length) or (before is not None and sum(before) > start):
            raise AssertionError(f"frames {start}..{start + length - 1} are partly free already")
        self.n_frames += length
        if after is not None and after[0] == start + length:
            self._remove(*after)
            length += after[1]
        if before is not None and sum(before) == start:
            self._remove(*before)
            start, length = before[0], before[1] + length
        self._insert(start, length)

    def holds(self, start: int, length: int) -> bool:
        """Whether exactly these frames are all free."""
        run = self._run_at(start)
        return run is not None and start + length <= sum(run)

    def take(self, start: int, length: int) -> None:
        """Take exactly these frames.

        Raises:
            AssertionError: one of them is not free; nothing was changed.
        """
        run = self._run_at(start)
        if run is None or sum(run) < start + length:
            raise AssertionError(f"frames {start}..{start + length - 1} are not all free")
        self._remove(*run)
        self.n_frames -= length
        if run[0] < start:
            self._insert(run[0], start - run[0])
        if start + length < sum(run):
            self._insert(start + length, sum(run) - start - length)

    def best_fit(self, length: int) -> int | None:
        """Start of the shortest run that holds ``length`` frames, the lowest of equals; None when there is none."""
        place = self._by_length.bisect_left((length, -1))
        return self._by_length[place][1] if place < len(self._by_length) else None

    def fewest_pieces(self, length: int) -> tuple[FrameRun, ...] | None:
        """Free frames, ``length`` in all, in as few runs as can be, in order of place; None when there are not that
        many."""
        if length > self.n_frames:
            return None
        pieces: list[FrameRun] = []
        while length:
            run_length, run_start = self._by_length[-1 - len(pieces)]
            if run_length >= length:
                # The best fit comes no later in the index than this run, so it is none of those chosen before.
                place = self._by_length.bisect_left((length, -1))
                run_length, run_start = length, self._by_length[place][1]
            pieces.append(FrameRun(FrameId(run_start), run_length))
            length -= run_length
        return tuple(sorted(pieces, key=lambda piece: piece.first))

    def _run_at(self, frame: int) -> tuple[int, int] | None:
        """The run that begins at or last before ``frame``."""
        place = self.by_start.bisect_right(frame) - 1
        return self.by_start.peekitem(place) if place >= 0 else None

    def _insert(self, start: int, length: int) -> None:
        self.by_start[start] = length
        self._by_length.add((length, start))

    def _remove(self, start: int, length: int) -> None:
        del self.by_start[start]
        self._by_length.remove((length, start))


class SharedPages:
    """Frames that hold *tails*, the parts of pages left over by at most two tensors each. Not thread safe.

    Args:
        page_bytes: size of a frame.

    Attributes:
        tails: what each of these frames holds, the first come first; to be changed by methods of this class only.
    """

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self.tails: dict[int, tuple[tuple[Extent, TensorId], ...]] = {}
        # (bytes beside the only tail, frame); frames with two tails are not in it.
        self._room: SortedList[tuple[int, int]] = SortedList()

    def find_room(self, length_bytes: int) -> Extent | None:
        """The place beside a tail that fits ``length_bytes`` most closely, or None. Takes nothing."""
        place = self._room.bisect_left((length_bytes, -1))
        if place == len(self._room):
            return None
        _, frame = self._room[place]
        return Extent(FrameId(frame), self._gap(frame)[0], length_bytes)

    def add(self, tail: Extent, tensor: TensorId) -> None:
        """Record a tail; its frame becomes a shared one if it is not yet.

        Raises:
            AssertionError: the frame holds two tails, or one that overlaps; nothing was changed.
        """
        there = self.tails.get(tail.frame, ())
        if len(there) > 1 or any(_overlap(tail, other) for other, _ in there):
            raise AssertionError(f"{tail} of tensor {tensor} does not fit beside {there}")
        if there:
            self._room.remove((self._gap(tail.frame)[1], tail.frame))
        self.tails[tail.frame] = (*there, (tail, tensor))
        if not there:
            self._room.add((self._gap(tail.frame)[1], tail.frame))

    def remove(self, tail: Extent, tensor: TensorId) -> bool:
        """Forget a tail; True when its frame is empty now, and none of these any more."""
        there = self.tails[tail.frame]
        if len(there) == 1:
            self._room.remove((self._gap(tail.frame)[1], tail.frame))
            del self.tails[tail.frame]
            return True
        self.tails[tail.frame] = tuple(entry for entry in there if entry != (tail, tensor))
        self._room.add((self._gap(tail.frame)[1], tail.frame))
        return False

    def _gap(self, frame: int) -> tuple[int, int]:
        """Offset and length of the room beside a frame's only tail, in whole blocks: one of two tails begins at 0."""
        ((tail, _),) = self.tails[frame]
        if tail.offset_bytes:
            return 0, tail.offset_bytes
        end_bytes = round_up(tail.length_bytes, BLOCK_BYTES)
        return end_bytes, self._page_bytes - end_bytes


def _overlap(a: Extent, b: Extent) -> bool:
    """Whether two extents have a byte in common."""
    begin, end = (
        max(a.offset_bytes, b.offset_bytes),
        min(a.offset_bytes + a.length_bytes, b.offset_bytes + b.length_bytes),
    )
    return a.frame == b.frame and begin < end
