"""Counts of long tests: one dated CSV that a claim can quote.

A test notes what it tried with the fixture `tally`; with ``--tally FILE`` the process that collects the reports appends
a row for each note, and at the end one for each folder of tests.
"""

from __future__ import annotations

import csv
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Final

import pytest

PROPERTY: Final = "tally"
HEADER: Final = ("time", "test", "what", "trials", "failures", "seconds", "detail")


class TallyFile:
    """A pytest plugin that writes the CSV. Rows are appended as tests end, so that an interrupted run keeps what it
    has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._spent_s: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._append(HEADER)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test has ended."""
        folder = report.nodeid.rsplit("::", 1)[0].rsplit("/", 1)[0]
        self._spent_s[folder] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[folder, report.outcome] += 1
        if report.when != "call":
            return
        for name, note in report.user_properties:
            if name == PROPERTY:
                what, trials, failures, detail = note
                self._append((_now(), report.nodeid, what, trials, failures, f"{report.duration:.1f}", detail))

    def pytest_sessionfinish(self) -> None:
        """All tests have ended: a row for each folder."""
        for folder in sorted({folder for folder, _ in self._outcomes}):
            passed, failed, skipped = (self._outcomes[folder, outcome] for outcome in ("passed", "failed", "skipped"))
            detail = f"{skipped} skipped" if skipped else ""
            self._append((_now(), folder, "tests", passed + failed, failed, f"{self._spent_s[folder]:.1f}", detail))

    def _append(self, row: tuple[object, ...]) -> None:
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow(row)


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
