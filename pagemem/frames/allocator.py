"""Which tensor has which frames of one tier. Pure integer arithmetic: no device, thread or file.

A tensor takes whole pages, in one run where there is one. What is left over, less than a page, takes a page of its own
in a *contiguous* placement, which compute sees as one flat view; in any other it may share a page with the left-over of
one other tensor. How many bytes of a tier may be used at all is the business of `pagemem.budget`.

Invariants
    1. Every frame is in exactly one of: a free run, a run of one tensor, the set of shared pages.
    2. A shared page holds one or two tails that do not overlap.
    3. A call that returns `Shortage` or raises ValueError has changed nothing.

Two tenants a page: Angel-PTM (VLDB 2023), page abstraction. Best fit with joined neighbours: Knuth, TAOCP 1, 2.5.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import replace

from sortedcontainers import SortedDict

from pagemem.frames.free_runs import FreeRuns, SharedPages
from pagemem.frames.page import Extent, FrameId, FrameRun, Placement, Shortage, TensorId
from pagemem.tier import Tier
from pagemem.units import BLOCK_BYTES, ceil_div, round_up


class PageAllocator:
    """Gives out the frames of one tier. Not thread safe: its owner's lock guards it.

    A call takes O(log n) for each run touched unless it says otherwise.

    Args:
        tier: named in errors.
        page_bytes: a power of two, at least 64 KiB.
        n_frames: frames to begin with; `grow` adds more.

    Attributes:
        free: the free runs; to be changed by methods of this class only.
        shared: the pages that hold tails; likewise.
        placements: what each tensor owns here; likewise.
        peak_frames: most frames in use at any time.
    """

    def __init__(self, tier: Tier, page_bytes: int, n_frames: int) -> None:
        self.tier = tier
        self.page_bytes = page_bytes
        self.n_frames = 0
        self.peak_frames = 0
        self.free = FreeRuns()
        self.shared = SharedPages(page_bytes)
        self.placements: dict[TensorId, Placement] = {}
        # Start of every run -> its length and owner. Runs of frames only; shared pages are apart.
        self._runs: SortedDict[int, tuple[int, TensorId]] = SortedDict()
        self.grow(n_frames)

    # ---- taking and giving back --------------------------------------------------------------------------------

    def allocate(
        self, tensor: TensorId, n_bytes: int, *, contiguous: bool = False, at: FrameId | None = None
    ) -> Placement | Shortage:
        """Give ``tensor`` frames for ``n_bytes`` bytes.

        Args:
            contiguous: one run of whole frames, shared with nobody.
            at: first frame of exactly that run; implies ``contiguous``.

        Returns:
            The placement, or a shortage: too few frames are free, or (contiguous) too few side by side or at ``at``.

        Raises:
            ValueError: the size is not positive, or the tensor has frames in this tier already.
        """
        if n_bytes <= 0:
            raise ValueError(f"tensor {tensor}: n_bytes is {n_bytes}; it must be positive")
        if tensor in self.placements:
            raise ValueError(f"tensor {tensor} has frames in the {self.tier.value} tier already; release it first")
        if not contiguous and at is None:
            return self._allocate_packed(tensor, n_bytes)
        wanted = ceil_div(n_bytes, self.page_bytes)
        start = self.free.best_fit(wanted) if at is None else at
        if start is None or not self.free.holds(start, wanted):
            return Shortage(self.tier, wanted, self.free_frames)
        return self.put(Placement(tensor, self.tier, n_bytes, (FrameRun(FrameId(start), wanted),)))

    def _allocate_packed(self, tensor: TensorId, n_bytes: int) -> Placement | Shortage:
        n_whole, tail_bytes = divmod(n_bytes, self.page_bytes)
        if round_up(tail_bytes, BLOCK_BYTES) == self.page_bytes:
            n_whole, tail_bytes = n_whole + 1, 0
        tail = self.shared.find_room(tail_bytes) if tail_bytes else None
        wanted = n_whole + (tail_bytes > 0 and tail is None)
        runs = self.free.fewest_pieces(n_whole)
        if runs is None or wanted > self.free_frames:
            return Shortage(self.tier, wanted, self.free_frames)
        placed = self.put(Placement(tensor, self.tier, n_bytes, runs))
        if tail_bytes and tail is None:  # looked for after the runs were taken
            frame = self.free.best_fit(1)
            assert frame is not None
            tail = Extent(FrameId(frame), 0, tail_bytes)
        return placed if tail is None else self._put_tail(tensor, tail)

    def put(self, placed: Placement) -> Placement:
        """Give a tensor that has nothing here what a placement says: frames that are free, a tail that has room.

        Raises:
            AssertionError: they are not, or it has not; the book is spoilt.
        """
        for run in placed.runs:
            self.free.take(run.first, run.n_frames)
            self._runs[run.first] = (run.n_frames, placed.tensor)
        self.placements[placed.tensor] = replace(placed, tail=None)
        self.peak_frames = max(self.peak_frames, self.used_frames)
        return placed if placed.tail is None else self._put_tail(placed.tensor, placed.tail)

    def _put_tail(self, tensor: TensorId, tail: Extent) -> Placement:
        """Add the tail to the runs that a tensor was given."""
        if tail.frame not in self.shared.tails:
            self.free.take(tail.frame, 1)
        self.shared.add(tail, tensor)
        placed = self.placements[tensor] = replace(self.placements[tensor], tail=tail)
        self.peak_frames = max(self.peak_frames, self.used_frames)
        return placed

    def release(self, tensor: TensorId) -> Placement:
        """Take all frames of a tensor back; a page shared with another stays that one's.

        Raises:
            KeyError: the tensor has no frames here.
        """
        placed = self.placements.pop(tensor)
        for run in placed.runs:
            del self._runs[run.first]
            self.free.add(run.first, run.n_frames)
        if placed.tail is not None and self.shared.remove(placed.tail, tensor):
            self.free.add(placed.tail.frame, 1)
        return placed

    def grow(self, n_frames: int) -> None:
        """Add ``n_frames`` free frames at the end; a tier never shrinks."""
        if n_frames:
            self.free.add(self.n_frames, n_frames)
            self.n_frames += n_frames

    # ---- looking -----------------------------------------------------------------------------------------------

    def owner(self, frame: int) -> TensorId | None:
        """The tensor in a frame (of two in a shared page the one that came first), or None when it is free."""
        if frame in self.shared.tails:
            return self.shared.tails[frame][0][1]
        place = self._runs.bisect_right(frame) - 1
        if place < 0:
            return None
        start, (length, tensor) = self._runs.peekitem(place)
        return tensor if frame < start + length else None

    def segments(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[FrameId, int, TensorId | None]]:
        """Maximal stretches of frames with one `owner` (None: free), in order, covering the tier or, cut off there,
        [begin, end).

        O(log n + stretches), and goes through all shared pages.
        """
        last = self.n_frames if end is None else min(end, self.n_frames)
        first, reached, owner = begin, begin, None
        for run_start, length, tensor in self.taken(begin, last):
            start = max(run_start, begin)
            if start > reached or tensor != owner:
                if reached > first:
                    yield FrameId(first), reached - first, owner
                if start > reached:
                    yield FrameId(reached), start - reached, None
                first, owner = start, tensor
            reached = min(run_start + length, last)
        if reached > first:
            yield FrameId(first), reached - first, owner
        if reached < last:
            yield FrameId(reached), last - reached, None

    def taken(self, begin: int = 0, end: int | None = None) -> Iterable[tuple[int, int, TensorId]]:
        """Runs and shared pages that touch the frames of [begin, end), in order of place: start, length, owner; cost as
        `segments`."""
        last = self.n_frames if end is None else end
        runs = self._taken_runs(begin, last)
        if not self.shared.tails:
            return runs
        shared = [(frame, 1, tails[0][1]) for frame, tails in self.shared.tails.items() if begin <= frame < last]
        return heapq.merge(runs, sorted(shared))

    def _taken_runs(self, begin: int, end: int) -> Iterator[tuple[int, int, TensorId]]:
        place = max(0, self._runs.bisect_right(begin) - 1)
        for start in self._runs.islice(place, self._runs.bisect_left(end)):
            length, tensor = self._runs[start]
            if start + length > begin:
                yield start, length, tensor

    @property
    def free_frames(self) -> int:
        """Frames that nobody owns."""
        return self.free.n_frames

    @property
    def used_frames(self) -> int:
        """Frames that hold a tensor, or part of one."""
        return self.n_frames - self.free.n_frames
