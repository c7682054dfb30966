"""Records that say where the bytes of a paged tensor lie. Plain integers: no device, file or thread.

A *frame* is a place for one page in one tier. An *extent* is a run of bytes of one page that belongs to one tensor.
A page holds extents of at most two tensors. A *placement* is everything a tensor owns in one tier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NewType

from pagemem.tier import Tier
from pagemem.units import KiB, MiB

#: Smallest and largest size of a page, a power of two.
MIN_PAGE_BYTES: Final = 64 * KiB
MAX_PAGE_BYTES: Final = 64 * MiB

TensorId = NewType("TensorId", int)
FrameId = NewType("FrameId", int)


@dataclass(frozen=True, slots=True)
class Extent:
    """``length_bytes`` bytes at ``offset_bytes`` of frame ``frame``."""

    frame: FrameId
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class FrameRun:
    """``n_frames`` adjacent frames from ``first`` on, all whole pages of one tensor but perhaps the last."""

    first: FrameId
    n_frames: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor's bytes lie in one tier: whole pages first, in order, then at most one part of a page.

    ``runs`` cover the tensor's bytes from 0 on; when ``tail`` is set it holds the last bytes and may share its frame
    with one other tensor. ``n_bytes`` is what the tensor asked for; the last page of a run may be partly unused.
    """

    tensor: TensorId
    tier: Tier
    n_bytes: int
    runs: tuple[FrameRun, ...]
    tail: Extent | None = None

    def extents(self, page_bytes: int) -> list[Extent]:
        """The tensor's bytes in order, one extent a page."""
        found: list[Extent] = []
        left = self.n_bytes - (self.tail.length_bytes if self.tail else 0)
        for run in self.runs:
            for frame in range(run.first, run.first + run.n_frames):
                length = min(page_bytes, left)
                found.append(Extent(FrameId(frame), 0, length))
                left -= length
        if self.tail is not None:
            found.append(self.tail)
        return found


@dataclass(frozen=True, slots=True)
class Shortage:
    """A tier could not serve a request. Nothing was changed.

    ``free_frames`` counts all free frames; a request can fail with enough of them when they are not adjacent.
    """

    tier: Tier
    wanted_frames: int
    free_frames: int
