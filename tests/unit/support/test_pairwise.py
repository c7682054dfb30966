"""The product of parameters: every pair of values is in the short part, and everything is in the whole."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from pairwise import full_product, pairwise


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
