"""Allocator scenarios with few pages, read as stories: tensors that move, and the order of the copies."""

from __future__ import annotations

import pytest
from tiers import PAGE, anyone, copies, every_tier_is_valid_at_the_end, filled, layout, placed_of, t, tier  # noqa: F401

from pagemem.frames.free_runs import FreeRuns
from pagemem.frames.packing import safe_order
from pagemem.frames.page import Extent, FrameId, PageMove, Shortage
from pagemem.tier import Tier
from pagemem.units import KiB

# ---- moving --------------------------------------------------------------------------------------------------------


def test_a_tensor_moves_to_a_free_run() -> None:
    frames = filled("AA.B..")
    assert copies(frames.move(t("A"), FrameId(4))) == ["A0>4", "A1>5"]
    assert layout(frames) == "...BAA"


def test_a_tensor_may_slide_over_its_own_frames() -> None:
    up, down = filled("AAA.."), filled("..AAA")
    assert copies(up.move(t("A"), FrameId(1))) == ["A2>3", "A1>2", "A0>1"]
    assert copies(down.move(t("A"), FrameId(1))) == ["A2>1", "A3>2", "A4>3"]
    assert (layout(up), layout(down)) == (".AAA.", ".AAA.")


@pytest.mark.parametrize("to", [2, 3, 5, -1])
def test_a_move_onto_anothers_frames_is_a_shortage(to: int) -> None:
    frames = filled("AA.B..")
    assert frames.move(t("A"), FrameId(to)) == Shortage(Tier.HOST, 2, 3, 2)
    assert layout(frames) == "AA.B.."


def test_a_failed_move_does_not_count_for_the_peak() -> None:
    frames = filled("A.")
    frames.allocate(t("B"), KiB)
    frames.allocate(t("C"), KiB)
    peak = frames.peak_frames
    assert isinstance(frames.move(t("C"), FrameId(1)), Shortage)
    assert frames.peak_frames == peak


def test_a_contiguous_tensor_is_merged_already() -> None:
    frames = filled("A.BB")
    frames.allocate(t("C"), KiB)
    for name in "ABC":
        assert frames.merge(t(name), movable=anyone) == []


def test_merging_takes_a_free_run_first() -> None:
    frames = filled("ABA...C")
    assert copies(frames.merge(t("A"), movable=anyone)) == ["A0>3", "A2>4"]
    assert layout(frames) == ".B.AA.C"


def test_merging_moves_the_fewest_bytes_out_of_the_way() -> None:
    # Nothing is free side by side. Clearing B costs one page, clearing CC two; A's own page stays where it is.
    frames = filled("ABA.CC.D")
    assert copies(frames.merge(t("A"), movable=lambda tensor: tensor != t("D"))) == ["B1>3", "A2>1"]
    assert layout(frames) == "AA.BCC.D"


def test_who_may_not_move_is_not_moved() -> None:
    frames = filled("ABA.CDE.")
    assert copies(frames.merge(t("A"), movable=lambda tensor: tensor == t("E"))) == ["A2>3", "A0>2"]
    assert layout(frames) == ".BAACDE."
    stuck = filled("ABA.B.A")
    before = layout(stuck)
    assert stuck.merge(t("A"), movable=lambda _: False) == Shortage(Tier.HOST, 3, 2, 1)
    assert layout(stuck) == before


def test_contiguous_tenants_stay_contiguous() -> None:
    # The cheap window has BB in it, which needs two frames side by side: after A has left 5 and 6 there are.
    frames = filled("ABB.CAADD")
    moves = frames.merge(t("A"), movable=lambda tensor: tensor in (t("B"), t("C")))
    assert copies(moves) == ["C4>3", "A0>4"]
    assert layout(frames) == ".BBCAAADD"


def test_a_scattered_tenant_gives_up_only_the_pages_in_the_way() -> None:
    frames = filled("ABABCCC.B")
    moves = frames.merge(t("A"), movable=lambda tensor: tensor == t("B"))
    assert copies(moves) == ["B1>7", "A2>1"]
    assert layout(frames) == "AA.BCCCBB"
    assert [run.first for run in placed_of(frames, t("B")).runs] == [7, 3, 8]


