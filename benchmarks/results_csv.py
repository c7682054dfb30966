"""`results/results.csv`: one row of medians for each ratio (or time, where there is none) that a benchmark measured.

Rows are only ever appended. The columns are the fields of `Row`, in order; an empty cell is None.
"""

from __future__ import annotations

import csv
import datetime
import io
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).resolve().parent / "results"
FILE: Final = RESULTS / "results.csv"

#: Ratios of `benchmarks.step`, as `Row.ratio_of` names them.
OVER_PLAIN: Final = "step / plain PyTorch"
OVER_SAME_HEAP: Final = "step / plain PyTorch, heap as ours"
OVER_TORCH_OFFLOAD: Final = "step / torch's CPU offload"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured ratio.

    Attributes:
        commit: of the code measured, with "+" where tracked files differed. In rows from before 2026-11-30:
            the commit that added the result.
        machine: processor, cores, RAM.
        ratio_of: "what / over what", in words; without a ratio, what `step_s` is.
        batch: rows x tokens.
        ram_share: `memory.ram` over the bytes of parameters and states.
        pairs, steps_per_turn: paired turns behind the ratio, and the steps in each.
        ratio, ratio_low, ratio_high: median over paired turns, and its bootstrap 95 % interval.
        step_s, other_step_s: median seconds of a step (or of what `ratio_of` names), ours and the other's.
        peak_rss_bytes, other_peak_rss_bytes: VmHWM of each process.
        read_bytes_per_step, written_bytes_per_step: what page files moved for ours.
        record: file beside the CSV with everything measured, where it is kept.
    """

    date: datetime.date
    commit: str
    machine: str
    benchmark: str
    command: str
    ratio_of: str
    model: str | None = None
    batch: str | None = None
    ram_share: float | None = None
    threads: int | None = None
    pairs: int | None = None
    steps_per_turn: int | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    step_s: float | None = None
    other_step_s: float | None = None
    peak_rss_bytes: int | None = None
    other_peak_rss_bytes: int | None = None
    read_bytes_per_step: int | None = None
    written_bytes_per_step: int | None = None
    record: str | None = None


COLUMNS: Final = tuple(field.name for field in fields(Row))


def read(file: Path = FILE) -> list[Row]:
    """All rows, oldest first.

    Raises:
        ValueError: a wrong header, or a cell that is not of its column's type; names file, line and column.
    """
    with file.open(newline="") as opened:
        lines = csv.reader(opened)
        header = tuple(next(lines, ()))
        if header != COLUMNS:
            raise ValueError(f"{file}: the columns are {', '.join(header)}, not {', '.join(COLUMNS)}")
        return [_row(cells, f"{file}:{lines.line_num}") for cells in lines]


def append(rows: Iterable[Row], file: Path = FILE) -> None:
    """Add rows at the end; a file that is not there begins with the header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not file.exists():
        writer.writerow(COLUMNS)
    writer.writerows([_cell(getattr(row, name)) for name in COLUMNS] for row in rows)
    with file.open("a", newline="") as opened:
        opened.write(text.getvalue())


def machine(surroundings: Mapping[str, Any]) -> str:
    """The column `machine`, from `common.surroundings`."""
    parts = [surroundings["cpu"], f"{surroundings['cores']} cores", f"{surroundings['memory_gib']:g} GiB"]
    return ", ".join([*parts, *([surroundings["gpu"]] if "gpu" in surroundings else [])])


def commit() -> str:
    """The commit that is checked out, with "+" where tracked files other than results differ from it.

    Raises:
        subprocess.CalledProcessError: this is not a git repository; its message is on stderr.
    """
    head = _git("rev-parse", "--short=9", "HEAD").strip()
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return f"{head}+" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=RESULTS, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _row(cells: list[str], where: str) -> Row:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{where}: {len(cells)} cells, not {len(COLUMNS)}")
    values: dict[str, Any] = {}
    for field, cell in zip(fields(Row), cells, strict=True):
        kind = str(field.type)
        if not cell and not kind.endswith("| None"):
            raise ValueError(f"{where}: {field.name} is empty")
        try:
            values[field.name] = _CONVERTERS[kind.removesuffix(" | None")](cell) if cell else None
        except ValueError as error:
            raise ValueError(f"{where}: {field.name} is {cell!r}: {error}") from error
    return Row(**values)


_CONVERTERS: Final[dict[str, Any]] = {
    "str": str, "int": int, "float": float, "datetime.date": datetime.date.fromisoformat,
}  # fmt: skip
