"""Products of parameters, of which `make test` runs a part, and `make test-all` all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Choice = tuple[int, ...]


def pairwise(sizes: Sequence[int]) -> set[Choice]:
    """Few choices of one index below each size in which every two indices of two different places occur together."""
    places = list(combinations(range(len(sizes)), 2))
    missing = {(a, i, b, j) for a, b in places for i in range(sizes[a]) for j in range(sizes[b])}
    choices = list(product(*map(range, sizes)))
    chosen: set[Choice] = set()
    while missing:
        best = max(choices, key=lambda choice: sum((a, choice[a], b, choice[b]) in missing for a, b in places))
        chosen.add(best)
        missing -= {(a, best[a], b, best[b]) for a, b in places}
    return chosen


def each_once(sizes: Sequence[int]) -> set[Choice]:
    """Choices in which every index of every place occurs: the largest place counts up, the others are the digits of
    that number."""
    largest = max(range(len(sizes)), key=lambda place: sizes[place])
    missing = {(place, index) for place, size in enumerate(sizes) for index in range(size)}
    chosen: set[Choice] = set()
    while missing:
        number = digits = len(chosen)
        choice = []
        for place, size in enumerate(sizes):
            choice.append(number % size if place == largest else digits % size)
            digits = digits if place == largest else digits // size
        chosen.add(tuple(choice))
        missing -= set(enumerate(choice))
    return chosen


def full_product(**parameters: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test over the product of three or more parameters; combinations that pairs do not need are `long`.

    Args:
        parameters: values by argument name, as a sequence or, to name them in the test's id, by that name.
    """
    return _parametrized(parameters, pairwise)


def each_value(**parameters: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """As `full_product`, for tests that train for long, or over two parameters: `make test` has every value, not every
    pair."""
    return _parametrized(parameters, each_once)


def every_third(start: int, **parameters: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """As `each_value`, where other tests have these values, too: `make test` has a third of its choices.

    Args:
        start: the first choice that it has: another one for each test of a kind.
    """
    return _parametrized(parameters, lambda sizes: set(sorted(each_once(sizes))[start % 3 :: 3]))


def _parametrized(
    parameters: Mapping[str, Sequence[Any] | Mapping[str, Any]], part: Callable[[Sequence[int]], set[Choice]]
) -> pytest.MarkDecorator:
    named = [
        list(values.items()) if isinstance(values, Mapping) else [(_label(value), value) for value in values]
        for values in parameters.values()
    ]
    short = part([len(values) for values in named])
    cases = []
    for choice in product(*(range(len(values)) for values in named)):
        labels, values = zip(*(named[place][index] for place, index in enumerate(choice)), strict=True)
        marks = () if choice in short else (pytest.mark.long,)
        cases.append(pytest.param(*values, marks=marks, id="-".join(labels)))
    return pytest.mark.parametrize(tuple(parameters), cases)


def _label(value: Any) -> str:
    return getattr(value, "__name__", str(value))
