"""Which tensor owns which frames of one tier. Pure integer arithmetic: no device, thread or file.

A tensor takes whole pages, in one run where there is one. What is left over, less than a page, takes a page of its own
in a *contiguous* placement, which compute sees as one flat view; in any other it shares a page with the left-over of one
other tensor. So a page never holds more than two tensors, and small pages are not needed to keep waste small.

Invariants
    1. Every frame is in exactly one of: a free run, a run of one tensor, the set of shared frames.
    2. A shared frame holds one or two tails that do not overlap.
    3. A call that returns `Shortage` or raises has changed nothing.

Two tenants a page: Angel-PTM (VLDB 2023), page abstraction. Best fit with joined neighbours: Knuth, TAOCP 1, 2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sortedcontainers import SortedDict, SortedList

from pagemem.free_runs import FreeRuns
from pagemem.page import Extent, FrameId, PageMove, Placement, Run, Shortage, TensorId
from pagemem.tier import Tier
from pagemem.units import BLOCK_BYTES, KiB, ceil_div, round_up
from pagemem.window import best_window

MIN_PAGE_BYTES = 64 * KiB


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """Memory that is taken but unused (internal), and free but scattered (external, 0 to 1)."""

    internal_bytes: int
    external_ratio: float


class PageAllocator:
    """Frames of one tier. Not thread safe: its owner's lock guards it.

    Args:
        tier: named in shortages.
        page_bytes: a power of two, at least 64 KiB.
        n_frames: frames to begin with; `grow` adds more.
    """

    def __init__(self, tier: Tier, page_bytes: int, n_frames: int) -> None:
        if page_bytes < MIN_PAGE_BYTES or page_bytes & (page_bytes - 1):
            raise ValueError(f"page_bytes is {page_bytes}; it must be a power of two and at least {MIN_PAGE_BYTES}")
        if n_frames < 0:
            raise ValueError(f"n_frames is {n_frames}; it cannot be negative")
        self.tier = tier
        self.page_bytes = page_bytes
        self.n_frames = 0
        self.peak_frames = 0
        self._free = FreeRuns()
        self._placements: dict[TensorId, Placement] = {}
        # Start frame -> owner of every run, and frame -> tails of every shared frame.
        self._runs: SortedDict[int, tuple[int, TensorId]] = SortedDict()
        self._shared: dict[int, list[tuple[Extent, TensorId]]] = {}
        # (bytes left behind the only tail, frame), for best fit among half-empty shared frames.
        self._room: SortedList[tuple[int, int]] = SortedList()
        if n_frames:
            self.grow(n_frames)

    # ---- taking and giving back --------------------------------------------------------------------------------

    def allocate(
        self, tensor: TensorId, n_bytes: int, *, contiguous: bool = False, at: FrameId | None = None
    ) -> Placement | Shortage:
        """Give ``tensor`` frames for ``n_bytes`` bytes.

        Args:
            contiguous: one run of whole frames, shared with nobody.
            at: first frame of exactly that run; implies ``contiguous``.

        Raises:
            ValueError: the size is not positive, or the tensor has frames in this tier already.
        """
        if n_bytes <= 0:
            raise ValueError(f"tensor {tensor}: n_bytes is {n_bytes}; it must be positive")
        if tensor in self._placements:
            raise ValueError(f"tensor {tensor} has frames in {self.tier.value} already")
        if contiguous or at is not None:
            placed = self._allocate_run(tensor, n_bytes, at)
        else:
            placed = self._allocate_packed(tensor, n_bytes)
        if isinstance(placed, Placement):
            self._placements[tensor] = placed
            self.peak_frames = max(self.peak_frames, self.used_frames)
        return placed

    def _allocate_run(self, tensor: TensorId, n_bytes: int, at: FrameId | None) -> Placement | Shortage:
        wanted = ceil_div(n_bytes, self.page_bytes)
        start = self._free.best_fit(wanted) if at is None else at
        if start is None or not self._free.take(start, wanted):
            return self._shortage(wanted)
        self._runs[start] = (wanted, tensor)
        return Placement(tensor, self.tier, n_bytes, (Run(FrameId(start), wanted),))

    def _allocate_packed(self, tensor: TensorId, n_bytes: int) -> Placement | Shortage:
        whole, left_bytes = divmod(n_bytes, self.page_bytes)
        tail_bytes = round_up(left_bytes, BLOCK_BYTES)
        if tail_bytes == self.page_bytes:
            whole, left_bytes, tail_bytes = whole + 1, 0, 0
        shared = self._frame_with_room(tail_bytes) if tail_bytes else None
        wanted = whole + (tail_bytes > 0 and shared is None)
        if wanted > self._free.n_frames:
            return self._shortage(wanted)
        runs: list[Run] = []
        while whole:
            start = self._free.best_fit(whole)
            length = whole
            if start is None:
                start, length = self._free.longest()
            self._free.take(start, length)
            self._runs[start] = (length, tensor)
            runs.append(Run(FrameId(start), length))
            whole -= length
        tail = self._place_tail(tensor, tail_bytes, shared) if tail_bytes else None
        return Placement(tensor, self.tier, n_bytes, tuple(runs), tail)

    def _frame_with_room(self, n_bytes: int) -> int | None:
        place = self._room.bisect_left((n_bytes, -1))
        return self._room[place][1] if place < len(self._room) else None

    def _place_tail(self, tensor: TensorId, n_bytes: int, shared: int | None) -> Extent:
        if shared is None:
            frame = self._free.best_fit(1)
            assert frame is not None
            self._free.take(frame, 1)
            tail = Extent(FrameId(frame), 0, n_bytes)
            self._shared[frame] = [(tail, tensor)]
            self._set_room(frame)
            return tail
        self._clear_room(shared)
        (other, _), = self._shared[shared]
        # The second tail lies on whichever side of the first is free; after a release that may be the front.
        offset = other.length_bytes if other.offset_bytes == 0 else 0
        tail = Extent(FrameId(shared), offset, n_bytes)
        self._shared[shared].append((tail, tensor))
        return tail

    def _room_of(self, frame: int) -> int:
        (only, _), = self._shared[frame]
        return self.page_bytes - only.length_bytes if only.offset_bytes == 0 else only.offset_bytes

    def _set_room(self, frame: int) -> None:
        self._room.add((self._room_of(frame), frame))

    def _clear_room(self, frame: int) -> None:
        self._room.remove((self._room_of(frame), frame))

    def release(self, tensor: TensorId) -> Placement:
        """Take all frames of a tensor back; a frame shared with another stays that one's.

        Raises:
            KeyError: the tensor has no frames here.
        """
        placed = self._placements.pop(tensor)
        for run in placed.runs:
            del self._runs[run.first]
            self._free.add(run.first, run.n_frames)
        if placed.tail is not None:
            frame = placed.tail.frame
            tails = self._shared[frame]
            if len(tails) == 1:
                self._clear_room(frame)
                del self._shared[frame]
                self._free.add(frame, 1)
            else:
                self._shared[frame] = [entry for entry in tails if entry[1] != tensor]
                self._set_room(frame)
        return placed

    def grow(self, n_frames: int) -> None:
        """Add ``n_frames`` free frames at the end."""
        self._free.add(self.n_frames, n_frames)
        self.n_frames += n_frames

    # ---- moving inside the tier --------------------------------------------------------------------------------

    def move(self, tensor: TensorId, to: FrameId) -> list[PageMove] | Shortage:
        """Give a tensor the free run of frames from ``to`` on instead of what it has.

        Returns:
            The copies to make, one a page, in order; the source frames may be overwritten once all are made.

        Raises:
            KeyError: the tensor has no frames here.
        """
        placed = self._placements[tensor]
        sources = placed.extents(self.page_bytes)
        wanted = ceil_div(placed.n_bytes, self.page_bytes)
        if not self._free.take(to, wanted):
            return self._shortage(wanted)
        self._free.add(to, wanted)
        self.release(tensor)
        moved = self.allocate(tensor, placed.n_bytes, at=to)
        if isinstance(moved, Shortage):
            raise AssertionError(f"frames {to}..{to + wanted} were free a moment ago")
        return _copies(tensor, sources, to, self.page_bytes)

    def merge(self, tensor: TensorId, *, movable: Callable[[TensorId], bool]) -> list[PageMove] | Shortage:
        """Make a tensor contiguous: in a free run if there is one, else in a window whose tenants move elsewhere.

        Args:
            movable: whether another tensor may be moved.

        Returns:
            The copies to make, in order: each target is free when its turn comes. Empty when nothing is to be done.
        """
        placed = self._placements[tensor]
        if placed.contiguous and placed.tail is None:
            return []
        wanted = ceil_div(placed.n_bytes, self.page_bytes)
        start = self._free.best_fit(wanted)
        if start is not None:
            return self.move(tensor, FrameId(start))
        window = best_window(
            list(self.segments()),
            wanted,
            lambda tenant: tenant != tensor and movable(tenant) and self._placements[tenant].contiguous,
            lambda tenants: sum(self._placements[tenant].n_bytes for tenant in tenants),
        )
        if window is None:
            return self._shortage(wanted)
        return self._clear_and_move(tensor, window.first, wanted, window.tenants)

    def _clear_and_move(
        self, tensor: TensorId, first: FrameId, wanted: int, tenants: tuple[TensorId, ...]
    ) -> list[PageMove] | Shortage:
        """Move tenants out of a window, then ``tensor`` into it; undo everything when one of them finds no place."""
        moves: list[PageMove] = []
        moved: list[tuple[TensorId, FrameId]] = []
        gaps = [(start, length) for start, length in _overlap(self._free.runs(), first, first + wanted)]
        for start, length in gaps:
            self._free.take(start, length)
        result: list[PageMove] | Shortage = moves
        for tenant in sorted(tenants, key=lambda t: -self._placements[t].n_frames):
            home = self._placements[tenant].runs[0]
            home_start = self._free.best_fit(home.n_frames)
            step = self._shortage(home.n_frames) if home_start is None else self.move(tenant, FrameId(home_start))
            if isinstance(step, Shortage):
                result = step
                break
            moves += step
            moved.append((tenant, home.first))
            inside = [run for run in _overlap(self._free.runs(), first, first + wanted)]
            for start, length in inside:
                self._free.take(start, length)
                gaps.append((start, length))
        for start, length in gaps:
            self._free.add(start, length)
        if isinstance(result, Shortage):
            for tenant, home_first in reversed(moved):
                self.move(tenant, home_first)
            return result
        last = self.move(tensor, first)
        if isinstance(last, Shortage):
            raise AssertionError(f"window {first}..{first + wanted} was cleared but is not free")
        return moves + last

    # ---- looking -----------------------------------------------------------------------------------------------

    def placement(self, tensor: TensorId) -> Placement | None:
        """What the tensor owns here, or None."""
        return self._placements.get(tensor)

    def __contains__(self, tensor: TensorId) -> bool:
        return tensor in self._placements

    def tensors(self) -> list[TensorId]:
        """Every tensor with frames here."""
        return list(self._placements)

    def owner(self, frame: int) -> TensorId | None:
        """The tensor at the beginning of a frame (the first of two in a shared one), or None when it is free."""
        if frame in self._shared:
            return self._shared[frame][0][1]
        place = self._runs.bisect_right(frame) - 1
        if place < 0:
            return None
        start, (length, tensor) = self._runs.peekitem(place)
        return tensor if frame < start + length else None

    def segments(self) -> Iterator[tuple[FrameId, int, TensorId | None]]:
        """Maximal stretches of frames with one owner (None: free), in order, covering the tier."""
        taken = [(start, length, tensor) for start, (length, tensor) in self._runs.items()]
        if self._shared:
            taken += [(frame, 1, tails[0][1]) for frame, tails in self._shared.items()]
            taken.sort()
        position = 0
        for start, length, tensor in taken:
            if start > position:
                yield FrameId(position), start - position, None
            yield FrameId(start), length, tensor
            position = start + length
        if position < self.n_frames:
            yield FrameId(position), self.n_frames - position, None

    @property
    def free_frames(self) -> int:
        """Frames that nobody owns."""
        return self._free.n_frames

    @property
    def used_frames(self) -> int:
        """Frames that hold a tensor, or part of one."""
        return self.n_frames - self._free.n_frames

    @property
    def largest_free_run(self) -> int:
        """Frames of the longest free run."""
        return self._free.longest()[1]

    def fragmentation(self) -> Fragmentation:
        """Waste inside pages, and the share of free frames outside the longest free run."""
        asked_bytes = sum(placed.n_bytes for placed in self._placements.values())
        free = self.free_frames
        return Fragmentation(self.used_frames * self.page_bytes - asked_bytes, 1 - self.largest_free_run / free if free else 0.0)

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one does not hold; the message names the frame or tensor.
        """
        self._free.validate()
        owners: dict[int, list[TensorId]] = {}
        for tensor, placed in self._placements.items():
            for extent in placed.extents(self.page_bytes):
                owners.setdefault(extent.frame, []).append(tensor)
            for run in placed.runs:
                if self._runs.get(run.first) != (run.n_frames, tensor):
                    raise AssertionError(f"tensor {tensor}: run {run} is not in the index of runs")
            if placed.tail is not None and (placed.tail, tensor) not in self._shared[placed.tail.frame]:
                raise AssertionError(f"tensor {tensor}: tail {placed.tail} is not in the index of shared frames")
        for frame, tenants in owners.items():
            if len(tenants) > 2 or (len(tenants) == 2 and frame not in self._shared):
                raise AssertionError(f"frame {frame} holds tensors {tenants}")
        for frame, tails in self._shared.items():
            if len(tails) == 2 and not _apart(tails[0][0], tails[1][0]):
                raise AssertionError(f"frame {frame}: tails {tails} overlap")
        if len(owners) != self.used_frames:
            raise AssertionError(f"{len(owners)} frames are owned, {self.used_frames} are not free")
        room = sorted((self._room_of(frame), frame) for frame, tails in self._shared.items() if len(tails) == 1)
        if room != list(self._room):
            raise AssertionError("the index of room in shared frames is wrong")

    def _shortage(self, wanted: int) -> Shortage:
        return Shortage(self.tier, wanted, self.free_frames, self.largest_free_run)


def _apart(a: Extent, b: Extent) -> bool:
    low, high = sorted((a, b), key=lambda extent: extent.offset_bytes)
    return low.offset_bytes + low.length_bytes <= high.offset_bytes


def _overlap(runs: list[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """Parts of runs that lie in [begin, end)."""
    cut = [(max(start, begin), min(start + length, end)) for start, length in runs]
    return [(low, high - low) for low, high in cut if low < high]


def _copies(tensor: TensorId, sources: list[Extent], to: int, page_bytes: int) -> list[PageMove]:
    return [
        PageMove(tensor, source, Extent(FrameId(to + number), 0, source.length_bytes)) for number, source in enumerate(sources)
    ]
