"""The product of parameters: every pair of values is in the short part, and everything is in the whole."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from pairwise import each_once, each_value, every_third, full_product, pairwise


@pytest.mark.parametrize("sizes", [(10, 3, 2, 2), (2, 2, 2), (4, 3, 3), (7, 4, 2), (1, 1, 1), (3, 5)])
def test_every_two_values_meet(sizes: tuple[int, ...]) -> None:
    chosen = pairwise(sizes)
    for a, b in combinations(range(len(sizes)), 2):
        assert {(choice[a], choice[b]) for choice in chosen} == set(product(range(sizes[a]), range(sizes[b])))
    two_largest = sorted(sizes)[-1] * sorted(sizes)[-2]
    assert two_largest <= len(chosen) <= 1.5 * two_largest


def test_the_rest_of_the_product_is_long() -> None:
    mark = full_product(name=("a", "b"), clip_norm=(None, 0.5), place={"ram": {"x": 1}, "ssd": {}})
    names, cases = mark.args
    assert names == ("name", "clip_norm", "place")
    assert [case.values for case in cases] == list(product(("a", "b"), (None, 0.5), ({"x": 1}, {})))
    assert [case.id for case in cases][:3] == ["a-None-ram", "a-None-ssd", "a-0.5-ram"]
    assert sum(not case.marks for case in cases) == 4
    assert all(mark.name == "long" for case in cases for mark in case.marks)


@pytest.mark.parametrize(
    ("sizes", "count"), [((9, 2), 9), ((9, 4, 2), 9), ((2, 7, 4), 7), ((3, 2, 2), 3), ((2, 2, 2), 3), ((1, 1), 1)]
)
def test_each_value_occurs_in_as_few_as_the_largest_has_or_little_more(sizes: tuple[int, ...], count: int) -> None:
    chosen = each_once(sizes)
    for place, size in enumerate(sizes):
        assert {choice[place] for choice in chosen} == set(range(size))
    assert len(chosen) == count


def test_two_values_do_not_always_come_together() -> None:
    assert {choice[1:] for choice in each_once((9, 2, 2, 2))} == set(product(range(2), repeat=3))


def test_the_rest_of_the_values_is_long() -> None:
    _, cases = each_value(name=("a", "b", "c"), clip_norm=(None, 0.5)).args
    assert [case.id for case in cases if not case.marks] == ["a-None", "b-0.5", "c-None"]


def test_thirds_make_up_every_value() -> None:
    short: set[str] = set()
    for start in range(3):
        _, cases = every_third(start, name="abcdefg", clip_norm=(None, 0.5)).args
        some = {case.id for case in cases if not case.marks}
        assert len(some) in (2, 3) and not some & short
        short |= some
    assert {name[0] for name in short} == set("abcdefg")
