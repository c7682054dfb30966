"""A progress bar on a terminal, drawn by whoever moves it: no thread refreshes it, so none is left when it ends."""

from __future__ import annotations

import time
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

#: Seconds between two drawings, at least.
_DRAWN_EVERY_S: Final = 0.1


class LiveBar(Progress):
    """One line that goes when the work is over; nothing where there is no terminal. Of one thread.

    Args:
        columns: what the line shows, see `rich.progress`.
    """

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        is_shown = console.is_terminal
        super().__init__(*columns, console=console, transient=True, auto_refresh=False, disable=not is_shown)
        self._drawn_s = 0.0

    def move(self, task: TaskID, **fields: Any) -> None:
        """Set what has changed, see `rich.progress.Progress.update`; it is drawn unless that was done a moment ago."""
        now_s = time.monotonic()
        is_due = now_s - self._drawn_s >= _DRAWN_EVERY_S
        self.update(task, refresh=is_due, **fields)
        self._drawn_s = now_s if is_due else self._drawn_s
