"""Which tensor owns which frames of one tier. Pure integer arithmetic: no device, thread or file.

A tensor takes whole pages, in one run where there is one. What is left over, less than a page, takes a page of its own
in a *contiguous* placement, which compute sees as one flat view; in any other it may share a page with the left-over of
one other tensor. Nothing is copied here: `move` and `merge` change who owns what and return the copies that the caller
must make, in order, before it uses the frames for anything else.

Invariants
    1. Every frame is in exactly one of: a free run, a run of one tensor, the set of shared pages.
    2. A shared page holds one or two tails that do not overlap.
    3. A call that returns `Shortage` or raises has changed nothing.
    4. In a list of copies, made in order, none writes where bytes lie that have not been copied away.

Two tenants a page: Angel-PTM (VLDB 2023), page abstraction. Best fit with joined neighbours: Knuth, TAOCP 1, 2.5.
Where free space is, is `pagemem.free_runs`; which frames are cheapest to clear and in what order pages can be copied,
`pagemem.packing`; how many bytes of a tier may be used at all, `pagemem.budget`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sortedcontainers import SortedDict

from pagemem.free_runs import FreeRuns, SharedPages
from pagemem.packing import Stretch, Tenancy, in_place_bytes, safe_order
from pagemem.page import MIN_PAGE_BYTES, Extent, FrameId, PageMove, Placement, Run, Shortage, TensorId
from pagemem.tier import Tier
from pagemem.units import BLOCK_BYTES, ceil_div, round_up


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """Memory that is taken but unused (internal), and free but scattered (external).

    Attributes:
        asked_bytes: what the tensors asked for.
        internal_bytes: bytes of used frames beyond that.
        external_ratio: share of the free frames outside the longest free run, 0 to 1; 0 when nothing is free.
    """

    asked_bytes: int
    internal_bytes: int
    external_ratio: float

    @property
    def internal_ratio(self) -> float:
        """Unused bytes for each byte asked for; 0 when nothing is."""
        return self.internal_bytes / self.asked_bytes if self.asked_bytes else 0.0


class PageAllocator:
    """Frames of one tier. Not thread safe: its owner's lock guards it. O(log n) a call unless it says otherwise.

    Args:
        tier: named in shortages.
        page_bytes: a power of two, at least 64 KiB.
        n_frames: frames to begin with; `grow` adds more.

    Raises:
        ValueError: the page size or the number of frames is out of range.
    """

    def __init__(self, tier: Tier, page_bytes: int, n_frames: int) -> None:
        if page_bytes < MIN_PAGE_BYTES or page_bytes & (page_bytes - 1):
            raise ValueError(f"page_bytes is {page_bytes}; it must be a power of two and at least {MIN_PAGE_BYTES}")
        self.tier = tier
        self.page_bytes = page_bytes
        self.n_frames = 0
        self.peak_frames = 0
        self._asked_bytes = 0
        self._free = FreeRuns()
        self._shared = SharedPages(page_bytes)
        self._placements: dict[TensorId, Placement] = {}
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
        if tensor in self._placements:
            raise ValueError(f"tensor {tensor} has frames in the {self.tier.value} tier already; release it first")
        if not contiguous and at is None:
            return self._allocate_packed(tensor, n_bytes)
        wanted = ceil_div(n_bytes, self.page_bytes)
        start = self._free.best_fit(wanted) if at is None else at
        if start is None or not self._free.holds(start, wanted):
            return self._shortage(wanted)
        return self._put(self._flat(tensor, n_bytes, start))

    def _allocate_packed(self, tensor: TensorId, n_bytes: int) -> Placement | Shortage:
        n_whole, tail_bytes = divmod(n_bytes, self.page_bytes)
        if round_up(tail_bytes, BLOCK_BYTES) == self.page_bytes:
            n_whole, tail_bytes = n_whole + 1, 0
        shared = self._shared.find_room(tail_bytes) if tail_bytes else None
        wanted = n_whole + (tail_bytes > 0 and shared is None)
        runs = self._free.fewest_pieces(n_whole)
        if runs is None or wanted > self.free_frames:
            return self._shortage(wanted)
        self._put_runs(tensor, runs)
        tail = self._choose_tail(tail_bytes) if tail_bytes else None
        return self._put_rest(Placement(tensor, self.tier, n_bytes, runs, tail))

    def _choose_tail(self, length_bytes: int) -> Extent | None:
        """Room for a tail: beside another where it fits best, else a free frame; None when there is neither."""
        shared = self._shared.find_room(length_bytes)
        if shared is not None:
            return shared
        frame = self._free.best_fit(1)
        return None if frame is None else Extent(FrameId(frame), 0, length_bytes)

    def release(self, tensor: TensorId) -> Placement:
        """Take all frames of a tensor back; a page shared with another stays that one's.

        Raises:
            KeyError: the tensor has no frames here.
        """
        placed = self._placed(tensor)
        del self._placements[tensor]
        self._asked_bytes -= placed.n_bytes
        for run in placed.runs:
            del self._runs[run.first]
            self._free.add(run.first, run.n_frames)
        if placed.tail is not None and self._shared.remove(placed.tail, tensor):
            self._free.add(placed.tail.frame, 1)
        return placed

    def grow(self, n_frames: int) -> None:
        """Add ``n_frames`` free frames at the end.

        Raises:
            ValueError: the number is negative; a tier never shrinks.
        """
        if n_frames < 0:
            raise ValueError(f"n_frames is {n_frames}; it cannot be negative")
        if n_frames:
            self._free.add(self.n_frames, n_frames)
            self.n_frames += n_frames

    def _put(self, placed: Placement) -> Placement:
        """Make a placement whose frames are free, or have room, the tensor's."""
        self._put_runs(placed.tensor, placed.runs)
        return self._put_rest(placed)

    def _put_runs(self, tensor: TensorId, runs: Iterable[Run]) -> None:
        for run in runs:
            self._free.take(run.first, run.n_frames)
            self._runs[run.first] = (run.n_frames, tensor)

    def _put_rest(self, placed: Placement) -> Placement:
        if placed.tail is not None:
            if placed.tail.frame not in self._shared:
                self._free.take(placed.tail.frame, 1)
            self._shared.add(placed.tail, placed.tensor)
        self._placements[placed.tensor] = placed
        self._asked_bytes += placed.n_bytes
        self.peak_frames = max(self.peak_frames, self.used_frames)
        return placed

    # ---- moving inside the tier --------------------------------------------------------------------------------

    def move(self, tensor: TensorId, to: FrameId) -> list[PageMove] | Shortage:
        """Give a tensor the run of frames from ``to`` on, free or its own, instead of what it has.

        Returns:
            The copies to make, in order; a shortage when one of the frames is another's or does not exist.

        Raises:
            KeyError: the tensor has no frames here.
        """
        placed = self._placed(tensor)
        return self._relocate(self._flat(tensor, placed.n_bytes, to), ())

    def merge(self, tensor: TensorId, *, movable: Callable[[TensorId], bool]) -> list[PageMove] | Shortage:
        """Make a tensor contiguous: in a free run if there is one, else where the fewest bytes have to be copied.

        In the latter case it gets a window of frames whose tenants move elsewhere, contiguous ones staying contiguous,
        scattered ones by their pages in the window alone. O(runs of the tier) then.

        Args:
            movable: whether another tensor may be moved; asked once for each.

        Returns:
            The copies to make, in order; none when the tensor is contiguous already. A shortage when no window can be
            cleared, or none of the `packing.MAX_WINDOWS` cheapest.

        Raises:
            KeyError: the tensor has no frames here.
        """
        placed = self._placed(tensor)
        if placed.contiguous:
            return []
        wanted = ceil_div(placed.n_bytes, self.page_bytes)
        start = self._free.best_fit(wanted)
        if start is not None:
            return self._relocate(self._flat(tensor, placed.n_bytes, start), ())
        # Pages are never saved by moving whole ones, only by tails that end up sharing: mostly this ends it early.
        if wanted <= self.free_frames + placed.n_frames + self._shared.n_with_room:
            tenancy = Tenancy(self._tenants_in_order(tensor, movable))
            in_place = in_place_bytes(placed.extents(self.page_bytes))
            for first, tenants in tenancy.windows(wanted, self.n_frames, in_place):
                moves = self._relocate(self._flat(tensor, placed.n_bytes, first), tenants)
                if not isinstance(moves, Shortage):
                    return moves
        return self._shortage(wanted)

    def _relocate(self, target: Placement, tenants: Sequence[TensorId]) -> list[PageMove] | Shortage:
        """Put a tensor at ``target`` and the tenants of those frames elsewhere, or change nothing."""
        peak_frames = self.peak_frames
        before = [self.release(tensor) for tensor in (target.tensor, *tenants)]
        # A tenant that goes where the tensor comes from may have to wait in a third place: only if there is no other way.
        for avoided in (_outside(before[0], target.runs[0]), None) if tenants else (None,):
            if self._put_elsewhere(target, before[1:], avoided):
                copies = [copy for old in before for copy in self._copies(old, self._placements[old.tensor])]
                ordered = safe_order(copies, self._free)
                if ordered is not None:
                    self.peak_frames = max(peak_frames, self.used_frames)
                    return ordered
            for old in before:
                if old.tensor in self._placements:
                    self.release(old.tensor)
        for old in before:
            self._put(old)
        self.peak_frames = peak_frames  # What was tried and taken back was never in use.
        return self._shortage(target.n_frames)

    def _put_elsewhere(self, target: Placement, tenants: Sequence[Placement], avoided: Placement | None) -> bool:
        """Put ``target``, and released tenants around it and ``avoided``.

        Returns:
            False, with some of them put, when one finds no place.
        """
        (window,) = target.runs
        if not self._free.holds(window.first, window.n_frames):
            return False
        both = target if avoided is None else replace(target, runs=(window, *avoided.runs), tail=avoided.tail)
        self._put(both)
        flat = [old for old in tenants if old.tail is None and len(old.runs) == 1]
        scattered = [old for old in tenants if old.tail is not None or len(old.runs) > 1]
        for old in scattered:  # What lies outside the window stays: nobody else may take it.
            self._put(_outside(old, window))
        for old in sorted(flat, key=lambda old: -old.n_frames):
            start = self._free.best_fit(old.n_frames)
            if start is None:
                return False
            self._put(self._flat(old.tensor, old.n_bytes, start))
        if not all(self._put_scattered(old, window) for old in scattered):
            return False
        self.release(target.tensor)
        self._put(target)
        return True

    def _put_scattered(self, old: Placement, window: Run) -> bool:
        frames = [frame for run in old.runs for frame in range(run.first, run.first + run.n_frames)]
        displaced = [page for page, frame in enumerate(frames) if _inside(frame, window)]
        pieces = self._free.fewest_pieces(len(displaced))
        if pieces is None:
            return False
        fresh = (frame for piece in pieces for frame in range(piece.first, piece.first + piece.n_frames))
        for page, frame in zip(displaced, fresh):
            frames[page] = frame
        runs = _joined(frames)
        kept = self.release(old.tensor)
        self._put_runs(old.tensor, runs)
        tail = kept.tail
        if old.tail is not None and tail is None:
            tail = self._choose_tail(old.tail.length_bytes)
        self._put_rest(Placement(old.tensor, self.tier, old.n_bytes, runs, tail))
        return (tail is None) == (old.tail is None)

    def _copies(self, old: Placement, new: Placement) -> Iterator[PageMove]:
        for source, target in zip(old.extents(self.page_bytes), new.extents(self.page_bytes), strict=True):
            if source != target:
                yield PageMove(old.tensor, source, target)

    def _tenants_in_order(self, own: TensorId, movable: Callable[[TensorId], bool]) -> Iterator[Stretch]:
        """What would have to leave the frames that are not free, for ``own`` to take them."""
        may_move: dict[TensorId, bool] = {own: True}
        for start, length, _ in self._taken():
            tails = self._shared.tails(start)
            tenants = tuple(t for _, t in tails) if tails else (self._runs[start][1],)
            for tenant in tenants:
                if tenant not in may_move:
                    may_move[tenant] = movable(tenant)
            others = tuple(tenant for tenant in tenants if tenant != own)
            stays = not all(may_move[tenant] for tenant in others)
            if tails or not others:
                n_bytes, bytes_a_frame = sum(tail.length_bytes for tail, tenant in tails if tenant != own), 0
            else:
                placed = self._placements[others[0]]
                bytes_a_frame = 0 if placed.contiguous else self.page_bytes
                n_bytes = placed.n_bytes if placed.contiguous else length * self.page_bytes
            yield Stretch(start, start + length, others, n_bytes, bytes_a_frame, stays)

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
        """The tensor in a frame (of two in a shared page the one that came first), or None when it is free."""
        tails = self._shared.tails(frame)
        if tails:
            return tails[0][1]
        place = self._runs.bisect_right(frame) - 1
        if place < 0:
            return None
        start, (length, tensor) = self._runs.peekitem(place)
        return tensor if frame < start + length else None

    def segments(self) -> Iterator[tuple[FrameId, int, TensorId | None]]:
        """Maximal stretches of frames with one `owner` (None: free), in order, covering the tier. O(stretches)."""
        first, end, owner = 0, 0, None
        for start, length, tensor in self._taken():
            if start > end or tensor != owner:
                if end > first:
                    yield FrameId(first), end - first, owner
                if start > end:
                    yield FrameId(end), start - end, None
                first, owner = start, tensor
            end = start + length
        if end > first:
            yield FrameId(first), end - first, owner
        if end < self.n_frames:
            yield FrameId(end), self.n_frames - end, None

    def _taken(self) -> Iterable[tuple[int, int, TensorId]]:
        """Runs and shared pages in order of place: start, length, owner."""
        runs = ((start, length, tensor) for start, (length, tensor) in self._runs.items())
        if not self._shared:
            return runs
        shared = [(frame, 1, self._shared.tails(frame)[0][1]) for frame in self._shared]
        return heapq.merge(runs, sorted(shared))

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
        return self._free.longest

    def fragmentation(self) -> Fragmentation:
        """Waste inside pages, and how scattered the free frames are, now."""
        unused_bytes = self.used_frames * self.page_bytes - self._asked_bytes
        scattered = 1 - self.largest_free_run / self.free_frames if self.free_frames else 0.0
        return Fragmentation(self._asked_bytes, unused_bytes, scattered)

    def validate(self) -> None:
        """Check every invariant. O(n log n); for tests and for closing.

        Raises:
            AssertionError: one does not hold; the message names the frame or tensor.
        """
        self._free.validate()
        self._shared.validate()
        end = 0
        for start, length in sorted([*self._free, *((start, length) for start, length, _ in self._taken())]):
            if start != end or length <= 0:
                raise AssertionError(f"frames {min(start, end)}..{max(start, end)} have two owners or none")
            end = start + length
        if end != self.n_frames:
            raise AssertionError(f"{end} frames are accounted for, there are {self.n_frames}")
        for tensor, placed in self._placements.items():
            self._validate_placement(tensor, placed)
        n_tails = sum(len(self._shared.tails(frame)) for frame in self._shared)
        if sum(len(placed.runs) for placed in self._placements.values()) != len(self._runs):
            raise AssertionError("a run belongs to a tensor that does not know it")
        if sum(placed.tail is not None for placed in self._placements.values()) != n_tails:
            raise AssertionError("a tail belongs to a tensor that does not know it")
        if sum(placed.n_bytes for placed in self._placements.values()) != self._asked_bytes:
            raise AssertionError(f"{self._asked_bytes} bytes are counted as asked for, not what the placements add up to")
        if self.peak_frames < self.used_frames:
            raise AssertionError(f"{self.used_frames} frames are used, more than the peak of {self.peak_frames}")

    def _validate_placement(self, tensor: TensorId, placed: Placement) -> None:
        if placed.tensor != tensor or placed.tier is not self.tier:
            raise AssertionError(f"tensor {tensor} of the {self.tier.value} tier is recorded with {placed}")
        for run in placed.runs:
            if self._runs.get(run.first) != (run.n_frames, tensor):
                raise AssertionError(f"tensor {tensor}: {run} is not in the index of runs")
        if placed.tail is not None and (placed.tail, tensor) not in self._shared.tails(placed.tail.frame):
            raise AssertionError(f"tensor {tensor}: {placed.tail} is not in the index of shared pages")
        tail_bytes = placed.tail.length_bytes if placed.tail is not None else 0
        n_whole = sum(run.n_frames for run in placed.runs)
        if n_whole != ceil_div(placed.n_bytes - tail_bytes, self.page_bytes):
            raise AssertionError(f"tensor {tensor}: {placed} does not hold {placed.n_bytes} bytes")

    # ---- small parts -------------------------------------------------------------------------------------------

    def _flat(self, tensor: TensorId, n_bytes: int, start: int) -> Placement:
        run = Run(FrameId(start), ceil_div(n_bytes, self.page_bytes))
        return Placement(tensor, self.tier, n_bytes, (run,))

    def _placed(self, tensor: TensorId) -> Placement:
        placed = self._placements.get(tensor)
        if placed is None:
            raise KeyError(f"tensor {tensor} has no frames in the {self.tier.value} tier")
        return placed

    def _shortage(self, wanted: int) -> Shortage:
        return Shortage(self.tier, wanted, self.free_frames, self.largest_free_run)


def _inside(frame: int, window: Run) -> bool:
    return window.first <= frame < window.first + window.n_frames


def _joined(frames: Sequence[int]) -> tuple[Run, ...]:
    """Frames in the order of their bytes, as runs."""
    runs: list[Run] = []
    for frame in frames:
        if runs and frame == runs[-1].first + runs[-1].n_frames:
            runs[-1] = Run(runs[-1].first, runs[-1].n_frames + 1)
        else:
            runs.append(Run(FrameId(frame), 1))
    return tuple(runs)


def _outside(placed: Placement, window: Run) -> Placement:
    """The part of a placement that does not lie in a window."""
    frames = [frame for run in placed.runs for frame in range(run.first, run.first + run.n_frames)]
    tail = placed.tail if placed.tail is not None and not _inside(placed.tail.frame, window) else None
    runs = _joined([frame for frame in frames if not _inside(frame, window)])
    return Placement(placed.tensor, placed.tier, placed.n_bytes, runs, tail)
