"""Choosing which adjacent frames to take for a tensor, and so which tenants must leave. Pure arithmetic.

Compute wants one flat view, so a tensor needs a *window* of adjacent frames. Ranking whole windows instead of single
victims makes fragmentation a cost that is weighed with all others: no frame is freed that the window does not use.
Both the planner (tenants ranked by next use) and on-demand fetching (ranked by last use) choose through `best_window`,
or, where there are so many tenants that ranking all windows takes too long, through `window_near`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pagemem import knobs
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import FrameId, TensorId

#: One stretch of frames with one owner (None: free): first frame, number of frames, owner.
Segment = tuple[FrameId, int, TensorId | None]


class Comparable(Protocol):
    """What a window's cost must support: ordering."""

    def __lt__(self, other: Any, /) -> bool: ...


@dataclass(frozen=True, slots=True)
class Window:
    """``n_frames`` adjacent frames from ``first`` on, and the tenants that have to leave them."""

    first: FrameId
    n_frames: int
    tenants: tuple[TensorId, ...]


def _candidates(segments: Sequence[Segment], n_frames: int, begin: int, end: int) -> list[int]:
    """Windows worth ranking begin where a segment begins or end where one ends: all others evict at least as much."""
    starts: set[int] = {first for first, _, _ in segments if first + n_frames <= end}
    starts.update(first + length - n_frames for first, length, _ in segments if first + length >= begin + n_frames)
    return sorted(starts)


def best_window(
    segments: Sequence[Segment],
    n_frames: int,
    movable: Callable[[TensorId], bool],
    cost: Callable[[Sequence[TensorId]], Comparable],
) -> Window | None:
    """The cheapest window of ``n_frames`` frames whose tenants may all leave.

    Args:
        segments: the tier's frames, or some of them, in order, without gaps, as `PageAllocator.segments` yields them.
        n_frames: frames wanted, >= 1.
        movable: whether a tenant may be made to leave.
        cost: cost of sending these tenants away (an empty sequence for free frames); compared with ``<``.

    Returns:
        The first window of least cost, or None when every window has a tenant that must stay.
    """
    if not segments:
        return None
    begin, end = segments[0][0], segments[-1][0] + segments[-1][1]
    owners = [owner for _, _, owner in segments if owner is not None]
    # Per segment: how many tenants, and how many of those that must stay, lie before it.
    before, staying = [0], [0]
    for _, _, owner in segments:
        before.append(before[-1] + (owner is not None))
        staying.append(staying[-1] + (owner is not None and not movable(owner)))
    best: Window | None = None
    best_cost: Any = None
    low = high = 0
    for start in _candidates(segments, n_frames, begin, end):
        while segments[low][0] + segments[low][1] <= start:
            low += 1
        while high < len(segments) and segments[high][0] < start + n_frames:
            high += 1
        if staying[high] == staying[low]:
            tenants = owners[before[low] : before[high]]
            found = cost(tenants)
            if best_cost is None or found < best_cost:
                best, best_cost = Window(FrameId(start), n_frames, tuple(tenants)), found
    return best


def window_near(
    book: PageAllocator,
    n_frames: int,
    preferred: Iterable[TensorId],
    movable: Callable[[TensorId], bool],
    cost: Callable[[Sequence[TensorId]], Comparable],
    bound: Callable[[TensorId], Comparable],
    end: int | None = None,
) -> Window | None:
    """A cheap window of ``n_frames`` frames: free frames, else one that touches one of the tenants that had best leave.

    Where ``preferred`` begins with tenants that suffice alone, as it does where most tensors are of a size, this takes
    O(log n). No window is cheaper than the one found if that took fewer than `knobs.LOOKED_AT` tenants.

    Args:
        book: a tier of contiguous tensors.
        preferred: tenants by ``bound``, the least first; may begin with others that are known to be good.
        movable, cost: as for `best_window`; free frames cost least, and more tenants never less than some of them.
        bound: what a window of this tenant, with or without others that come after it, costs at least.
        end: frames from here on are not looked at; None: of the tier.
    """
    end = book.n_frames if end is None else end
    free = book.free.best_fit(n_frames)
    if free is not None and free + n_frames <= end:
        return Window(FrameId(free), n_frames, ())
    best: Window | None = None
    best_cost: Any = None
    n_looked = 0
    for tensor in preferred:
        if not movable(tensor):
            continue
        if best is not None and (n_looked == knobs.LOOKED_AT or not bound(tensor) < best_cost):
            break
        n_looked += 1
        (run,) = book.placements[tensor].runs
        if run.n_frames >= n_frames and run.first + n_frames <= end:
            found: Window | None = Window(run.first, n_frames, (tensor,))  # no cheaper with another tenant
        else:
            around = book.segments(max(0, run.first - n_frames + 1), min(run.first + run.n_frames + n_frames - 1, end))
            found = best_window(list(around), n_frames, movable, cost)
        if found is not None:
            found_cost: Any = cost(found.tenants)
            if best is None or found_cost < best_cost:
                best, best_cost = found, found_cost
    return best
