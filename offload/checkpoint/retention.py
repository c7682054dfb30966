"""Which commits of a run are kept. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def retired(
    own: Mapping[int, str | None], foreign: Mapping[int, str | None], left: Collection[int], newest: int, keep: int
) -> tuple[list[int], list[int]]:
    """Of the commits that can be used, by number and name, those that go: own ones, and such of another shape.

    Args:
        left: later than the one that the run resumed from. newest: the one that was just made.
        keep: unnamed ones that stay, whatever their shape.
    """
    names = {**foreign, **own}
    unnamed = [number for number in sorted(names) if names[number] is None and number not in left]
    newest_of_name = {names[number]: number for number in sorted(names)}
    kept = {*unnamed[-keep:], *(number for name, number in newest_of_name.items() if name is not None), newest}
    return [number for number in own if number not in kept], [number for number in foreign if number not in kept]
