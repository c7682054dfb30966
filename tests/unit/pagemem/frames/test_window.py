"""Choosing which adjacent frames to take: scenarios to read aloud, and comparison with trying every window."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiers import anyone

from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import FrameId, TensorId
from pagemem.frames.window import Segment, Window, best_window, window_near
from pagemem.knobs import LOOKED_AT
from pagemem.tier import Tier
from pagemem.units import KiB

PAGE_BYTES = 64 * KiB

Movable = Callable[[TensorId], bool]


def layout(text: str) -> list[Segment]:
    """Segments of a tier drawn with one sign a frame: a letter for its owner, a dot when it is free."""
    found: list[Segment] = []
    for frame, sign in enumerate(text):
        owner = None if sign == "." else TensorId(ord(sign))
        if found and found[-1][2] == owner:
            first, length, _ = found[-1]
            found[-1] = (first, length + 1, owner)
        else:
            found.append((FrameId(frame), 1, owner))
    return found


def tenants(text: str) -> tuple[TensorId, ...]:
    return tuple(TensorId(ord(sign)) for sign in text)


def all_but(text: str) -> Movable:
    return lambda tensor: tensor not in tenants(text)


def number(leaving: Sequence[TensorId]) -> int:
    return len(leaving)


def test_a_free_run_is_taken_before_anyone_leaves() -> None:
    assert best_window(layout("aab..cc"), 2, anyone, number) == Window(FrameId(3), 2, ())


def test_the_first_of_equal_windows_is_taken() -> None:
    assert best_window(layout("a..b..c"), 2, anyone, number) == Window(FrameId(1), 2, ())


def test_a_tenant_leaves_whole_even_if_one_frame_of_it_is_wanted() -> None:
    assert best_window(layout("aaaa."), 2, anyone, number) == Window(FrameId(0), 2, tenants("a"))


def test_free_frames_beside_a_tenant_make_one_leave_instead_of_two() -> None:
    assert best_window(layout("abc.d"), 2, anyone, number) == Window(FrameId(2), 2, tenants("c"))


def test_the_cost_decides_not_the_number_of_tenants() -> None:
    costs = dict(zip(tenants("abc"), (1, 1, 9)))
    found = best_window(layout("abc"), 1, anyone, lambda leaving: sum(costs[tensor] for tensor in leaving))
    assert found == Window(FrameId(0), 1, tenants("a"))
    found = best_window(layout("acbbaa"), 2, anyone, lambda leaving: max(costs[tensor] for tensor in leaving))
    assert found == Window(FrameId(2), 2, tenants("b"))


def test_costs_may_be_anything_with_an_order() -> None:
    found = best_window(layout("abc"), 1, anyone, lambda leaving: (0.0, -leaving[0], "tie"))
    assert found == Window(FrameId(2), 1, tenants("c"))


def test_a_tenant_that_must_stay_is_never_in_the_window() -> None:
    assert best_window(layout("abcde"), 2, all_but("bd"), number) is None
    assert best_window(layout("abcd."), 2, all_but("b"), number) == Window(FrameId(3), 2, tenants("d"))


def test_the_whole_tier_can_be_one_window() -> None:
    assert best_window(layout("a.b"), 3, anyone, number) == Window(FrameId(0), 3, tenants("ab"))


@pytest.mark.parametrize("text", ["", "a", "..."])
def test_no_window_is_larger_than_the_tier(text: str) -> None:
    assert best_window(layout(text), 4, anyone, number) is None


def test_immovable_tenants_are_not_shown_to_the_cost() -> None:
    seen: set[TensorId] = set()

    def cost(leaving: Sequence[TensorId]) -> int:
        seen.update(leaving)
        return len(leaving)

    best_window(layout("abc.d"), 2, all_but("b"), cost)
    assert seen == set(tenants("cd"))


# ---- against every window there is ----------------------------------------------------------------------------------


@st.composite
def tiers(draw: st.DrawFn) -> list[Segment]:
    """Up to eight stretches; each tensor has one, as in a tier of contiguous tensors; no two free ones touch."""
    segments: list[Segment] = []
    position = 0
    for tensor, length in enumerate(draw(st.lists(st.integers(1, 4), max_size=8))):
        free = draw(st.booleans()) and not (segments and segments[-1][2] is None)
        segments.append((FrameId(position), length, None if free else TensorId(tensor)))
        position += length
    return segments


def every_window(segments: Sequence[Segment], n_frames: int, movable: Movable) -> list[Window]:
    owners = [owner for _, length, owner in segments for _ in range(length)]
    found: list[Window] = []
    for start in range(len(owners) - n_frames + 1):
        leaving = tuple(dict.fromkeys(owner for owner in owners[start : start + n_frames] if owner is not None))
        if all(movable(tensor) for tensor in leaving):
            found.append(Window(FrameId(start), n_frames, leaving))
    return found


@given(tiers(), st.integers(1, 12), st.sets(st.integers(0, 7)), st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_no_window_is_cheaper_and_the_one_found_is_a_real_one(
    segments: list[Segment], n_frames: int, staying: set[int], weights: list[int]
) -> None:
    def movable(tensor: TensorId) -> bool:
        return tensor not in staying

    def added(leaving: Sequence[TensorId]) -> int:
        return sum(weights[tensor] for tensor in leaving)

    def dearest(leaving: Sequence[TensorId]) -> int:
        return max((weights[tensor] for tensor in leaving), default=-1)

    windows = every_window(segments, n_frames, movable)
    for cost in (added, dearest):
        found = best_window(segments, n_frames, movable, cost)
        if not windows:
            assert found is None
            continue
        assert found in windows
        assert found is not None and cost(found.tenants) == min(cost(window.tenants) for window in windows)


@given(tiers(), st.integers(1, 6))
def test_tenants_are_named_once_each_in_the_order_they_lie(segments: list[Segment], n_frames: int) -> None:
    found = best_window(segments, n_frames, anyone, number)
    if found is not None:
        assert list(found.tenants) == sorted(set(found.tenants))


# ---- near the best tenants ------------------------------------------------------------------------------------------


def book_of(segments: Sequence[Segment]) -> PageAllocator:
    """A tier with these tenants."""
    book = PageAllocator(Tier.HOST, PAGE_BYTES, sum(length for _, length, _ in segments))
    for first, length, owner in segments:
        if owner is not None:
            book.allocate(owner, length * PAGE_BYTES, at=first)
    return book


@given(
    tiers(),
    st.integers(1, 12),
    st.sets(st.integers(0, 7)),
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.integers(0, 4),
)
def test_looking_near_the_best_tenants_finds_what_looking_everywhere_finds(
    segments: list[Segment], n_frames: int, staying: set[int], weights: list[int], cut: int
) -> None:
    book = book_of(segments)
    end = max(0, book.n_frames - cut)

    def movable(tensor: TensorId) -> bool:
        return tensor not in staying

    def dearest(leaving: Sequence[TensorId]) -> int:
        return max((weights[tensor] for tensor in leaving), default=-1)

    preferred = sorted(book.placements, key=lambda tensor: weights[tensor])
    found = window_near(book, n_frames, preferred, movable, dearest, lambda tensor: weights[tensor], end)
    best = best_window(list(book.segments(0, end)), n_frames, movable, dearest)
    if best is None:
        assert found is None
    elif best.tenants:
        assert (
            found is not None and dearest(found.tenants) == dearest(best.tenants) and all(map(movable, found.tenants))
        )
        assert found in every_window(list(book.segments(0, end)), n_frames, movable)
    elif found is not None:  # A free window that no movable tenant is near is not looked for below the end of a tier.
        assert found.tenants == () or cut
        assert found.first + n_frames <= end


def test_it_looks_no_further_than_it_must() -> None:
    segments = layout("".join(chr(ord("A") + number) for number in range(3 * LOOKED_AT)))
    book, seen = book_of(segments), set[TensorId]()

    def cost(leaving: Sequence[TensorId]) -> int:
        seen.update(leaving)
        return max(leaving)

    def stalled(leaving: Sequence[TensorId]) -> int:
        seen.update(leaving)
        return 1000 - min(leaving)

    first = min(book.placements)
    assert window_near(book, 1, sorted(book.placements), anyone, cost, lambda tensor: tensor) == Window(
        FrameId(0), 1, (first,)
    )
    assert seen == {first}
    assert window_near(book, 1, sorted(book.placements), anyone, stalled, lambda tensor: 0) is not None
    assert len(seen) == LOOKED_AT
