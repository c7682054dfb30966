"""metrics.jsonl and metrics.csv: one line per step, written as the run trains, and read again when it continues.

Reading never decides whether a run may continue: what can be read is kept, and what cannot is reported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from offload.callbacks import Callback, CommitBegun, RunEnded, RunStarted, StepMetrics
from pagemem.errors import StorageError
from pagemem.folders.own_file import naming, open_file, replace_file, write_all
from pagemem.folders.small_file import first_fault, open_regular, parse_json

#: A longer line was not written by this package.
MAX_LINE_BYTES: Final = 4096
_NAMES: Final = [field.name for field in fields(StepMetrics)]
_METRICS: Final = TypeAdapter(StepMetrics)


# ---- formats -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogFormat:
    """How metrics are written.

    Attributes:
        header: the file's first line, or empty.
        encode: one step as a line, with its end.
        decode: the step of a line; raises ValueError.
    """

    file_name: str
    header: bytes
    encode: Callable[[StepMetrics], bytes]
    decode: Callable[[bytes], StepMetrics]


def _json_line(metrics: StepMetrics) -> bytes:
    return (json.dumps(asdict(metrics)) + "\n").encode()


def _json_metrics(line: bytes) -> StepMetrics:
    parse_json(line)  # pydantic takes the last of two values of a key
    return _METRICS.validate_json(line)


def _csv_line(metrics: StepMetrics) -> bytes:
    cells = ("" if value is None else json.dumps(value) for value in asdict(metrics).values())
    return (",".join(cells) + "\n").encode()


def _csv_metrics(line: bytes) -> StepMetrics:
    cells = line.decode().rstrip("\n").split(",")
    if len(cells) != len(_NAMES):
        raise ValueError(f"it has {len(cells)} cells, not {len(_NAMES)}")
    return _METRICS.validate_strings({name: cell for name, cell in zip(_NAMES, cells, strict=True) if cell})


#: By their names in ``output.log``.
FORMATS: Final[Mapping[str, LogFormat]] = {
    "jsonl": LogFormat("metrics.jsonl", b"", _json_line, _json_metrics),
    "csv": LogFormat("metrics.csv", (",".join(_NAMES) + "\n").encode(), _csv_line, _csv_metrics),
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
    unreadable = (
        f"; {n_unreadable} line{'s' if n_unreadable > 1 else ''} cannot be read, the first: {why}"
        if n_unreadable
        else ""
    )
    return KeptMetrics(kept, f"{path}: {steps - len(kept)} of the {steps} earlier steps have no metrics{unreadable}")


def _metrics(line: bytes, log_format: LogFormat) -> StepMetrics:
    """One line.

    Raises:
        ValueError: it is not the metrics of a step.
    """
    if not line.endswith(b"\n"):
        raise ValueError("it was cut")
    try:
        return log_format.decode(line)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None
