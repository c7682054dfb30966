"""How `offload launch` ends, and who may begin: commits at the end, one run a folder, a reader that goes away."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folder_content import content
from launched_runs import small_launch, threads_put_back
from reported_runs import reported
from rich.console import Console

from offload.callbacks import StepMetrics
from offload.config import ConfigError
from offload.config_loading import load_config
from offload.console.output import Output, OutputClosed
from offload.launch.run_folder import RunFolder
from offload.launch.train import launch
from offload.reporting.metrics_file import FORMATS, MetricsFile
from pagemem.durable.commit_folder import CommitFolder
from pagemem.errors import DiskFullError, OffloadError, RunDirectoryError, StorageError
from pagemem.folders.run_directory import RunDirectory

ROOT = Path(__file__).parents[3]
STEPS = 6


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A short run that says nothing about commits."""
    made = small_launch(tmp_path, STEPS)
    with threads_put_back():
        yield made


def run(raw: dict[str, Any], console: Console | None = None) -> tuple[int, str]:
    """Launch; returns the exit code and what was printed."""
    out = io.StringIO()
    return launch(load_config(raw), console or Console(file=out, width=200)), out.getvalue()


def committed(raw: dict[str, Any]) -> list[int]:
    """Steps of the commits there are."""
    folder = CommitFolder(Path(raw["ssd"]["paths"][0]))
    return [folder.read(number).step for number in folder.numbers()]


def steps(raw: dict[str, Any]) -> list[int]:
    """Steps that have metrics."""
    return [
        json.loads(line)["step"] for line in (Path(raw["output"]["run"]) / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("update", [{}, {"mode": "lock-free", "exact_steps": 0}], ids=["exact", "lock-free"])
@pytest.mark.parametrize(
    ("commit", "found"),
    [
        ({}, [6]),
        ({"at_end": False}, []),
        ({"every_steps": 3}, [3, 6]),
        ({"every_steps": 4, "at_end": False}, [4]),
        ({"every_steps": 4}, [4, 6]),
    ],
)
def test_the_end_is_committed_unless_switched_off_and_no_step_twice(
    commit: dict[str, Any], found: list[int], update: dict[str, Any], raw: dict[str, Any]
) -> None:
    raw["commit"] = {**commit, "keep": 9}
    raw["update"] = update
    raw["memory"]["ram"] = "8MiB" if update else raw["memory"]["ram"]
    assert run(raw)[0] == 0
    if update and commit.get("every_steps"):  # Its background commits miss what was on its way; the last one has all.
        assert committed(raw)[-1] == found[-1]
    else:
        assert committed(raw) == found


def test_ctrl_c_is_committed_by_default_and_the_same_command_goes_on(raw: dict[str, Any]) -> None:
    signalled = {**raw, "data": {"factory": "launch_data:signalling_text", "arguments": {"at": 2, "name": "SIGINT"}}}
    assert run(signalled)[0] == 130 and committed(raw) == [3]
    code, text = run(raw)
    assert (
        code == 0 and "resumes after step 3" in text and committed(raw) == [3, 6] and steps(raw) == [1, 2, 3, 4, 5, 6]
    )


def test_data_that_end_or_fail_end_the_run_with_a_commit(raw: dict[str, Any]) -> None:
    ending = {**raw, "data": {"factory": "launch_data:ending_text", "arguments": {"at": 4}}}
    with pytest.raises(
        ConfigError, match="data.factory: launch_data:ending_text: batch 4 fails: LookupError: there are 4 batches"
    ):
        run(ending)
    assert committed(raw) == [4] and steps(raw) == [1, 2, 3, 4]
    assert run(raw)[0] == 0 and steps(raw) == [1, 2, 3, 4, 5, 6]


# ---- one run a folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
@pytest.mark.parametrize("held", ["run", "pages"])
def test_a_second_launch_changes_nothing(held: str, begun: bool, raw: dict[str, Any], tmp_path: Path) -> None:
    if begun:
        run(raw)
    raw["train"]["steps"] = STEPS + 1
    with RunFolder(tmp_path / "run") if held == "run" else RunDirectory(tmp_path / "pages"):
        before = content(tmp_path)
        with pytest.raises(RunDirectoryError, match=f"{tmp_path / held} is in use by process {os.getpid()}"):
            run(raw)
        assert content(tmp_path) == before
    assert run(raw)[0] == 0 and steps(raw) == list(range(1, STEPS + 2))


def test_metrics_of_a_run_with_other_page_files_are_not_gone_on_with(raw: dict[str, Any], tmp_path: Path) -> None:
    first, second = raw, {**raw, "ssd": {"paths": [str(tmp_path / "others")], "threads": 1}, "optimizer": {"lr": 1e-2}}
    run({**first, "train": {**raw["train"], "steps": 3}})
    run({**second, "train": {**raw["train"], "steps": 2}})
    ours = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, text = run(first)  # goes on with its pages, and finds the second one's metrics
    assert code == 0 and "resumes after step 3" in text and "are kept as metrics-2.jsonl" in text
    assert (tmp_path / "run" / "metrics-2.jsonl").read_bytes() == ours and steps(raw) == [4, 5, 6]


def test_a_run_folder_is_given_back_as_it_was(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "b") as folder:
        assert [path.name for path in folder.path.iterdir()] == ["pagemem.lock"]
        folder.claim()
    assert list(tmp_path.iterdir()) == []
    with RunFolder(tmp_path / "a") as folder:
        folder.claim().mkdir()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["data", "offload-run.json"]
    (tmp_path / "a" / "pagemem.lock").write_text("1\n")  # of a launch that was killed
    with RunFolder(tmp_path / "a") as folder:
        pass
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["data", "offload-run.json"]


@pytest.mark.parametrize(
    "identity",
    [
        "",
        "{",
        "[]",
        '{"format": "offload run 99"}',
        '{"format": "offload run 1", "pages": 3}',
        "\0" * 100,
        "[" * 10_000,
    ],
)
def test_an_identity_that_is_none_is_refused_and_nothing_changed(
    identity: str, raw: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "offload-run.json").write_text(identity)
    before = content(tmp_path)
    with pytest.raises(
        RunDirectoryError, match="offload-run.json is not the identity of a run.*Nothing was changed"
    ) as caught:
        run(raw)
    assert content(tmp_path) == before and len(str(caught.value).splitlines()) == 1


def test_no_link_is_followed(tmp_path: Path, raw: dict[str, Any]) -> None:
    (tmp_path / "precious").write_text("years of work")
    run({**raw, "train": {**raw["train"], "steps": 1}})
    for name in ("metrics.jsonl.new", "config.json.new", "offload-run.json.new", "config.json"):
        link = tmp_path / "run" / name
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "precious")
        with pytest.raises(OffloadError, match=f"{link} is a symbolic link, not a .*Nothing was changed"):
            run(raw)
        assert link.is_symlink() and (tmp_path / "precious").read_text() == "years of work"
        link.unlink()
    assert run(raw)[0] == 0


# ---- nobody reads ----------------------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A pipe whose reader goes after some lines."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def write(self, text: str) -> int:
        """As any stream, for a while."""
        self.left -= text.count("\n")
        if self.left < 0:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_without_a_reader_the_run_commits_and_ends(after: int, raw: dict[str, Any]) -> None:
    console = Output(outlives_reader=True, file=Gone(after), width=200)
    assert launch(load_config(raw), console) == 141
    if after:
        assert committed(raw) == [after] and steps(raw) == list(range(1, after + 1))
    else:  # nothing has begun
        assert not Path(raw["ssd"]["paths"][0]).exists() and not (Path(raw["output"]["run"]) / "metrics.jsonl").exists()
    assert run(raw)[0] == 0 and steps(raw) == list(range(1, STEPS + 1))


def test_head_in_a_process_of_its_own(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**raw, "train": {**raw["train"], "steps": 100_000}}))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support" / "runs")])
    command = f"{sys.executable} -m offload launch {tmp_path / 'config.json'} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "141"
    assert committed(raw) == steps(raw)[-1:] != []


