"""Ctrl-C while the ``offload`` command is still being imported: one line and exit code 130, at once.

Importing torch takes seconds, in which nothing is open and nothing is to be put in order. A KeyboardInterrupt there
would be a long traceback, or be swallowed by an import in C, which leaves a module half made. Only what Python has
loaded anyway is imported here.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Final

_INTERRUPTED: Final = 128 + signal.SIGINT


def begin() -> None:
    """First of all: where this process is the command, end it on Ctrl-C until `end`. In other programs nothing is
    changed."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def end() -> None:
    """Ctrl-C raises KeyboardInterrupt from here on, where `begin` has changed that."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"offload: interrupted before anything began\n")
    os._exit(_INTERRUPTED)


def _is_command() -> bool:
    """Whether the program is ``python -m offload``, or its own file is one that imports ``offload.cli``, as the
    installed script's does."""
    if sys.argv[0] == "-m":  # Of a module that is still looked for, whose name is before its arguments.
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") in ("offload", "offload.__main__", "offload.cli")
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
    return frame.f_globals.get("__name__") == "__main__" and "offload.cli" in frame.f_code.co_names
