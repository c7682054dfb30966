"""Copies of tensors in the page files: what is asked of them that `tests/property/test_copies_model.py` does not do."""

from __future__ import annotations

import numpy as np
import pytest
from cross_references import check_frames
from fake_page_files import ThreadedPageFiles

from pagemem.errors import DiskFullError
from pagemem.frames.page import Extent, FrameId, FrameRun, Placement, TensorId
from pagemem.residency.disk_versions import DiskVersions
from pagemem.tier import Tag, Tier
from pagemem.units import KiB

PAGE = 64 * KiB
BLOCK = 4 * KiB


class LimitedFiles(ThreadedPageFiles):
    """On a disk with room for ten frames."""

    def __init__(self) -> None:
        super().__init__()
        self.remembered: list[tuple[object, list[int]]] = []

    def grow(self, n_frames: int) -> None:
        if n_frames > 10:
            raise DiskFullError(f"no room for {n_frames} frames")
        super().grow(n_frames)

    def remember(self, route: object, sums: np.ndarray) -> None:  # type: ignore[type-arg]
        self.remembered.append((route, sums.tolist()))


@pytest.fixture
def copies() -> DiskVersions:
    """No frames yet."""
    return DiskVersions(LimitedFiles(), PAGE)  # type: ignore[arg-type]


def test_frames_named_by_a_commit_are_not_handed_out_before_the_last_commit_lets_go(copies: DiskVersions) -> None:
    first = copies.take(3 * PAGE, Tag.PARAM)
    for _ in range(2):
        copies.hold(first)
    copies.leave(first)
    others = [copies.take(PAGE, Tag.PARAM) for _ in range(7)]
    with pytest.raises(DiskFullError):
        copies.take(PAGE, Tag.PARAM)
    copies.let_go(first)
    with pytest.raises(DiskFullError):
        copies.take(PAGE, Tag.PARAM)
    copies.let_go(first)
    again = copies.take(3 * PAGE, Tag.PARAM)
    assert again.placement.runs == first.placement.runs
    assert all(other.placement.runs != again.placement.runs for other in others)


def test_a_current_copy_is_not_freed_by_the_commit_that_goes(copies: DiskVersions) -> None:
    stored = copies.take(PAGE, Tag.PARAM)
    copies.hold(stored)
    copies.let_go(stored)
    assert copies.book.used_frames == 1
    copies.leave(stored)
    assert copies.book.used_frames == 0


def test_letting_go_of_what_no_commit_names_is_an_error(copies: DiskVersions) -> None:
    stored = copies.take(PAGE, Tag.PARAM)
    with pytest.raises(AssertionError, match="no commit names"):
        copies.let_go(stored)


def test_a_full_disk_changes_nothing(copies: DiskVersions) -> None:
    kept = copies.take(8 * PAGE, Tag.PARAM)
    for ask in (lambda: copies.take(3 * PAGE, Tag.PARAM), lambda: copies.reserve(3)):
        with pytest.raises(DiskFullError):
            ask()
    assert copies.book.used_frames == 8 and copies.book.n_frames == 8
    copies.reserve(2)
    assert copies.book.free_frames == 2 and copies.take(2 * PAGE, Tag.PARAM).placement.runs != kept.placement.runs
    check_frames(copies.book)


def test_a_restored_copy_keeps_its_frames_and_its_checksums(copies: DiskVersions) -> None:
    placed = Placement(
        TensorId(-1), Tier.SSD, 2 * PAGE + BLOCK, (FrameRun(FrameId(4), 2),), Extent(FrameId(7), 2 * BLOCK, BLOCK)
    )
    stored = copies.restore(placed, np.array([5, 6, 7], dtype=np.uint64), Tag.PARAM)
    copies.hold(stored)
    assert stored.placement.runs == placed.runs and stored.placement.tail == placed.tail and not stored.current
    files: LimitedFiles = copies._files  # type: ignore[assignment]
    assert files.remembered == [(tuple(placed.extents(PAGE)), [5, 6, 7])]
    taken = {run.first + k for run in copies.take(5 * PAGE, Tag.PARAM).placement.runs for k in range(run.n_frames)}
    assert taken == {0, 1, 2, 3, 6}
    check_frames(copies.book)


def test_frames_cannot_be_restored_twice(copies: DiskVersions) -> None:
    placed = Placement(TensorId(-1), Tier.SSD, 2 * PAGE, (FrameRun(FrameId(0), 2),))
    copies.restore(placed, np.array([5, 6], dtype=np.uint64), Tag.PARAM)
    overlapping = Placement(TensorId(-1), Tier.SSD, PAGE, (FrameRun(FrameId(1), 1),))
    with pytest.raises(AssertionError):
        copies.restore(overlapping, np.array([5], dtype=np.uint64), Tag.PARAM)


def test_frames_after_storing_are_foretold(copies: DiskVersions) -> None:
    copies.hold(copies.take(PAGE + BLOCK, Tag.PARAM))
    sizes = [PAGE, 2 * BLOCK, 3 * PAGE + BLOCK]
    foretold, now = copies.used_frames_after(sizes), copies.book.used_frames
    assert copies.used_frames_after([]) == now
    for size in sizes:
        copies.take(size, Tag.PARAM)
    assert copies.book.used_frames == foretold > now
