"""`offload bench-ssd` on real page files: what it measures, what it prints, and that nothing of it stays."""

from __future__ import annotations

import io
import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folder_content import content
from rich.console import Console

from offload import cli
from offload.config import ConfigError
from offload.machine import bench_ssd
from offload.machine.bench_ssd import (
    FOLDER_PREFIX,
    BenchPlan,
    Measured,
    Point,
    Setting,
    check_target,
    file_system,
    measure,
    temporary_run,
)
from offload.machine.bench_ssd_report import point_cells, run_bench_ssd
from pagemem.errors import ChecksumError, DiskFullError, StorageError
from pagemem.files import backend as pagemem_io
from pagemem.files.backend import Direction
from pagemem.files.page_file import PageFiles
from pagemem.folders.run_directory import RunDirectory, folder_use
from pagemem.units import KiB, MiB

#: Both directions, several sizes and threads, and no checksums, in a file of 3 MiB.
PLAN = BenchPlan(
    5 * MiB // 2,
    0.01,
    (Setting(64 * KiB, 1), Setting(256 * KiB, 2), Setting(MiB, 1), Setting(256 * KiB, 2, checksums=False)),
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder with somebody's files in it, among them one like ours."""
    folder = tmp_path / "disk"
    (folder / f"{FOLDER_PREFIX}mine").mkdir(parents=True)
    (folder / f"{FOLDER_PREFIX}mine" / "pages.bin").write_bytes(b"kept")
    (folder / "thesis.tex").write_text("years of work")
    return folder


def run(paths: list[Path], *, terminal: bool = False, as_json: bool = False) -> tuple[list[Measured], list[str]]:
    """What was measured, and the lines."""
    out = io.StringIO()
    results = run_bench_ssd(paths, PLAN, Console(file=out, force_terminal=terminal, width=200), as_json=as_json)
    return results, out.getvalue().splitlines()


def test_every_setting_has_its_rates_and_nothing_stays(disk: Path) -> None:
    before = content(disk)
    seen: list[Point] = []
    result = measure(check_target(disk, PLAN.file_bytes), PLAN, seen.append)
    assert [point.setting for point in result.points] == list(PLAN.settings) and list(result.points) == seen
    assert all(point.write_gb_per_s > 0 and point.read_gb_per_s > 0 for point in result.points)
    assert result.backend in ("direct", "aiofiles")
    assert content(disk) == before


def test_where_o_direct_is_refused_aiofiles_is_measured(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemem_io, "accepts_direct", lambda folder: False)
    before = content(disk)
    results, lines = run([disk])
    assert results[0].backend == "aiofiles" and any("O_DIRECT is refused" in line for line in lines)
    assert content(disk) == before


def test_what_is_written_and_read_is_random_and_verified(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = PageFiles.write

    def record(self: PageFiles, where: Any, source: memoryview, done: Any) -> None:
        written.append(bytes(source[:64]))
        write(self, where, source, done)

    monkeypatch.setattr(PageFiles, "write", record)
    measure(check_target(disk, PLAN.file_bytes), PLAN)
    assert all(len(set(piece)) > 16 for piece in written)
    assert len(set(written)) >= PLAN.file_bytes // MiB  # the parts of the file differ


def test_every_page_size_reads_what_was_written_once(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first round writes, all of the file; every setting knows the checksums of its pages none the less."""
    run_traffic = bench_ssd._Traffic.run

    def read_only(self: Any, direction: Direction, seconds: float | None) -> float:
        if direction is Direction.WRITE and seconds is not None:
            return 1.0
        return run_traffic(self, direction, seconds if direction is Direction.WRITE else None)  # every frame once

    monkeypatch.setattr(bench_ssd._Traffic, "run", read_only)
    result = measure(check_target(disk, PLAN.file_bytes), PLAN)
    assert [point.write_gb_per_s for point in result.points] == [1.0] * len(PLAN.settings)


def test_a_page_that_comes_back_changed_is_an_error_and_nothing_stays(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(disk)
    run_traffic = bench_ssd._Traffic.run

    def damage(self: Any, direction: Direction, seconds: float | None) -> float:
        if direction is Direction.READ:
            with open(self._files.paths[0], "r+b") as file:
                file.write(bytes(PLAN.file_bytes))
        return run_traffic(self, direction, seconds)

    monkeypatch.setattr(bench_ssd._Traffic, "run", damage)
    with pytest.raises(ChecksumError):
        measure(check_target(disk, PLAN.file_bytes), PLAN)
    assert content(disk) == before


def test_the_lines_in_a_pipe_and_the_json_agree(disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    results, lines = run([disk, other], as_json=True)
    record = json.loads(lines[-1])
    assert record["command"] == "bench-ssd" and record["file_bytes"] == PLAN.file_bytes
    assert [entry["path"] for entry in record["paths"]] == [str(disk), str(other)]
    for result, entry in zip(results, record["paths"], strict=True):
        assert entry["backend"] == result.backend and entry["file_system"] == result.target.file_system
        for point, values in zip(result.points, entry["points"], strict=True):
            setting = Setting(values["request_bytes"], values["threads"], values["checksums"])
            assert Point(setting, values["write_gb_per_s"], values["read_gb_per_s"]) == point
            assert any(line.split() == point_cells(point) for line in lines)
    advice = record["recommendation"]
    assert set(advice["config"].splitlines()) <= set(lines) and f"threads = {advice['threads']}" in lines


def test_a_terminal_gets_a_table(disk: Path) -> None:
    results, lines = run([disk], terminal=True)
    text = "\n".join(lines)
    assert "│" in text and all(point_cells(point)[3] in text for point in results[0].points)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda disk, patch: shutil.rmtree(disk), "no such folder"),
        (lambda disk, patch: (shutil.rmtree(disk), disk.write_text("a file")), "not a folder"),
        (lambda disk, patch: patch.setattr(bench_ssd.os, "access", lambda path, mode: False), "cannot write"),
        (lambda disk, patch: patch.setattr(bench_ssd, "SPARE_BYTES", 1 << 62), "free; the test file takes 3.0 MiB"),
    ],
)
def test_a_folder_that_cannot_be_measured_is_refused_before_any_is(
    break_it: Callable[[Path, pytest.MonkeyPatch], object],
    said: str,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = tmp_path / "good"
    good.mkdir()
    break_it(disk, monkeypatch)
    monkeypatch.setattr(bench_ssd.Path, "mkdir", None)  # nothing is to be made
    with pytest.raises(StorageError, match=said) as caught:
        run([good, disk])
    assert isinstance(caught.value, DiskFullError) == ("free" in said)
    assert list(good.iterdir()) == []


def test_a_folder_named_twice_is_refused(disk: Path) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        run([disk, disk / ".." / "disk"])


def test_no_room_after_all_is_an_error_and_nothing_stays(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    before = content(disk)
    monkeypatch.setattr("pagemem.files.backend.os.posix_fallocate", full)
    with pytest.raises(DiskFullError):
        run([disk])
    assert content(disk) == before


def test_a_folder_that_cannot_be_made_is_an_error(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: int = 0o777) -> None:
        raise PermissionError(13, "Permission denied")

    before = content(disk)
    monkeypatch.setattr(bench_ssd.Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="no folder can be made there: Permission denied"), temporary_run(disk):
        raise AssertionError("entered")
    assert content(disk) == before


def test_an_interrupt_while_the_folder_is_made_leaves_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def make_and_interrupt(self: Path, mode: int = 0o777) -> None:
        make(self, mode)
        raise KeyboardInterrupt

    before = content(disk)
    monkeypatch.setattr(bench_ssd.Path, "mkdir", make_and_interrupt)
    with pytest.raises(KeyboardInterrupt), temporary_run(disk):
        raise AssertionError("entered")
    assert content(disk) == before


def test_a_second_interrupt_while_it_is_removed_leaves_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, calls = shutil.rmtree, []

    def interrupted(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 1:
            (folder / "pagemem.json").unlink()
            raise KeyboardInterrupt
        remove(folder)

    before = content(disk)
    monkeypatch.setattr(bench_ssd.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), temporary_run(disk):
        pass
    assert len(calls) == 2 and content(disk) == before


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("when", [1, 40, 150])
def test_ctrl_c_ends_it_at_once_and_leaves_nothing(
    when: int, direct: bool, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes while transfers are under way: in the first round of writing, and later."""
    begin, count = bench_ssd._Traffic._begin, [0]

    def signal_at(self: Any, *arguments: Any) -> None:
        count[0] += 1
        if count[0] == when:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        begin(self, *arguments)

    if not direct:
        monkeypatch.setattr(pagemem_io, "accepts_direct", lambda folder: False)
    monkeypatch.setattr(bench_ssd._Traffic, "_begin", signal_at)
    monkeypatch.setattr(cli, "full_plan", lambda size_bytes, seconds: BenchPlan(3 * MiB, 600.0, PLAN.settings))
    before = content(disk)
    before_handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores the signal
    try:
        assert cli.main(["bench-ssd", str(disk)]) == 130
    finally:
        signal.signal(signal.SIGINT, before_handler)
    assert "interrupted" in capsys.readouterr().err
    assert content(disk) == before


def test_a_run_of_others_is_named_and_left_alone(disk: Path) -> None:
    shutil.rmtree(disk)
    with RunDirectory(disk) as run_directory:
        (disk / "pages.bin").write_bytes(b"pages")
        before = content(disk)
        _, lines = run([disk])
        assert "uses this folder" in lines[0]
        assert content(disk) == before
        use = folder_use(disk)
        assert use.detail == run_directory.run_id and use.holder is not None


def test_the_command(disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(cli, "full_plan", lambda size_bytes, seconds: (seen.append((size_bytes, seconds)), PLAN)[1])
    assert cli.main(["bench-ssd", str(disk), "--size", "3MiB", "--seconds", "0.25", "--json"]) == 0
    assert seen == [(3 * MiB, 0.25)]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["paths"][0]["path"] == str(disk)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "1MiB"], "give at least 128.0 MiB"),
        (["--seconds", "0"], "--seconds is 0; it must be above 0"),
    ],
)
def test_a_wrong_option_is_one_line(
    arguments: list[str], said: str, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench-ssd", str(disk), *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("offload: error: ") and error.count("\n") == 1


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/")) not in ("", "unknown", "proc")
