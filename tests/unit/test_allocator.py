"""Allocator scenarios with few pages, read as stories: tensors are single letters, a page is 64 KiB.

`layout` shows a tier as a string, a letter a frame: ``.`` is free, a capital is whole pages, a small letter a shared page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pagemem.allocator import PageAllocator
from pagemem.free_runs import FreeRuns
from pagemem.packing import safe_order
from pagemem.page import Extent, FrameId, PageMove, Placement, Run, Shortage, TensorId
from pagemem.tier import Tier
from pagemem.units import BLOCK_BYTES, KiB

PAGE = 64 * KiB
made: list[PageAllocator] = []


@pytest.fixture(autouse=True)
def every_tier_is_valid_at_the_end() -> Iterator[None]:
    made.clear()
    yield
    for frames in made:
        frames.validate()


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


def copies(found: list[PageMove] | Shortage | None) -> list[str]:
    """Page copies as 'A3>0': tensor, frame from, frame to."""
    assert isinstance(found, list), found
    return [f"{chr(move.tensor)}{move.source.frame}>{move.target.frame}" for move in found]


def layout(frames: PageAllocator) -> str:
    shown = ["."] * frames.n_frames
    for tensor in frames.tensors():
        for extent in placed_of(frames, tensor).extents(PAGE):
            tail = placed_of(frames, tensor).tail
            letter = chr(tensor).lower() if extent == tail else chr(tensor)
            if shown[extent.frame] == "." or frames.owner(extent.frame) == tensor:
                shown[extent.frame] = letter
    return "".join(shown)


def placed_of(frames: PageAllocator, tensor: TensorId) -> Placement:
    found = frames.placement(tensor)
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


# ---- taking and giving back ----------------------------------------------------------------------------------------


def test_whole_pages_go_to_the_run_that_fits_best() -> None:
    frames = filled("A..BC....D...E")
    assert placed(frames.allocate(t("X"), 3 * PAGE)).runs == (Run(FrameId(10), 3),)
    assert layout(frames) == "A..BC....DXXXE"


def test_of_equal_runs_the_lowest_is_taken() -> None:
    frames = filled("A..B..C")
    assert placed(frames.allocate(t("X"), 2 * PAGE)).runs == (Run(FrameId(1), 2),)


def test_without_a_run_long_enough_the_fewest_pieces_are_taken() -> None:
    frames = filled("A..B...C.D..E")
    x = placed(frames.allocate(t("X"), 4 * PAGE))
    assert x.runs == (Run(FrameId(4), 3), Run(FrameId(8), 1))
    assert not x.contiguous
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
    assert x.runs == (Run(FrameId(3), 2),)


def test_tails_start_on_blocks_and_say_their_exact_length() -> None:
    frames = tier(3)
    a = placed(frames.allocate(t("A"), PAGE + 100))
    b = placed(frames.allocate(t("B"), 1))
    assert a.extents(PAGE) == [Extent(FrameId(0), 0, PAGE), Extent(FrameId(1), 0, 100)]
    assert b.tail == Extent(FrameId(1), BLOCK_BYTES, 1)


def test_a_left_over_that_rounds_up_to_a_page_is_a_whole_page() -> None:
    frames = tier(2)
    a = placed(frames.allocate(t("A"), 2 * PAGE - 1))
    assert (a.runs, a.tail) == ((Run(FrameId(0), 2),), None)
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
    assert (frames.used_frames, frames.owner(0), frames.largest_free_run) == (0, None, 2)


def test_a_contiguous_tensor_shares_with_nobody() -> None:
    frames = tier(4)
    frames.allocate(t("A"), PAGE // 2)
    x = placed(frames.allocate(t("X"), PAGE + 1, contiguous=True))
    assert (x.runs, x.tail, x.contiguous) == ((Run(FrameId(1), 2),), None, True)
    assert frames.allocate(t("Y"), 2 * PAGE, contiguous=True) == Shortage(Tier.HOST, 2, 1, 1)


def test_contiguous_needs_frames_side_by_side() -> None:
    frames = filled("A.B.C.")
    assert frames.allocate(t("X"), 2 * PAGE, contiguous=True) == Shortage(Tier.HOST, 2, 3, 1)
    assert placed(frames.allocate(t("X"), 2 * PAGE)).n_frames == 2


def test_at_takes_exactly_those_frames_or_none() -> None:
    frames = filled("A....B")
    assert placed(frames.allocate(t("X"), 2 * PAGE, at=FrameId(2))).runs == (Run(FrameId(2), 2),)
    assert layout(frames) == "A.XX.B"
    for taken in (0, 1, 3, 4, 6, -1):
        assert frames.allocate(t("Y"), 2 * PAGE, at=FrameId(taken)) == Shortage(Tier.HOST, 2, 2, 1)
    assert layout(frames) == "A.XX.B"


def test_a_shortage_changes_nothing() -> None:
    frames = filled("AA.B")
    assert frames.allocate(t("X"), PAGE + 1) == Shortage(Tier.HOST, 2, 1, 1)
    assert t("X") not in frames
    assert layout(frames) == "AA.B"
    frames.grow(1)
    assert layout(frames) == "AA.B."
    assert placed(frames.allocate(t("X"), PAGE + 1)).n_frames == 2


def test_release_joins_the_neighbours() -> None:
    frames = filled(".AB.")
    released = frames.release(t("A"))
    assert released.runs == (Run(FrameId(1), 1),)
    assert frames.placement(t("A")) is None
    assert frames.largest_free_run == 2
    frames.release(t("B"))
    assert frames.largest_free_run == 4


def test_growing_extends_the_last_free_run() -> None:
    frames = filled("A.")
    frames.grow(0)
    frames.grow(3)
    assert (frames.n_frames, frames.free_frames, frames.largest_free_run) == (5, 4, 4)


def test_the_peak_is_the_most_that_was_ever_used() -> None:
    frames = tier(8)
    frames.allocate(t("A"), 3 * PAGE)
    frames.allocate(t("B"), 2 * PAGE)
    frames.release(t("A"))
    frames.allocate(t("C"), PAGE)
    assert (frames.used_frames, frames.peak_frames) == (3, 5)


@pytest.mark.parametrize("page_bytes", [0, 4096, 32 * KiB, 96 * KiB, -64 * KiB])
def test_the_page_must_be_a_power_of_two_of_64_kib_or_more(page_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"page_bytes is {page_bytes}"):
        PageAllocator(Tier.HOST, page_bytes, 1)


def test_bad_arguments_are_named() -> None:
    frames = filled("A.")
    with pytest.raises(ValueError, match="n_bytes is 0"):
        frames.allocate(t("X"), 0)
    with pytest.raises(ValueError, match="already"):
        frames.allocate(t("A"), PAGE)
    with pytest.raises(ValueError, match="n_frames is -1"):
        frames.grow(-1)
    with pytest.raises(ValueError, match="n_frames is -3"):
        PageAllocator(Tier.HOST, PAGE, -3)
    for call in (frames.release, lambda x: frames.move(x, FrameId(0)), lambda x: frames.merge(x, movable=anyone)):
        with pytest.raises(KeyError, match="no frames in the host tier"):
            call(t("X"))
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


def test_fragmentation_inside_and_outside() -> None:
    frames = filled("A.B...")
    frames.allocate(t("X"), 10 * KiB)
    found = frames.fragmentation()
    assert (found.asked_bytes, found.internal_bytes) == (2 * PAGE + 10 * KiB, 54 * KiB)
    assert found.internal_ratio == pytest.approx(54 / 138)
    assert found.external_ratio == 0.0
    frames.allocate(t("Y"), PAGE, at=FrameId(4))
    assert frames.fragmentation().external_ratio == pytest.approx(1 / 2)
    assert PageAllocator(Tier.SSD, PAGE, 0).fragmentation().internal_ratio == 0.0


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


# ---- checking ------------------------------------------------------------------------------------------------------


def test_validate_finds_every_broken_cross_reference() -> None:
    def broken(change: Callable[[PageAllocator], None], message: str) -> None:
        frames = PageAllocator(Tier.HOST, PAGE, 4)
        frames.allocate(t("A"), PAGE + KiB)
        frames.validate()
        change(frames)
        with pytest.raises(AssertionError, match=message):
            frames.validate()

    broken(lambda frames: frames._free.add(0, 1), "two owners or none")
    broken(lambda frames: frames._free.take(3, 1), "accounted for|two owners or none")
    broken(lambda frames: frames._runs.update({0: (1, t("Z"))}), "index of runs")
    broken(lambda frames: frames._placements.pop(t("A")) and None, "does not know it")
    broken(lambda frames: setattr(frames, "peak_frames", 0), "more than the peak")
    broken(lambda frames: setattr(frames, "_asked_bytes", 5), "counted as asked for")
    broken(lambda frames: setattr(frames._free, "n_frames", 9), "frames counted")

