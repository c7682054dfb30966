"""metrics.jsonl and metrics.csv: one line per step, written as the run trains, and read again when it continues.

Reading never decides whether a run may continue: what can be read is kept, and what cannot is reported.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Final

from offload.callbacks import Callback, CommitBegun, RunEnded, RunStarted, StepMetrics
from pagemem.errors import StorageError
from pagemem.folders.own_file import naming, open_file, replace_file, write_all
from pagemem.folders.small_file import open_regular, parse_json

#: A longer line was not written by this package.
MAX_LINE_BYTES: Final = 4096
_MAX_STEP: Final = 2**53
_TYPES: Final = {field.name: field.type for field in fields(StepMetrics)}
_REQUIRED: Final = {field.name for field in fields(StepMetrics) if field.default is MISSING}


# ---- formats -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogFormat:
    """How metrics are written.

    Attributes:
        header: the file's first line, or empty.
        encode: one step as a line, with its end.
        decode: the values of a line by name; raises ValueError.
    """

    file_name: str
    header: bytes
    encode: Callable[[StepMetrics], bytes]
    decode: Callable[[bytes], object]


def _json_line(metrics: StepMetrics) -> bytes:
    return (json.dumps(asdict(metrics)) + "\n").encode()


def _csv_line(metrics: StepMetrics) -> bytes:
    cells = ("" if value is None else json.dumps(value) for value in asdict(metrics).values())
    return (",".join(cells) + "\n").encode()


def _csv_values(line: bytes) -> object:
    cells = line.decode().rstrip("\n").split(",")
    if len(cells) != len(_TYPES):
        raise ValueError(f"it has {len(cells)} cells, not {len(_TYPES)}")
    return {name: parse_json((cell or "null").encode()) for name, cell in zip(_TYPES, cells, strict=True)}


#: By their names in ``output.log``.
FORMATS: Final[Mapping[str, LogFormat]] = {
    "jsonl": LogFormat("metrics.jsonl", b"", _json_line, parse_json),
    "csv": LogFormat("metrics.csv", (",".join(_TYPES) + "\n").encode(), _csv_line, _csv_values),
}


# ---- writing -------------------------------------------------------------------------------------------------------


class MetricsFile(Callback):
    """Writes the metrics of each step as one line, whole or not at all; durable before each commit.

    Args:
        folder: where the file is, which is replaced.
        earlier: metrics of the steps before, with which the file begins.
    """

    def __init__(self, folder: Path, log_format: LogFormat, earlier: Sequence[StepMetrics] = ()) -> None:
        self._path = folder / log_format.file_name
        self._format = log_format
        self._earlier = tuple(earlier)
        self._fd = -1
        self._end_bytes = 0

    def on_start(self, run: RunStarted) -> None:
        """Begin the file, in one step: a run that is killed here must not lose the metrics of its beginning."""
        content = self._format.header + b"".join(map(self._format.encode, self._earlier))
        replace_file(self._path, content)
        with naming("opening", self._path):
            self._fd = open_file(self._path, os.O_WRONLY)
        self._end_bytes = len(content)

    def on_step(self, metrics: StepMetrics) -> None:
        """Write a line; raises StorageError where that fails, and none of it is in the file then."""
        line = self._format.encode(metrics)
        try:
            write_all(self._fd, line, self._path, self._end_bytes)
        except StorageError:
            with suppress(OSError):  # what failed first is what to raise
                os.ftruncate(self._fd, self._end_bytes)
            raise
        self._end_bytes += len(line)

    def on_commit(self, commit: CommitBegun) -> None:
        """Make the lines so far durable; raises StorageError where the disk fails."""
        with naming("syncing", self._path):
            os.fsync(self._fd)

    def on_end(self, end: RunEnded) -> None:
        """Make all lines durable and close the file."""
        try:
            with naming("syncing", self._path):
                os.fsync(self._fd)
        finally:
            os.close(self._fd)


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeptMetrics:
    """What earlier launches of the run have left.

    Attributes:
        metrics: ascending by step, of those with a complete line; the last line of a step counts.
        note: what is missing and why, in one line, or None: there is one for every step.
    """

    metrics: list[StepMetrics]
    note: str | None


def kept_metrics(folder: Path, steps: int, names: Sequence[str]) -> KeptMetrics:
    """The metrics of the first ``steps`` steps, from the most complete of the files; changes nothing.

    Args:
        names: of formats. Files of others are looked at where these lack steps.
    """
    best = KeptMetrics([], None)
    for name in dict.fromkeys([*names, *FORMATS]):
        found = _kept_in(folder / FORMATS[name].file_name, FORMATS[name], steps)
        if len(found.metrics) == steps:
            return found
        if best.note is None or len(found.metrics) > len(best.metrics):
            best = found
    return best


def _kept_in(path: Path, log_format: LogFormat, steps: int) -> KeptMetrics:
    if not steps:
        return KeptMetrics([], None)
    found: dict[int, StepMetrics] = {}
    n_unreadable, why = 0, ""
    try:
        fd, _ = open_regular(path, 2**62)
        with os.fdopen(fd, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                if not line.strip() or line == log_format.header:
                    continue
                try:
                    metrics = _metrics(line, log_format)
                except ValueError as error:
                    n_unreadable, why = n_unreadable + 1, why or str(error)
                    continue
                if metrics.step <= steps:
                    found[metrics.step] = metrics
    except OSError as error:
        return KeptMetrics([], f"{path}: the metrics of the {steps} earlier steps are lost: {error.strerror or error}")
    kept = [found[step] for step in sorted(found)]
    if len(kept) == steps:
        return KeptMetrics(kept, None)
    unreadable = f"; {n_unreadable} lines cannot be read, the first: {why}" if n_unreadable else ""
    return KeptMetrics(kept, f"{path}: {steps - len(kept)} of the {steps} earlier steps have no metrics{unreadable}")


def _metrics(line: bytes, log_format: LogFormat) -> StepMetrics:
    """One line.

    Raises:
        ValueError: it is not the metrics of a step.
    """
    if not line.endswith(b"\n"):
        raise ValueError("it was cut")
    try:
        entry = log_format.decode(line)
    except ValueError as error:
        raise ValueError(f"it cannot be parsed ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(entry, dict):
        raise ValueError("it is not an object")
    if not set(entry) >= _REQUIRED or not set(entry) <= set(_TYPES):
        missing, unknown = sorted(_REQUIRED - set(entry)), sorted(set(entry) - set(_TYPES))
        raise ValueError(f"{missing[0]!r} is missing" if missing else f"{unknown[0][:40]!r} is not a metric of a step")
    for name, value in entry.items():
        if value is None and _TYPES[name] == "float | None":
            continue
        whole = _TYPES[name] == "int"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not _in_range(value):
            raise ValueError(f"{name} is {str(value)[:40]}")
    if entry["step"] < 1:
        raise ValueError(f"step is {entry['step']}")
    return StepMetrics(**entry)


def _in_range(value: int | float) -> bool:
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= _MAX_STEP
