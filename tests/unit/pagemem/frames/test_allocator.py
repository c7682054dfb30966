"""Allocator scenarios with few pages, read as stories: taking, giving back, looking, checking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cross_references import check_frames
from tiers import PAGE, every_tier_is_valid_at_the_end, filled, layout, placed, t, tier  # noqa: F401

from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import Extent, FrameId, FrameRun, Shortage
from pagemem.tier import Tier
from pagemem.units import BLOCK_BYTES, KiB

# ---- taking and giving back ----------------------------------------------------------------------------------------


def test_whole_pages_go_to_the_run_that_fits_best() -> None:
    frames = filled("A..BC....D...E")
    assert placed(frames.allocate(t("X"), 3 * PAGE)).runs == (FrameRun(FrameId(10), 3),)
    assert layout(frames) == "A..BC....DXXXE"


def test_of_equal_runs_the_lowest_is_taken() -> None:
    frames = filled("A..B..C")
    assert placed(frames.allocate(t("X"), 2 * PAGE)).runs == (FrameRun(FrameId(1), 2),)


def test_without_a_run_long_enough_the_fewest_pieces_are_taken() -> None:
    frames = filled("A..B...C.D..E")
    x = placed(frames.allocate(t("X"), 4 * PAGE))
    assert x.runs == (FrameRun(FrameId(4), 3), FrameRun(FrameId(8), 1))
    assert layout(frames) == "A..BXXXCXD..E"


def test_pieces_never_name_a_run_twice() -> None:
    frames = filled(".....A...B...C")
    x = placed(frames.allocate(t("X"), 10 * PAGE))
    assert [run.n_frames for run in x.runs] == [5, 2, 3]
    assert layout(frames) == "XXXXXAXX.BXXXC"


def test_two_tails_share_a_page_and_a_third_opens_another() -> None:
    frames = tier(4)
    a = placed(frames.allocate(t("A"), 20 * KiB))
    b = placed(frames.allocate(t("B"), 10 * KiB))
    c = placed(frames.allocate(t("C"), 4 * KiB))
    assert (a.tail, b.tail) == (Extent(FrameId(0), 0, 20 * KiB), Extent(FrameId(0), 20 * KiB, 10 * KiB))
    assert c.tail == Extent(FrameId(1), 0, 4 * KiB)
    assert frames.used_frames == 2


def test_a_tail_goes_where_it_leaves_least() -> None:
    frames = tier(6)
    for name, n_bytes in (("A", 40 * KiB), ("B", 52 * KiB), ("C", 44 * KiB)):
        frames.allocate(t(name), n_bytes)
    x = placed(frames.allocate(t("X"), 2 * PAGE + 20 * KiB))
    assert x.tail == Extent(FrameId(2), 44 * KiB, 20 * KiB)
    assert x.runs == (FrameRun(FrameId(3), 2),)


def test_tails_start_on_blocks_and_say_their_exact_length() -> None:
    frames = tier(3)
    a = placed(frames.allocate(t("A"), PAGE + 100))
    b = placed(frames.allocate(t("B"), 1))
    assert a.extents(PAGE) == [Extent(FrameId(0), 0, PAGE), Extent(FrameId(1), 0, 100)]
    assert b.tail == Extent(FrameId(1), BLOCK_BYTES, 1)


def test_a_left_over_that_rounds_up_to_a_page_is_a_whole_page() -> None:
    frames = tier(2)
    a = placed(frames.allocate(t("A"), 2 * PAGE - 1))
    assert (a.runs, a.tail) == ((FrameRun(FrameId(0), 2),), None)
    assert a.extents(PAGE)[-1] == Extent(FrameId(1), 0, PAGE - 1)


def test_room_in_front_of_a_tail_is_used_again() -> None:
    frames = tier(1)
    frames.allocate(t("A"), 40 * KiB)
    frames.allocate(t("B"), 24 * KiB)
    frames.release(t("A"))
    assert placed(frames.allocate(t("C"), 36 * KiB)).tail == Extent(FrameId(0), 0, 36 * KiB)


def test_a_shared_page_is_free_when_both_tenants_have_gone() -> None:
    frames = tier(2)
    frames.allocate(t("A"), 20 * KiB)
    frames.allocate(t("B"), 20 * KiB)
    frames.release(t("A"))
    assert (frames.used_frames, frames.owner(0)) == (1, t("B"))
    frames.release(t("B"))
    assert (frames.used_frames, frames.owner(0), list(frames.free.by_start.items())) == (0, None, [(0, 2)])


def test_a_contiguous_tensor_shares_with_nobody() -> None:
    frames = tier(4)
    frames.allocate(t("A"), PAGE // 2)
    x = placed(frames.allocate(t("X"), PAGE + 1, contiguous=True))
    assert (x.runs, x.tail) == ((FrameRun(FrameId(1), 2),), None)
    assert frames.allocate(t("Y"), 2 * PAGE, contiguous=True) == Shortage(Tier.HOST, 2, 1)


def test_contiguous_needs_frames_side_by_side() -> None:
    frames = filled("A.B.C.")
    assert frames.allocate(t("X"), 2 * PAGE, contiguous=True) == Shortage(Tier.HOST, 2, 3)
    assert sum(run.n_frames for run in placed(frames.allocate(t("X"), 2 * PAGE)).runs) == 2


def test_at_takes_exactly_those_frames_or_none() -> None:
    frames = filled("A....B")
    assert placed(frames.allocate(t("X"), 2 * PAGE, at=FrameId(2))).runs == (FrameRun(FrameId(2), 2),)
    assert layout(frames) == "A.XX.B"
    for taken in (0, 1, 3, 4, 6, -1):
        assert frames.allocate(t("Y"), 2 * PAGE, at=FrameId(taken)) == Shortage(Tier.HOST, 2, 2)
    assert layout(frames) == "A.XX.B"


def test_a_shortage_changes_nothing() -> None:
    frames = filled("AA.B")
    assert frames.allocate(t("X"), PAGE + 1) == Shortage(Tier.HOST, 2, 1)
    assert t("X") not in frames.placements
    assert layout(frames) == "AA.B"
    frames.grow(1)
    assert layout(frames) == "AA.B."
    grown = placed(frames.allocate(t("X"), PAGE + 1))
    assert sum(run.n_frames for run in grown.runs) + (grown.tail is not None) == 2


def test_release_joins_the_neighbours() -> None:
    frames = filled(".AB.")
    released = frames.release(t("A"))
    assert released.runs == (FrameRun(FrameId(1), 1),)
    assert frames.placements.get(t("A")) is None
    assert list(frames.free.by_start.items()) == [(0, 2), (3, 1)]
    frames.release(t("B"))
    assert list(frames.free.by_start.items()) == [(0, 4)]


def test_growing_extends_the_last_free_run() -> None:
    frames = filled("A.")
    frames.grow(0)
    frames.grow(3)
    assert (frames.n_frames, list(frames.free.by_start.items())) == (5, [(1, 4)])


def test_the_peak_is_the_most_that_was_ever_used() -> None:
    frames = tier(8)
    frames.allocate(t("A"), 3 * PAGE)
    frames.allocate(t("B"), 2 * PAGE)
    frames.release(t("A"))
    frames.allocate(t("C"), PAGE)
    assert (frames.used_frames, frames.peak_frames) == (3, 5)


def test_bad_arguments_are_named() -> None:
    frames = filled("A.")
    with pytest.raises(ValueError, match="n_bytes is 0"):
        frames.allocate(t("X"), 0)
    with pytest.raises(ValueError, match="already"):
        frames.allocate(t("A"), PAGE)
    with pytest.raises(KeyError):
        frames.release(t("X"))
    assert layout(frames) == "A."


# ---- looking -------------------------------------------------------------------------------------------------------


def test_segments_cover_the_tier_and_join_what_belongs_together() -> None:
    frames = filled("A.BB.")
    frames.allocate(t("C"), PAGE // 2)
    frames.allocate(t("D"), PAGE // 2)
    assert list(frames.segments()) == [(0, 1, t("A")), (1, 1, t("C")), (2, 2, t("B")), (4, 1, None)]
    whole_and_tail = tier(4)
    whole_and_tail.allocate(t("A"), 2 * PAGE + 1)
    assert list(whole_and_tail.segments()) == [(0, 3, t("A")), (3, 1, None)]
    assert list(tier(0).segments()) == []


def test_the_owner_of_a_frame() -> None:
    frames = filled("AA.B")
    assert [frames.owner(frame) for frame in (-1, 0, 1, 2, 3, 4)] == [None, t("A"), t("A"), None, t("B"), None]


# ---- checking ------------------------------------------------------------------------------------------------------


def test_validate_finds_every_broken_cross_reference() -> None:
    def broken(change: Callable[[PageAllocator], None], message: str) -> None:
        frames = PageAllocator(Tier.HOST, PAGE, 4)
        frames.allocate(t("A"), PAGE + KiB)
        check_frames(frames)
        change(frames)
        with pytest.raises(AssertionError, match=message):
            check_frames(frames)

    broken(lambda frames: frames.free.add(0, 1), "two owners or none")
    broken(lambda frames: frames.free.take(3, 1), "accounted for|two owners or none")
    broken(lambda frames: frames._runs.update({0: (1, t("Z"))}), "index of runs")
    broken(lambda frames: frames.placements.pop(t("A")) and None, "does not know it")
    broken(lambda frames: setattr(frames, "peak_frames", 0), "more than the peak")
    broken(lambda frames: setattr(frames.free, "n_frames", 9), "frames counted")
