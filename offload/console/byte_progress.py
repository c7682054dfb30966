"""How far work on many bytes is: a bar on a terminal, a plain line for every tenth of it in a pipe."""

from __future__ import annotations

from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from offload.console.live_bar import LiveBar
from offload.console.tables import print_line
from pagemem.units import format_bytes

_PARTS: Final = 10


class ByteProgress:
    """Shows bytes done; a context manager. Of one thread.

    Args:
        what: the work, e.g. "exporting".
        total_bytes: how many there are.
    """

    def __init__(self, console: Console, what: str, total_bytes: int) -> None:
        self._console = console
        self._what = what
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._bar = LiveBar(
            console,
            TextColumn(what),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task(what, total=total_bytes)

    def advance(self, n_bytes: int) -> None:
        """``n_bytes`` more are done."""
        before, self._done_bytes = self._done_bytes, self._done_bytes + n_bytes
        self._bar.move(self._task, completed=self._done_bytes)
        if not self._console.is_terminal and self._part(before) < self._part(self._done_bytes):
            share = f"{self._done_bytes * 100 // max(1, self._total_bytes):3d} %"
            done = f"{format_bytes(self._done_bytes)} of {format_bytes(self._total_bytes)}"
            print_line(self._console, f"{self._what} {share}  {done}")

    def _part(self, n_bytes: int) -> int:
        return n_bytes * _PARTS // max(1, self._total_bytes)

    def __enter__(self) -> ByteProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
