"""Moving tensors inside one tier so that one of them becomes contiguous: who must leave, where to, and which copies.

Everything is tried in the books, and taken back there when it cannot be done; no byte is touched. Which frames are
cheapest to clear and in what order pages can be copied is `pagemem.frames.packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pagemem.frames.book import FrameBook
from pagemem.frames.packing import Stretch, Tenancy, safe_order
from pagemem.frames.page import FrameId, PageMove, Placement, Run, TensorId


def relocate(book: FrameBook, target: Placement, tenants: Sequence[TensorId]) -> list[PageMove] | None:
    """Put a tensor at ``target``, one run, and the tenants of those frames elsewhere.

    Returns:
        The copies to make, in order, none of which writes over what has not been copied yet; None when there is no way,
        and nothing was changed.
    """
    peak_frames = book.peak_frames
    before = [book.release(tensor) for tensor in (target.tensor, *tenants)]
    # A tenant that goes where the tensor comes from may have to wait in a third place: only if there is no other way.
    for avoided in (_outside(before[0], target.runs[0]), None) if tenants else (None,):
        if _put_elsewhere(book, target, before[1:], avoided):
            copies = [copy for old in before for copy in _copies(old, book.held(old.tensor), book.page_bytes)]
            ordered = safe_order(copies, book.free)
            if ordered is not None:
                book.peak_frames = max(peak_frames, book.used_frames)
                return ordered
        for old in before:
            if old.tensor in book:
                book.release(old.tensor)
    for old in before:
        book.put(old)
    book.peak_frames = peak_frames  # What was tried and taken back was never in use.
    return None


def tenancy(book: FrameBook, own: TensorId, movable: Callable[[TensorId], bool]) -> Tenancy:
    """What would have to leave the frames that are not free, for ``own`` to take them. O(n log n).

    Args:
        movable: whether another tensor may be moved; asked once for each.
    """
    return Tenancy(_stretches(book, own, movable))


def _stretches(book: FrameBook, own: TensorId, movable: Callable[[TensorId], bool]) -> Iterator[Stretch]:
    may_move: dict[TensorId, bool] = {own: True}
    for start, length, owner in book.taken():
        tails = book.shared.tails(start)
        tenants = tuple(t for _, t in tails) if tails else (owner,)
        for tenant in tenants:
            if tenant not in may_move:
                may_move[tenant] = movable(tenant)
        others = tuple(tenant for tenant in tenants if tenant != own)
        stays = not all(may_move[tenant] for tenant in others)
        if tails or not others:
            n_bytes, bytes_a_frame = sum(tail.length_bytes for tail, tenant in tails if tenant != own), 0
        else:
            placed = book.held(owner)
            bytes_a_frame = 0 if placed.contiguous else book.page_bytes
            n_bytes = placed.n_bytes if placed.contiguous else length * book.page_bytes
        yield Stretch(start, start + length, others, n_bytes, bytes_a_frame, stays)


def _put_elsewhere(book: FrameBook, target: Placement, tenants: Sequence[Placement], avoided: Placement | None) -> bool:
    """Put ``target``, and released tenants around it and ``avoided``.

    Returns:
        False, with some of them put, when one finds no place.
    """
    (window,) = target.runs
    if not book.free.holds(window.first, window.n_frames):
        return False
    both = target if avoided is None else replace(target, runs=(window, *avoided.runs), tail=avoided.tail)
    book.put(both)
    flat = [old for old in tenants if old.tail is None and len(old.runs) == 1]
    scattered = [old for old in tenants if old.tail is not None or len(old.runs) > 1]
    for old in scattered:  # What lies outside the window stays: nobody else may take it.
        book.put(_outside(old, window))
    for old in sorted(flat, key=lambda old: -old.n_frames):
        start = book.free.best_fit(old.n_frames)
        if start is None:
            return False
        book.put(book.flat(old.tensor, old.n_bytes, start))
    if not all(_put_scattered(book, old, window) for old in scattered):
        return False
    book.release(target.tensor)
    book.put(target)
    return True


def _put_scattered(book: FrameBook, old: Placement, window: Run) -> bool:
    """Find places for what a tensor had in the window; the rest of it is where it was."""
    frames = _frames(old)
    displaced = [page for page, frame in enumerate(frames) if _inside(frame, window)]
    pieces = book.free.fewest_pieces(len(displaced))
    if pieces is None:
        return False
    fresh = (frame for piece in pieces for frame in range(piece.first, piece.first + piece.n_frames))
    for page, frame in zip(displaced, fresh):
        frames[page] = frame
    kept = book.release(old.tensor)
    book.put(replace(kept, runs=_joined(frames)))
    if old.tail is not None and kept.tail is None:
        tail = book.room_for_tail(old.tail.length_bytes)
        if tail is None:
            return False
        book.put_tail(old.tensor, tail)
    return True


def _copies(old: Placement, new: Placement, page_bytes: int) -> Iterator[PageMove]:
    for source, target in zip(old.extents(page_bytes), new.extents(page_bytes), strict=True):
        if source != target:
            yield PageMove(old.tensor, source, target)


def _frames(placed: Placement) -> list[int]:
    """Frames of whole pages, in the order of their bytes."""
    return [frame for run in placed.runs for frame in range(run.first, run.first + run.n_frames)]


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
    tail = placed.tail if placed.tail is not None and not _inside(placed.tail.frame, window) else None
    return replace(placed, runs=_joined([frame for frame in _frames(placed) if not _inside(frame, window)]), tail=tail)
