"""Tables on a terminal, and as plain text where there is none."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def print_rows(title: str, rows: Sequence[tuple[str, str]], console: Console) -> None:
    """Rows of (what, value): framed on a terminal, aligned plain text in a pipe."""
    if not console.is_terminal:
        width = max(len(what) for what, _ in rows)
        for what, value in rows:
            console.print(f"{what:<{width}}  {value}", soft_wrap=True, highlight=False, markup=False)
        return
    table = Table(title=title, show_header=False)
    for what, value in rows:
        table.add_row(what, value)
    console.print(table)
