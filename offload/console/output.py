"""Where the commands print to: a console that knows when nobody reads it any more."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from rich.console import Console

#: Exit code of a command whose output nobody reads any more, as of a program that SIGPIPE ends.
BROKEN_PIPE: Final = 141


class OutputClosed(Exception):
    """The reader of the output has gone (``offload ... | head``)."""


class Output(Console):
    """Standard output.

    Args:
        goes_on: whether work continues without a reader, who is then noted in ``closed``; otherwise `OutputClosed` is
            raised.
    """

    def __init__(self, *, goes_on: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._is_stdout = options.get("file") is None
        self._goes_on = goes_on
        self.closed = False

    def on_broken_pipe(self) -> None:
        """Nobody reads: print no more, and leave nothing for Python to complain about when it flushes at its end."""
        self.quiet = self.closed = True
        if self._is_stdout:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        if not self._goes_on:
            raise OutputClosed


def is_closed(console: Console) -> bool:
    """Whether what is printed on a console reaches nobody any more."""
    return isinstance(console, Output) and console.closed
