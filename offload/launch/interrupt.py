"""Ctrl-C and SIGTERM in the `offload` command: the first ends a run after its step, the second at once.

A burst of signals is one, whether it is noted or raises: a key held down must not interrupt the ending that it has
asked for, nor take its exit code from it. All on the main thread.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Final

from pagemem.process import interrupts

#: The exit code of a program that Ctrl-C has ended.
INTERRUPTED: Final = 128 + signal.SIGINT
#: What ends a run early.
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
#: Signals that come so soon after one that was noted, or has raised something, are one with it.
BURST_S: Final = 1.0

_heard_s = float("-inf")


def _raise(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt for SIGINT, SystemExit for others, once for a burst, and not in the middle of the engine's
    code."""
    global _heard_s
    now_s = time.monotonic()
    if now_s - _heard_s < BURST_S:
        return
    _heard_s = now_s
    error: Callable[[], BaseException] = (
        KeyboardInterrupt if number == signal.SIGINT else partial(SystemExit, 128 + number)
    )
    interrupts.raise_outside(frame, error)


class Interrupt:
    """Whether a run has been asked to end; looked at between steps and between validation batches.

    Args:
        commits: whether the run commits when it ends, for the line that answers the first signal.
    """

    def __init__(self, *, commits: bool) -> None:
        self._commits = commits
        self._number: int | None = None
        self._answered = False

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._number is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, 0 without a signal."""
        return 0 if self._number is None else 128 + self._number

    def _note(self, number: int, frame: FrameType | None) -> None:
        global _heard_s
        if self._number is not None:
            _raise(number, frame)
            return
        self._number, _heard_s = number, time.monotonic()
        # Of several ranks one answers a terminal; torchrun sends SIGTERM also where another rank has failed, which is
        # known only when all are asked.
        if os.environ.get("WORLD_SIZE", "1") == "1" or (
            number == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0"
        ):
            self.answer()

    def answer(self) -> None:
        """Say once how the run ends."""
        if self._answered:
            return
        self._answered = True
        commits = "committing" if self._commits else "without a commit (commit.at_end is false)"
        number = self._number or signal.SIGTERM  # None: only another rank has it
        again = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        _answer(
            f"stopping after this step or validation batch, {commits}; {again} again, more than {BURST_S:.0f} s later, "
            "stops at once, without a commit"
        )


def _answer(text: str) -> None:
    """A line on stderr, past Python's streams: the signal may have come while one of them was being written to."""
    clear_line = "\r\x1b[2K" if os.isatty(2) else ""
    with suppress(OSError):  # Nobody reads it; the run ends all the same.
        os.write(2, f"{clear_line}offload: {text}\n".encode())


@contextmanager
def noted(*, commits: bool) -> Iterator[Interrupt]:
    """Inside the block the first signal is noted, and a second one raises KeyboardInterrupt or SystemExit(143).

    Args:
        commits: see `Interrupt`.
    """
    global _heard_s
    _heard_s = float("-inf")
    interrupt = Interrupt(commits=commits)
    before = {number: signal.signal(number, interrupt._note) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_process() -> None:
    """From now on this process raises one KeyboardInterrupt for a burst of Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _raise)


def only_exit_is_left() -> None:
    """Nothing interrupts the end of this process: its exit code is decided."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
