"""Lines and tables: framed on a terminal, aligned plain text in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def print_line(console: Console, line: str, style: str | None = None) -> None:
    """A line as it is: not wrapped, and nothing in it is taken for markup."""
    console.print(line, style=style, soft_wrap=True, highlight=False, markup=False)


def print_rows(title: str, rows: Sequence[Sequence[str]], console: Console, headings: Sequence[str] = ()) -> None:
    """Rows of as many cells each.

    Args:
        title: above the frame, on a terminal.
        headings: of the columns; none: the rows are of (what, value).
    """
    if console.is_terminal:
        table = Table(*headings, title=title, show_header=bool(headings))
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    lines = [headings, *rows] if headings else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print_line(console, "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
