"""`benchmarks/results/results.csv`: its columns and types, what is refused, and how benchmarks append to it."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import common, results_csv
from benchmarks.common import Spread
from benchmarks.results_csv import COLUMNS, FILE, RESULTS, Row

ROW = Row(
    date=datetime.date(2026, 11, 30), commit="7de750db1+", machine="CPU, 2 cores, 24 GiB", benchmark="step",
    command="python -m benchmarks.step", ratio_of="step / plain PyTorch", model="27m", batch="4x256", ram_share=0.25,
    threads=2, pairs=30, steps_per_turn=5, ratio=1.125, ratio_low=1.0625, ratio_high=1.25, peak_rss_bytes=800_000_000,
)  # fmt: skip


def test_every_row_of_the_file_has_the_columns_and_types() -> None:
    rows = results_csv.read()
    assert len(rows) >= 552
    for row in rows:
        assert re.fullmatch(r"[0-9a-f]{9}\+?", row.commit), row
        assert row.benchmark in row.command, row
        if row.ratio is not None and row.ratio_low is not None and row.ratio_high is not None:
            assert row.ratio_low <= row.ratio <= row.ratio_high, row
        assert row.ratio is not None or row.step_s is not None, row
        for name in COLUMNS:
            value = getattr(row, name)
            # What a commit loses is a difference of times, and can be less than their noise.
            assert row.benchmark == "commit" or not isinstance(value, (int, float)) or value >= 0, (name, row)


def test_rows_are_in_the_order_of_their_dates() -> None:
    dates = [row.date for row in results_csv.read()]
    assert dates == sorted(dates)


def test_kept_records_are_those_that_rows_or_the_documentation_name() -> None:
    named = {row.record for row in results_csv.read() if row.record}
    described = set(re.findall(r"[\w.-]+\.(?:json|png)", (RESULTS.parent / "README.md").read_text()))
    kept = {file.name for file in RESULTS.iterdir() if file.suffix in (".json", ".png")}
    assert kept == named | described


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    results_csv.append([ROW], file)
    results_csv.append([dataclasses.replace(ROW, ratio=None, model=None, command='say "a, b"')], file)
    assert results_csv.read(file) == [ROW, dataclasses.replace(ROW, ratio=None, model=None, command='say "a, b"')]
    assert file.read_text().count("ratio_low") == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("date,commit", "commit,date"), "the columns are commit, date, machine"),
        (("2026-11-30", "30.11.2026"), "results.csv:2: date is '30.11.2026'"),
        (("7de750db1+", ""), "results.csv:2: commit is empty"),
        (("800000000", "8e8"), "results.csv:2: peak_rss_bytes is '8e8'"),
        (("1.125", "fast"), "results.csv:2: ratio is 'fast'"),
        (("27m,", ""), "results.csv:2: 21 cells, not 22"),
    ],
)
def test_another_table_is_refused(change: tuple[str, str], error: str, tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    results_csv.append([ROW], file)
    file.write_text(file.read_text().replace(*change, 1))
    with pytest.raises(ValueError, match=re.escape(error)):
        results_csv.read(file)


def test_save_appends_a_row_and_keeps_the_record_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = str(FILE.parents[1] / "planning" / "forecast.py")
    kept = tmp_path / "kept.json"
    monkeypatch.setattr("sys.argv", [module, "--sizes", "27m", "--save", "--json", "--record", str(kept), "--dir=x"])
    record = {"benchmark": "forecast", "surroundings": common.surroundings()}
    rows = [common.ratio_row("forecast / measured, step", Spread(1.0, 0.5, 2.0), threads=2)]
    a = argparse.Namespace(save=True, record=str(kept))
    common.save(a, record, rows, tmp_path / "results.csv")
    (row,) = results_csv.read(tmp_path / "results.csv")
    assert row.command == "python -m benchmarks.planning.forecast --sizes 27m"
    assert (row.ratio, row.ratio_low, row.ratio_high, row.threads, row.record) == (1.0, 0.5, 2.0, 2, None)
    assert row.date == datetime.date.fromisoformat(record["surroundings"]["date"])
    assert json.loads(kept.read_text()) == record, "kept, but not among the results"


def test_a_record_among_the_results_is_named_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_csv, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "command_line", lambda argv: "python")
    monkeypatch.setattr(results_csv, "commit", lambda: "7de750db1")
    record = {"benchmark": "step", "surroundings": common.surroundings()}
    a = argparse.Namespace(save=True, record=str(tmp_path / "step-27m.json"))
    common.save(a, record, [{"ratio_of": "step"}], tmp_path / "results.csv")
    assert results_csv.read(tmp_path / "results.csv")[0].record == "step-27m.json"


def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        options = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *options, *arguments], cwd=tmp_path, check=True, capture_output=True)

    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for file in (folder / "results.csv", tmp_path / "code.py"):
        file.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(results_csv, "RESULTS", folder)
    clean = results_csv.commit()
    assert re.fullmatch("[0-9a-f]{9}", clean)
    (folder / "results.csv").write_text("2")
    assert results_csv.commit() == clean, "rows that were saved before change nothing of what is measured"
    (tmp_path / "code.py").write_text("2")
    assert results_csv.commit() == f"{clean}+"


def test_nothing_is_kept_unless_asked(tmp_path: Path) -> None:
    common.save(argparse.Namespace(save=False, record=None), {}, [{}], tmp_path / "results.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_run_by_its_name() -> None:
    main = str(FILE.parents[1] / "lockfree" / "__main__.py")
    assert common.command_line([main, "--parts", "speed"]) == "python -m benchmarks.lockfree --parts speed"


def test_the_bootstrap_interval_is_about_the_median_and_the_same_every_time() -> None:
    values = [1.0, 1.1, 1.2, 1.3, 5.0] * 6
    found = Spread.bootstrap(values)
    assert found == Spread.bootstrap(values)
    assert found.median == 1.2
    assert 1.1 <= found.low <= 1.2 <= found.high <= 1.3, "one value in five is far away, and is no median"
    assert Spread.bootstrap([1.5]) == Spread(1.5, 1.5, 1.5)
