"""Constants of this machine: kept in a file of their own, checked when read, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload.machine import calibration
from offload.machine.bench_ssd import BenchPlan, Measured, Point, Setting, Target
from offload.machine.calibration import Calibration, calibrated, keep_bench
from pagemem.errors import StorageError
from scheduler import knobs

USUAL = Setting(calibration.USUAL_REQUEST_BYTES, calibration.DEFAULT_THREADS)


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Calibration is on, with disks that read 2 and write 1 GB/s; lists what was measured."""
    seen: list[Path] = []

    def fake(target: Target, plan: BenchPlan, measured: Any = lambda point: None) -> Measured:
        seen.append(target.path)
        points = tuple(Point(setting, 1.0, 2.0) for setting in plan.settings)
        for point in points:
            measured(point)
        return Measured(target, "direct", points)

    monkeypatch.setenv(calibration.SWITCH, "on")
    monkeypatch.setattr(calibration, "measure", fake)
    return seen


def test_what_is_not_known_is_measured_once_and_kept(measures: list[Path], tmp_path: Path) -> None:
    file, pages = tmp_path / "cache" / "offload" / "calibration.json", str(tmp_path / "run" / "pages")
    first = calibrated([pages], file)
    assert (first.ssd_read, first.ssd_write) == (2e9, 1e9) and measures == [tmp_path]
    assert "measured now" in first.line and f"kept in {file}" in first.line
    again = calibrated([pages], file)
    assert measures == [tmp_path] and f"from {file} (start, " in again.line
    assert (again.ssd_read, again.move_s_per_byte) == (2e9, first.move_s_per_byte)
    assert 1e-13 <= first.move_s_per_byte <= 1e-7
    assert not (tmp_path / "run").exists() and [path.name for path in file.parent.iterdir()] == ["calibration.json"]


def test_two_folders_on_one_disk_are_one_disk(measures: list[Path], tmp_path: Path) -> None:
    found = calibrated([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "c.json")
    assert len(measures) == 1 and found.ssd_read == 2e9


def test_bench_ssd_s_record_is_taken(measures: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    calibrated([str(tmp_path)], file)
    target = Target(tmp_path, "ext4", 1, None)
    result = Measured(target, "direct", (Point(Setting(1 << 20, 1), 9.0, 9.0), Point(USUAL, 3.0, 4.0)))
    assert keep_bench([result], file) == f"kept for plans and forecasts in {file}"
    found = calibrated([str(tmp_path)], file)
    assert (found.ssd_read, found.ssd_write) == (4e9, 3e9) and "(offload bench-ssd, " in found.line
    assert len(measures) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: "no JSON", "is no record: "),
        (lambda record: {**record, "machine": "another"}, "is of another machine"),
        (lambda record: {**record, "format": "offload calibration 9"}, "is no record: format: "),
        (lambda record: {**record, "move_s_per_byte": 1.0}, "is no record: move_s_per_byte: "),
        (lambda record: {**record, "more": 1}, "is no record: more: "),
    ],
)
def test_a_record_that_does_not_hold_is_measured_anew(
    change: Any, said: str, measures: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "c.json"
    calibrated([str(tmp_path)], file)
    changed = change(json.loads(file.read_text()))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    found = calibrated([str(tmp_path)], file)
    assert len(measures) == 2 and said in found.line and f"kept in {file}" in found.line
    assert "from" in calibrated([str(tmp_path)], file).line and len(measures) == 2


def test_a_link_in_place_of_the_record_is_not_followed(measures: list[Path], tmp_path: Path) -> None:
    file, theirs = tmp_path / "c.json", tmp_path / "theirs"
    theirs.write_text("mine")
    file.symlink_to(theirs)
    found = calibrated([str(tmp_path)], file)
    assert found.ssd_read == 2e9 and "not kept: " in found.line and theirs.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_no_error(
    measures: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("making the folder: Read-only file system")

    monkeypatch.setattr(calibration, "make_folder", refuse)
    found = calibrated([str(tmp_path)], tmp_path / "c.json")
    assert found.ssd_read == 2e9 and "not kept: making the folder: Read-only file system" in found.line
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    monkeypatch.setenv(calibration.SWITCH, "off")
    assert keep_bench([], tmp_path / "file" / "c.json") == ""


def test_a_disk_that_cannot_be_measured_is_said(
    measures: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise StorageError("no room")

    monkeypatch.setattr(calibration, "check_target", full)
    found = calibrated([str(tmp_path)], tmp_path / "c.json")
    assert found.ssd_read is None and found.move_s_per_byte == knobs.MOVE_S_PER_BYTE
    assert f"{tmp_path} not measured: no room" in found.line


def test_switched_off_nothing_is_read_measured_or_kept(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    assert calibrated([str(tmp_path)], file) == Calibration() and not file.exists()


def test_what_is_applied_is_what_plans_charge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "MOVE_S_PER_BYTE", 1.0)
    Calibration(3e-10).apply()
    assert knobs.MOVE_S_PER_BYTE == 3e-10


def test_the_file_is_where_the_xdg_specification_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration.cache_file() == tmp_path / "offload" / "calibration.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert calibration.cache_file() == tmp_path / "home" / ".cache" / "offload" / "calibration.json"
