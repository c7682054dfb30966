"""`offload doctor` on this machine: what it finds is true, and it leaves every folder as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finished_runs import finished, settings
from folder_content import content
from rich.console import Console
from small_runs import built

from offload import cli
from offload.checkpoint.verify import verify_run
from offload.machine import bench_ssd
from offload.machine import facts as machine
from offload.machine.facts import cgroup_limit, copy_gb_per_s, cuda_facts, folder_fact, memory_fact, package_facts
from pagemem.folders.run_directory import RunDirectory, folder_use
from pagemem.units import MiB

ROOT = Path(__file__).parents[3]


def write_config(folder: Path, *paths: Path, ram: str = "16MiB") -> Path:
    """A configuration with these folders."""
    file = folder / "run.json"
    file.write_text(json.dumps({"memory": {"ram": ram}, "ssd": {"paths": [str(path) for path in paths]}}))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any], list[str]]:
    """Exit code, the JSON object and the lines before it."""
    code = cli.main(["doctor", *map(str, arguments), "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    return code, json.loads(last), lines


def said(record: dict[str, Any], what: str) -> list[tuple[str, str]]:
    """Level and text of the findings about something."""
    return [(finding["level"], finding["said"]) for finding in record["findings"] if finding["what"] == what]


def test_without_a_file_it_looks_at_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = content(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, record, lines = run(capsys)
    assert (code == 0) == record["ok"] == (not any(line.startswith("problem") for line in lines))
    (folder,) = record["facts"]["folders"]
    assert folder["path"] == str(tmp_path) and folder["use"]["kind"] == "foreign" and not folder["wanted"]
    assert (
        folder["point"]["write_gb_per_s"] > 0
        and folder["point"]["read_gb_per_s"] > 0
        and record["facts"]["copy_gb_per_s"] > 0
    )
    assert content(tmp_path) == before


def test_no_bench_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "measure", None)
    monkeypatch.setattr(machine, "copy_gb_per_s", None)
    monkeypatch.setattr(bench_ssd, "temporary_run", None)
    code, record, _ = run(capsys, write_config(tmp_path, tmp_path / "new"), "--no-bench")
    assert code == 0 and record["facts"]["copy_gb_per_s"] is None
    (folder,) = record["facts"]["folders"]
    assert folder["backend"] is None and folder["point"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_an_absent_folder_is_measured_above_it_and_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record, _ = run(capsys, write_config(tmp_path, tmp_path / "a" / "b"))
    assert code == 0
    (folder,) = record["facts"]["folders"]
    assert folder["use"]["kind"] == "absent" and folder["existing"] == str(tmp_path) and folder["point"] is not None
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_that_ended_is_left_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = finished(built(), settings(tmp_path))
    before = ended.content()
    code, record, _ = run(capsys, write_config(tmp_path, ended.folder))
    assert code == 0 and said(record, f"ssd {ended.folder}")[0][0] == "ok"
    assert record["facts"]["folders"][0]["use"]["kind"] == "run" and record["facts"]["folders"][0]["point"] is not None
    assert ended.content() == before
    assert not verify_run(ended.folder, paths=[], commit=None, console=Console(quiet=True)).faults


def test_a_run_in_use_is_named_and_not_slowed_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = tmp_path / "pages"
    with RunDirectory(pages) as directory:
        before = content(pages)
        code, record, _ = run(capsys, write_config(tmp_path, pages))
        assert code == 0 and ("warning", f"in use by process {os.getpid()}") in said(record, f"ssd {pages}")
        assert record["facts"]["folders"][0]["point"] is None and record["facts"]["folders"][0]["backend"] is None
        assert content(pages) == before
        assert folder_use(pages).detail == directory.run_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"memory": {}, "ssd": {"paths": ["a"]}}', "memory.ram is missing"),
        ("{", "Expecting property name"),
        (None, "No such file"),
    ],
)
def test_a_bad_config_is_a_problem_and_exit_code_1(
    text: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    if text is not None:
        file.write_text(text)
    code, record, _ = run(capsys, file, "--no-bench")
    ((level, line),) = said(record, "config")
    assert code == 1 and level == "problem" and expected in line and not record["ok"]
    assert record["facts"]["folders"] == []


def test_a_foreign_folder_and_a_budget_too_large_are_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "thesis.tex").write_text("years of work")
    code, record, _ = run(capsys, write_config(tmp_path, pages, ram="1000TiB"), "--no-bench")
    assert code == 1 and said(record, "budget")[0][0] == "problem"
    level, line = said(record, f"ssd {pages}")[0]
    assert level == "problem" and "thesis.tex" in line


@pytest.mark.parametrize("name", ["scheduler", "optim"])
def test_a_colliding_package_is_a_problem_and_exit_code_1(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, record, _ = run(capsys, "--no-bench")
    ((level, line),) = said(record, f"package {name}")
    assert code == 1 and level == "problem" and str(tmp_path / name) in line


def test_a_package_behind_ours_is_a_warning_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "optim.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-P", "-m", "offload.cli", "doctor", "--no-bench"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert f"warning  package optim: ours comes first, another is at {tmp_path / 'optim.py'}" in done.stdout


def test_a_package_in_the_current_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scheduler.py").write_text("")
    (tmp_path / "optim").mkdir()  # without code in it nothing is imported from there
    monkeypatch.chdir(tmp_path)
    here = {package.name: package.in_current_directory for package in package_facts([str(ROOT)])}
    assert here == {"pagemem": None, "scheduler": str(tmp_path / "scheduler.py"), "optim": None, "offload": None}
    assert all(
        package.found == (str(ROOT / package.name),) == (package.home,) for package in package_facts([str(ROOT)])
    )


def test_a_disk_that_fails_is_a_problem_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(fd: int, offset: int, length: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pagemem.files.backend.os.posix_fallocate", fail)
    code, record, _ = run(capsys, write_config(tmp_path, tmp_path / "pages"))
    assert code == 1 and any(
        "Input/output error" in line for level, line in said(record, f"ssd {tmp_path / 'pages'}") if level == "problem"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_too_little_room_for_the_test_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ssd, "SPARE_BYTES", 1 << 62)
    fact = folder_fact(tmp_path, wanted=True, bench=True)
    assert fact.failure == "there is no room for a test file of 64.0 MiB" and fact.point is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_is_wanted_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        fact = folder_fact(path, wanted=True, bench=True)
        assert fact.existing == str(tmp_path / "file") and not fact.writable and fact.point is None
        assert fact.use is not None and fact.use.kind == "foreign" and "not a folder" in fact.use.detail


def test_memory_is_that_of_the_system() -> None:
    memory = memory_fact()
    total_kib = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert memory.total_bytes == total_kib * 1024 and 0 < memory.available_bytes < memory.total_bytes


def test_the_tightest_cgroup_counts(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "root"
    inner = root / "outer" / "inner"
    inner.mkdir(parents=True)
    own.write_text("4:memory:/elsewhere\n0::/outer/inner\n")
    assert cgroup_limit(own, root) == (None, None)
    (inner / "memory.max").write_text("max\n")
    (root / "outer" / "memory.max").write_text(f"{100 * MiB}\n")
    (root / "outer" / "memory.current").write_text(f"{70 * MiB}\n")
    assert cgroup_limit(own, root) == (100 * MiB, 30 * MiB)
    (root / "outer" / "memory.stat").write_text(f"anon 5\ninactive_file {20 * MiB}\n")
    assert cgroup_limit(own, root) == (100 * MiB, 50 * MiB)
    (inner / "memory.max").write_text(f"{40 * MiB}\n")
    (inner / "memory.current").write_text(f"{50 * MiB}\n")
    assert cgroup_limit(own, root) == (40 * MiB, 0)
    own.write_text("4:memory:/elsewhere\n")
    assert cgroup_limit(own, root) == (None, None)
    assert cgroup_limit(tmp_path / "absent", root) == (None, None)


def test_copies_take_time() -> None:
    assert 0 < copy_gb_per_s() < float("inf")


class FakeCuda:
    """A torch.cuda with one device."""

    def __getattr__(self, name: str) -> Any:
        return {
            "is_available": lambda: True, "device_count": lambda: 1, "mem_get_info": lambda device: (3 * MiB, 4 * MiB),
            "get_device_name": lambda device: "Card", "device": lambda device: open(os.devnull),
        }[name]  # fmt: skip


class FakeTensor:
    """What is pinned, or cannot be."""

    def __init__(self, pinned: bool | None) -> None:
        self._pinned = pinned

    def pin_memory(self) -> FakeTensor:
        """Fails as CUDA does where there is no way."""
        if self._pinned is None:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return self

    def is_pinned(self) -> bool | None:
        """Whether it is."""
        return self._pinned


@pytest.mark.parametrize(
    ("pinned", "pinning"),
    [(True, None), (False, "torch gave memory that is not pinned"), (None, "CUDA error: out of memory")],
)
def test_pinning_is_found_out_by_pinning(
    pinned: bool | None, pinning: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.torch, "cuda", FakeCuda())
    monkeypatch.setattr(machine.torch, "empty", lambda n_bytes, dtype: FakeTensor(pinned))
    assert cuda_facts() == (machine.CudaFact("Card", 4 * MiB, 3 * MiB, pinning),)


def test_values_are_changed_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path, tmp_path / "new")
    code, record, _ = run(
        capsys, file, "--no-bench", "--set", "memory.ram=1000TiB", "--set", f'ssd.paths=["{tmp_path / "other"}"]'
    )
    assert code == 1 and said(record, "budget")[0][0] == "problem"
    assert [folder["path"] for folder in record["facts"]["folders"]] == [str(tmp_path / "other")]
    code, record, _ = run(capsys, file, "--no-bench", "--set", "memory.rm=1")
    assert code == 1 and said(record, "config") == [
        ("problem", f"{file}: unknown key 'memory.rm'; did you mean 'memory.ram'?")
    ]
    assert cli.main(["doctor", "--set", "memory.ram=1GiB"]) == 1
    assert capsys.readouterr().err == "offload: error: --set changes a FILE; name one\n"
