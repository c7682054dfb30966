"""metrics.jsonl of a run that goes on: what can be read of it. It is a report, and no judge of whether a run may go
on."""

from __future__ import annotations

import math
import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Final

from offload.launch.progress import StepMetrics
from pagemem.folders.small_file import open_regular, parse_json

#: A longer line is none of ours.
MAX_LINE_BYTES: Final = 4096
_MAX_STEP: Final = 2**53


@dataclass(frozen=True, slots=True)
class KeptMetrics:
    """What an earlier part of the run has left.

    Attributes:
        metrics: of the steps asked for that have a whole line, ascending, one each: the last line of a step counts.
        note: what is missing and why, in one line, or None: there is one for every step.
    """

    metrics: list[StepMetrics]
    note: str | None


def kept_metrics(path: Path, steps: int) -> KeptMetrics:
    """The metrics of the first ``steps`` steps. Nothing in the file, in whatever state it is, stops a run; nothing is
    changed."""
    if not steps:
        return KeptMetrics([], None)
    found: dict[int, StepMetrics] = {}
    n_unreadable, why = 0, ""
    try:
        fd, _ = open_regular(path, 2**62)
        with os.fdopen(fd, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                if not line.strip():
                    continue
                try:
                    metrics = _metrics(line)
                except ValueError as error:
                    n_unreadable, why = n_unreadable + 1, why or str(error)
                    continue
                if metrics.step <= steps:
                    found[metrics.step] = metrics
    except OSError as error:
        return KeptMetrics(
            [], f"{path}: the metrics of the {steps} steps before are not kept: {error.strerror or error}"
        )
    kept = [found[step] for step in sorted(found)]
    if len(kept) == steps:
        return KeptMetrics(kept, None)
    unreadable = f"; {n_unreadable} lines cannot be read, the first: {why}" if n_unreadable else ""
    return KeptMetrics(kept, f"{path}: {steps - len(kept)} of the {steps} steps before have no metrics{unreadable}")


def _metrics(line: bytes) -> StepMetrics:
    """One line.

    Raises:
        ValueError: it is not the metrics of a step.
    """
    if not line.endswith(b"\n"):
        raise ValueError("it was cut")
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise ValueError(f"it is no JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(entry, dict):
        raise ValueError("it is not an object")
    known = {field.name: field.type for field in fields(StepMetrics)}
    required = {field.name for field in fields(StepMetrics) if field.default is MISSING}
    if not required <= set(entry) <= set(known):
        names = sorted(required - set(entry)) or sorted(set(entry) - set(known))
        raise ValueError(f"{names[0][:40]!r} is {'missing' if required - set(entry) else 'no figure of a step'}")
    for name, value in entry.items():
        if value is None and known[name] == "float | None":
            continue
        whole = known[name] == "int"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not _in_range(value):
            raise ValueError(f"{name} is {str(value)[:40]}")
    if entry["step"] < 1:
        raise ValueError(f"step is {entry['step']}")
    return StepMetrics(**entry)


def _in_range(value: int | float) -> bool:
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= _MAX_STEP
