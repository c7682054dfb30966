"""Giving several things back, all of them, whatever goes wrong with one."""

from __future__ import annotations

from collections.abc import Callable


def close_all(*closers: Callable[[], object]) -> None:
    """Call each, in order, also after one has failed.

    Raises:
        BaseException: what the first one that failed raised; what later ones raised is noted on it, since the first may be why.
    """
    first: BaseException | None = None
    for close in closers:
        try:
            close()
        except BaseException as error:  # whatever it is, the others are to be given back
            if first is None:
                first = error
            else:
                first.add_note(f"closing failed further: {type(error).__name__}: {error}")
    if first is not None:
        raise first
