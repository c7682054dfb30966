"""Giving several things back, all of them, whatever goes wrong with one and whatever interrupts."""

from __future__ import annotations

from collections.abc import Callable


def close_all(*closers: Callable[[], object]) -> None:
    """Call each, in order, also after one has failed; see `finish`.

    Args:
        closers: can be called again wherever they were left by an interrupt.

    Raises:
        BaseException: what the first one that failed raised; what later ones raised is noted on it, since the first may
            be why.
    """
    first: BaseException | None = None
    for close in closers:
        for _ in range(2):
            try:
                finish(close)
            except BaseException as error:  # whatever it is, the others are to be given back
                if first is None:
                    first = error
                else:
                    first.add_note(f"closing failed further: {type(error).__name__}: {error}")
                if isinstance(error, Exception):
                    break  # An interrupt may have come before `finish` had begun: it is called once more.
            else:
                break
    if first is not None:
        raise first


def finish(step: Callable[[], object]) -> None:
    """Call ``step``, again and again while what ends it is an interrupt or the like: that is raised once the step has
    come to its end.

    Args:
        step: can be called again wherever it was left.
    """
    interrupt: BaseException | None = None
    while True:
        try:
            step()
        except Exception as error:
            if interrupt is None:
                raise
            raise interrupt from error
        except BaseException as raised:  # KeyboardInterrupt, SystemExit and what else ends programs
            interrupt = raised
        else:
            break
    if interrupt is not None:
        raise interrupt