def test_a_tail_in_the_way_moves_beside_another_or_to_a_free_frame() -> None:
    frames = tier(4)
    frames.allocate(t("A"), PAGE, at=FrameId(0))
    frames.allocate(t("D"), PAGE, at=FrameId(2))
    frames.allocate(t("B"), 20 * KiB)
    frames.allocate(t("C"), 8 * KiB)
    frames.release(t("A"))
    frames.release(t("D"))
    assert frames.owner(1) == t("B")
    frames.allocate(t("E"), PAGE, at=FrameId(3))
    frames.allocate(t("A"), 2 * PAGE)
    assert layout(frames) == "AbAE"
    assert frames.merge(t("A"), movable=lambda tensor: tensor != t("E")) == Shortage(Tier.HOST, 2, 0, 0)
    frames.grow(1)
    assert copies(frames.merge(t("A"), movable=lambda tensor: tensor != t("E"))) == ["B1>4", "C1>4", "A2>1"]
    assert layout(frames) == "AA.Eb"


def test_a_full_tier_has_no_room_to_merge_in() -> None:
    frames = filled("ABAB")
    assert frames.merge(t("A"), movable=anyone) == Shortage(Tier.HOST, 2, 0, 0)
    assert layout(frames) == "ABAB"


def test_one_free_frame_is_enough_to_sort_a_tier() -> None:
    frames = filled("ABCABCABC.")
    for name in "ABC":
        assert copies(frames.merge(t(name), movable=anyone))
    assert sorted(layout(frames)) == sorted("AAABBBCCC.")
    assert all(placed_of(frames, t(name)).contiguous for name in "ABC")


def test_merging_looks_beyond_the_cheapest_window() -> None:
    # The first of the cheapest windows holds CC, which finds no two frames side by side; D and E find one each.
    frames = filled("ABCCFDEFAB.B.")
    moves = frames.merge(t("A"), movable=lambda tensor: tensor in (t("C"), t("D"), t("E")))
    assert copies(moves) == ["D5>10", "A0>5", "E6>12", "A8>6"]
    assert layout(frames) == ".BCCFAAF.BDBE"


def test_a_window_whose_tenant_finds_no_place_is_left_as_it_was() -> None:
    frames = filled("ABCCFBBFAB.B.")
    before, peak = layout(frames), frames.peak_frames
    assert frames.merge(t("A"), movable=lambda tensor: tensor == t("C")) == Shortage(Tier.HOST, 2, 2, 1)
    assert (layout(frames), frames.peak_frames) == (before, peak)


# ---- the order of copies -------------------------------------------------------------------------------------------


def page(tensor: str, source: int, target: int) -> PageMove:
    return PageMove(t(tensor), Extent(FrameId(source), 0, PAGE), Extent(FrameId(target), 0, PAGE))


def free(*frames: int) -> FreeRuns:
    found = FreeRuns()
    for frame in frames:
        found.add(frame, 1)
    return found


def test_copies_wait_for_what_lies_in_their_target() -> None:
    assert copies(safe_order([page("A", 0, 1), page("B", 1, 2), page("C", 2, 3)], free(0))) == ["C2>3", "B1>2", "A0>1"]


def test_a_ring_turns_through_a_spare_frame() -> None:
    assert copies(safe_order([page("A", 0, 1), page("B", 1, 0)], free(5))) == ["A0>5", "B1>0", "A5>1"]


def test_a_ring_without_a_spare_frame_cannot_turn() -> None:
    assert safe_order([page("A", 0, 1), page("B", 1, 0)], free()) is None


def test_rings_use_one_spare_frame_after_the_other() -> None:
    rings = [page("A", 0, 1), page("B", 1, 0), page("C", 2, 3), page("D", 3, 4), page("E", 4, 2)]
    found = copies(safe_order(rings, free(9)))
    assert found == ["A0>9", "B1>0", "A9>1", "C2>9", "E4>2", "D3>4", "C9>3"]


def test_a_frame_that_becomes_free_serves_as_spare() -> None:
    # Nothing is free at first, but A leaves 0 for good: the ring of B and C turns through it.
    beside = PageMove(t("A"), Extent(FrameId(0), 0, KiB), Extent(FrameId(7), PAGE // 2, KiB))
    assert copies(safe_order([beside, page("B", 1, 2), page("C", 2, 1)], free(0))) == ["A0>7", "B1>0", "C2>1", "B0>2"]


def test_a_tail_slides_in_its_page_through_a_spare_frame() -> None:
    frame = FrameId(0)
    slide = PageMove(t("A"), Extent(frame, 4 * KiB, 32 * KiB), Extent(frame, 0, 32 * KiB))
    assert copies(safe_order([slide], free(1))) == ["A0>1", "A1>0"]
    apart = PageMove(t("A"), Extent(frame, 32 * KiB, 32 * KiB), Extent(frame, 0, 32 * KiB))
    assert safe_order([apart], free()) == [apart]