def test_other_commands_end_at_once() -> None:
    with pytest.raises(OutputClosed):
        Output(file=Gone(0)).print("nobody")


# ---- metrics that cannot be written ----------------------------------------------------------------------------------


def test_a_run_whose_metrics_cannot_be_written_commits_first(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_step(self: MetricsFile, metrics: StepMetrics) -> None:
        raise StorageError("metrics.jsonl: writing failed: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_step", on_step)
        with pytest.raises(StorageError, match="No space left on device"):
            run(raw)
    assert committed(raw) == [1]
    assert run(raw)[0] == 0 and steps(raw) == [2, 3, 4, 5, 6]


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    metrics = StepMetrics(1, 2.0, 1e-3, 2.0, 512.0, 1, 1, 1, 1, 0.25)
    path = tmp_path / "metrics.jsonl"
    with reported(tmp_path, MetricsFile(tmp_path, FORMATS["jsonl"])) as reporter:
        reporter.tell(metrics)
        before, real, left = path.read_bytes(), os.pwrite, [7]

        def full(fd: int, content: Any, offset: int) -> int:
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= (n_bytes := real(fd, content[: left[0]], offset))
            return n_bytes

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(DiskFullError, match=rf"writing {path} at offset {len(before) + 7}, .*No space left"):
                reporter.tell(metrics)
        assert path.read_bytes() == before
        reporter.tell(metrics)
    assert path.read_bytes() == 2 * before


# ---- data that are no text -------------------------------------------------------------------------------------------


def test_data_without_tokens_are_spoken_of_in_samples_and_nats(raw: dict[str, Any]) -> None:
    raw["model"] = {"factory": "launch_data:Regression"}
    raw["data"] = {"factory": "launch_data:vectors"}
    raw["train"] = {"steps": STEPS, "batch": 4, "evaluate_batches": 2, "threads": 1}
    code, text = run(raw)
    assert code == 0 and "validation after, nats" in text and "samples/s" in text
    assert not any(word in text.replace(str(raw["output"]["run"]), "") for word in ("token", "bits", "unigram"))
    lines = [json.loads(line) for line in (Path(raw["output"]["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_s"] is None and line["samples_per_s"] > 0 for line in lines)
    raw["train"]["steps"] = STEPS + 1
    assert run(raw)[0] == 0 and steps(raw) == list(range(1, STEPS + 2))
