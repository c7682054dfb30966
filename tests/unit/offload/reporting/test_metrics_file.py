"""What is left of metrics.jsonl counts, whatever else is in the file; nothing in it stops a run that goes on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from offload.callbacks import StepMetrics
from offload.reporting.metrics_file import FORMATS, kept_metrics


def line(step: int, /, **changed: Any) -> bytes:
    """As `MetricsFile` writes it."""
    return (
        json.dumps({**asdict(StepMetrics(step, 2.5, 1e-3, 0.1, 100.0, 10, 20, 30, 40, 0.5)), **changed}) + "\n"
    ).encode()


WHOLE = line(1) + line(2) + line(3)
CASES: dict[str, tuple[bytes, list[int], str | None]] = {
    "whole": (WHOLE, [1, 2, 3], None),
    "steps after the commit": (WHOLE + line(4) + line(5), [1, 2, 3], None),
    "torn": (
        WHOLE[:-9],
        [1, 2],
        "1 of the 3 earlier steps have no metrics; 1 line cannot be read, the first: it was cut",
    ),
    "block of zeros": (b"\0" * 4096 + line(3), [3], "2 of the 3 .*: it was cut"),
    "zeros and an end of line": (b"\0" * 900 + b"\n" + line(2) + line(3), [2, 3], "1 of the 3 .*: Expecting value"),
    "twice, the later counts": (line(1, loss=7.0) + WHOLE, [1, 2, 3], None),
    "out of order": (line(3) + line(1) + line(2), [1, 2, 3], None),
    "empty object": (b"{}\n" + WHOLE, [1, 2, 3], None),
    "unknown figure": (WHOLE[: -len(line(3))] + line(3, new=2), [1, 2], "new: Unexpected keyword argument"),
    "figure missing": (b'{"step": 1}\n', [], "loss: Field required"),
    "no JSON": (b'{"step": 1, "loss"}\n', [], "Expecting ':' delimiter"),
    "list": (b"[1]\n", [], "the whole: Input should be an object"),
    "number": (b"3\n", [], "the whole: Input should be an object"),
    "bool for a number": (line(1, step=True), [], "step: Input should be a valid integer, not True"),
    "text": (line(1, loss="2"), [], "loss: Input should be a valid number, not '2'"),
    "NaN": (line(1, loss=float("nan")), [], "NaN is not a number of JSON"),
    "infinite": (line(1, loss=0).replace(b'"loss": 0', b'"loss": 1e999'), [], "1e999 is beyond the largest number"),
    "step below 1": (line(0), [], "step: Input should be greater than or equal to 1, not 0"),
    "a key twice": (b'{"step": 1, ' + WHOLE[1:], [2, 3], "1 of the 3 .*: key 'step' is there twice"),
    "deep": (b"[" * 4000 + b"\n", [], "deep in each other"),
    "not UTF-8": (b"\xff\xfe\x00\n", [], "can't decode byte"),
    "empty file": (b"", [], "3 of the 3 earlier steps have no metrics$"),
    "one line without end": (b"x" * 100_000, [], "it was cut"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_can_be_read_is_kept_and_the_rest_is_said(case: str, tmp_path: Path) -> None:
    content, steps, note = CASES[case]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    kept = kept_metrics(tmp_path, 3, ["jsonl"])
    assert [metrics.step for metrics in kept.metrics] == steps
    assert all(metrics == StepMetrics(**json.loads(line(metrics.step))) for metrics in kept.metrics)
    if note is None:
        assert kept.note is None
    else:
        assert kept.note is not None and "\n" not in kept.note and kept.note.startswith(str(path))
        assert re.search(note, kept.note), kept.note
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("put", "what"),
    [
        (lambda path: None, "No such file"),
        (os.mkfifo, "it is a FIFO, not a regular file"),
        (os.mkdir, "Is a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a symbolic link, which is not followed"),
    ],
)
def test_what_is_no_file_keeps_nothing(put: Callable[[Path], None], what: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    put(path)
    kept = kept_metrics(tmp_path, 2, ["jsonl"])
    assert kept.metrics == [] and kept.note is not None and what in kept.note


def test_nothing_is_asked_for(tmp_path: Path) -> None:
    assert kept_metrics(tmp_path / "absent", 0, ["csv"]).note is None


def test_rows_of_csv_are_the_same_metrics(tmp_path: Path) -> None:
    steps = [StepMetrics(step, 0.1 + step, 1e-5, 0.1, 100.0, 10, 20, 30, 40, 1 / 3, validation_loss=loss)
             for step, loss in ((1, None), (2, 2.5))]  # fmt: skip
    log = FORMATS["csv"]
    content = log.header + b"".join(map(log.encode, steps))
    assert content.decode().splitlines()[0].startswith("step,loss,lr,") and content.endswith(b",0,,2.5\n")
    (tmp_path / "metrics.csv").write_bytes(content)
    assert kept_metrics(tmp_path, 2, ["csv"]).metrics == steps


def test_the_most_complete_file_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(line(1))
    (tmp_path / "metrics.csv").write_bytes(b"1,2\n")
    kept = kept_metrics(tmp_path, 2, ["csv"])
    assert [metrics.step for metrics in kept.metrics] == [1] and str(kept.note).startswith(
        str(tmp_path / "metrics.jsonl")
    )
    kept = kept_metrics(tmp_path / "absent", 2, ["csv"])
    assert kept.metrics == [] and "metrics.csv" in str(kept.note)
    (tmp_path / "metrics.jsonl").unlink()
    assert "it has 2 cells, not 13" in str(kept_metrics(tmp_path, 2, ["csv"]).note)
