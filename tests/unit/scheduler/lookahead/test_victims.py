"""The order in which tenants had best leave, worked by hand and against sorting all of them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pagemem.frames.page import TensorId
from scheduler.lookahead.victims import SETTLED_FIRST, Victims

A, B, C = (TensorId(i) for i in range(3))


def all_in_order(victims: Victims) -> list[TensorId]:
    """Each once, in the order of its first mention."""
    return list(dict.fromkeys(victims.in_order()))


def test_what_is_used_last_leaves_first_and_what_is_of_no_use_before_it() -> None:
    victims = Victims()
    for tensor, next_use in ((A, 5), (B, 9), (C, math.inf)):
        victims.used(tensor, next_use)
    assert all_in_order(victims) == [C, B, A]
    victims.used(B, 1)
    victims.left(C)
    assert all_in_order(victims) == [A, B]


def test_what_has_to_be_copied_out_comes_after_what_has_not_until_that_is_over() -> None:
    victims = Victims()
    for tensor, next_use in ((A, 5), (B, 9)):
        victims.used(tensor, next_use)
    victims.changed(B, clean_at_s=2.0)
    assert all_in_order(victims) == [A, B]
    victims.changed(B, clean_at_s=3.0)
    victims.settle(2.5)
    assert all_in_order(victims) == [A, B], "it has changed again"
    victims.settle(3.0)
    assert all_in_order(victims) == [B, A]
    victims.changed(B, clean_at_s=4.0)
    victims.used(B, math.inf)
    assert all_in_order(victims) == [B, A], "nobody wants what it holds"


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["used", "changed", "left", "settle"]),
        st.integers(0, 12),
        st.sampled_from([1, 2, 3, 5, 8, math.inf]),
    ),
    max_size=60,
)


@given(ACTIONS)
def test_the_orders_are_those_of_sorting(actions: list[tuple[str, int, float]]) -> None:
    victims, next_use, clean_at = Victims(), dict[TensorId, float](), dict[TensorId, float]()
    for what, number, value in actions:
        tensor = TensorId(number)
        if what == "used":
            victims.used(tensor, value)
            next_use[tensor] = value
            if value == math.inf:
                clean_at.pop(tensor, None)
        elif what == "settle":
            victims.settle(value)
            clean_at = {t: at for t, at in clean_at.items() if at > value}
        elif tensor in next_use and what == "changed" and value != math.inf:
            victims.changed(tensor, value)
            clean_at[tensor] = value
        elif what == "left":
            victims.left(tensor)
            next_use.pop(tensor, None)
            clean_at.pop(tensor, None)
        by_use = sorted(next_use, key=lambda t: (-next_use[t], t))
        settled = [t for t in by_use if t not in clean_at]
        assert list(victims.in_order()) == settled[:SETTLED_FIRST] + by_use
