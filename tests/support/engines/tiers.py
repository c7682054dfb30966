"""Small tiers drawn as strings: tensors are single letters, a page is 64 KiB.

`layout` shows a letter a frame: ``.`` is free, a capital is whole pages, a small letter a shared page.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cross_references import check_frames

from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import FrameId, Placement, Shortage, TensorId
from pagemem.tier import Tier
from pagemem.units import KiB

PAGE = 64 * KiB
#: Every tier made by a test, to be validated at its end.
made: list[PageAllocator] = []


@pytest.fixture(autouse=True)
def every_tier_is_valid_at_the_end() -> Iterator[None]:
    """For the tests of every module that imports it."""
    made.clear()
    yield
    for frames in made:
        check_frames(frames)


def tier(n_frames: int) -> PageAllocator:
    made.append(PageAllocator(Tier.HOST, PAGE, n_frames))
    return made[-1]


def t(name: str) -> TensorId:
    return TensorId(ord(name.upper()))


def anyone(_: TensorId) -> bool:
    return True


def placed(found: Placement | Shortage) -> Placement:
    assert isinstance(found, Placement), found
    return found


def layout(frames: PageAllocator) -> str:
    shown = ["."] * frames.n_frames
    for tensor in frames.placements:
        for extent in placed_of(frames, tensor).extents(PAGE):
            tail = placed_of(frames, tensor).tail
            letter = chr(tensor).lower() if extent == tail else chr(tensor)
            if shown[extent.frame] == "." or frames.owner(extent.frame) == tensor:
                shown[extent.frame] = letter
    return "".join(shown)


def placed_of(frames: PageAllocator, tensor: TensorId) -> Placement:
    found = frames.placements.get(tensor)
    assert found is not None
    return found


def filled(picture: str) -> PageAllocator:
    """A tier that looks like ``picture``: a letter in one stretch is contiguous, in several it is scattered."""
    frames = tier(len(picture))
    spans: dict[str, list[tuple[int, int]]] = {}
    for frame, letter in enumerate(picture):
        runs = spans.setdefault(letter, [])
        if runs and sum(runs[-1]) == frame:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((frame, 1))
    # A scattered tensor takes the only frames that are free when its turn comes: all others are filled for that while.
    for letter in [name for name in spans if name != "."]:
        wanted = {frame for start, n in spans[letter] for frame in range(start, start + n)}
        fillers = []
        for frame in range(len(picture)):
            if frame not in wanted and frames.owner(frame) is None:
                fillers.append(TensorId(1000 + frame))
                placed(frames.allocate(fillers[-1], PAGE, at=FrameId(frame)))
        placed(frames.allocate(t(letter), len(wanted) * PAGE))
        for filler in fillers:
            frames.release(filler)
    assert layout(frames) == picture
    return frames
