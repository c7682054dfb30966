"""Choosing which adjacent frames to take for a tensor, and so which tenants must leave. Pure arithmetic.

Compute wants one flat view, so a tensor needs a *window* of adjacent frames. Ranking whole windows instead of single
victims makes fragmentation a cost that is weighed with all others: no frame is freed that the window does not use.
Both the planner (tenants ranked by next use) and on-demand fetching (ranked by last use) choose through `best_window`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pagemem.page import FrameId, TensorId

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


def _candidates(segments: Sequence[Segment], n_frames: int, end: int) -> list[int]:
    """Windows worth ranking begin where a segment begins or end where one ends: all others evict at least as much."""
    starts: set[int] = {first for first, _, _ in segments if first + n_frames <= end}
    starts.update(first + length - n_frames for first, length, _ in segments if first + length >= n_frames)
    return sorted(starts)


def best_window(
    segments: Sequence[Segment],
    n_frames: int,
    movable: Callable[[TensorId], bool],
    cost: Callable[[Sequence[TensorId]], Comparable],
) -> Window | None:
    """The cheapest window of ``n_frames`` frames whose tenants may all leave.

    Args:
        segments: the tier's frames in order, without gaps, as `PageAllocator.segments` yields them.
        n_frames: frames wanted, >= 1.
        movable: whether a tenant may be made to leave.
        cost: cost of sending these tenants away (an empty sequence for free frames); compared with ``<``.

    Returns:
        The first window of least cost, or None when every window has a tenant that must stay.
    """
    if not segments:
        return None
    end = segments[-1][0] + segments[-1][1]
    owners = [owner for _, _, owner in segments if owner is not None]
    # Per segment: how many tenants, and how many of those that must stay, lie before it.
    before, staying = [0], [0]
    for _, _, owner in segments:
        before.append(before[-1] + (owner is not None))
        staying.append(staying[-1] + (owner is not None and not movable(owner)))
    best: Window | None = None
    best_cost: Any = None
    low = high = 0
    for start in _candidates(segments, n_frames, end):
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
