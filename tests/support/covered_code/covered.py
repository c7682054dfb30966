"""Code that interrupts must not divide: what tests have `pagemem.process.interrupts` cover."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Calls that have begun and not ended.
inside = [0]


def call(inner: Callable[[], object]) -> None:
    """Run something inside a call of ours."""
    inside[0] += 1
    inner()
    inside[0] -= 1


def work(n: int) -> int:
    """Many instructions, with no exception in mind."""
    inside[0] += 1
    total = 0
    for number in range(n):
        total += _one(number)
    inside[0] -= 1
    return total


def _one(number: int) -> int:
    return number * 2


@contextmanager
def block(on_enter: Callable[[], object], on_leave: Callable[[], object]) -> Iterator[None]:
    """A with block of ours, which does something when it is entered and when it is left."""
    inside[0] += 1
    on_enter()
    try:
        yield
    finally:
        on_leave()
        inside[0] -= 1


class Notes:
    """Has something to do when it goes."""

    def __init__(self, inner: Callable[[], object]) -> None:
        self._inner = inner

    def __del__(self) -> None:
        call(self._inner)
