"""How far work on many bytes is: a bar on a terminal, a plain line for every tenth of it in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from offload.console.live_bar import LiveBar
from offload.console.tables import print_line
from pagemem.units import format_bytes

_PARTS: Final = 10


@contextmanager
def byte_progress(console: Console, what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show bytes done; yields what is called with how many more are. Of one thread.

    Args:
        what: the work, e.g. "exporting".
        total_bytes: how many there are.
    """
    columns = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    done_bytes = 0
    with LiveBar(console, TextColumn(what), BarColumn(bar_width=24), *columns) as bar:
        task = bar.add_task(what, total=total_bytes)

        def advance(n_bytes: int) -> None:
            nonlocal done_bytes
            before = done_bytes * _PARTS // max(1, total_bytes)
            done_bytes += n_bytes
            bar.move(task, completed=done_bytes)
            if not console.is_terminal and before < done_bytes * _PARTS // max(1, total_bytes):
                done = f"{format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
                print_line(console, f"{what} {done_bytes * 100 // max(1, total_bytes):3d} %  {done}")

        yield advance
