"""Where the commands print to: a console that notices when its reader has gone."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from rich.console import Console

#: Exit code of a command whose output's reader has gone, as of a program that SIGPIPE ends.
BROKEN_PIPE: Final = 141


class OutputClosed(Exception):
    """The reader of the output has gone (``offload ... | head``)."""


class Output(Console):
    """Standard output.

    Args:
        outlives_reader: whether work continues when the reader has gone, which sets ``closed``; otherwise
            `OutputClosed` is raised.
    """

    def __init__(self, *, outlives_reader: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._is_stdout = options.get("file") is None
        self._outlives_reader = outlives_reader
        self.closed = False

    def on_broken_pipe(self) -> None:
        """Print no more, and leave nothing that Python would fail to flush at its end."""
        self.quiet = self.closed = True
        if self._is_stdout:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        if not self._outlives_reader:
            raise OutputClosed


def is_closed(console: Console) -> bool:
    """Whether the console's reader has gone."""
    return isinstance(console, Output) and console.closed
