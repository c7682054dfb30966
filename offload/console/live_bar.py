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
        super().__init__(*columns, console=console, transient=True, auto_refresh=False)
        self._drawn_s = 0.0

    def start(self) -> None:
        """Begin to draw."""
        if self.console.is_terminal:
            super().start()

    def stop(self) -> None:
        """Remove the line."""
        if self.console.is_terminal:
            super().stop()

    def move(self, task: TaskID, **fields: Any) -> None:
        """Set what has changed, see `rich.progress.Progress.update`; it is drawn unless that was done a moment ago."""
        self.update(task, **fields)
        now_s = time.monotonic()
        if self.console.is_terminal and now_s - self._drawn_s >= _DRAWN_EVERY_S:
            self._drawn_s = now_s
            self.refresh()
