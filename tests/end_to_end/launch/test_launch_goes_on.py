"""`offload launch` over a run that stopped, for whatever reason: it goes on as if it had not."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folder_content import content
from launched_runs import small_launch, threads_put_back
from rich.console import Console

from offload.callbacks import RunStarted
from offload.cli import main
from offload.config_loading import load_config
from offload.launch.train import launch
from offload.reporting.metrics_file import MetricsFile
from pagemem.durable.commit_folder import CommitFolder
from pagemem.errors import CommitError, RunDirectoryError

STEPS = 9
ROOT = Path(__file__).parents[3]


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A run that commits every other step."""
    made = small_launch(tmp_path, STEPS, commit={"every_steps": 2}, optimizer={"lr": 3e-3, "no_decay": ["1d"]})
    made["train"] |= {"evaluate_batches": 2, "schedule": "cosine", "warmup_steps": 2}
    with threads_put_back():
        yield made


def signalled(raw: dict[str, Any], at: int, name: str) -> dict[str, Any]:
    """The same run, which gets a signal in the step after step ``at``."""
    return {**raw, "data": {"factory": "launch_data:signalling_text", "arguments": {"at": at, "name": name}}}


def elsewhere(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same run in other folders."""
    return {**raw, "ssd": {"paths": [str(folder / "pages")], "threads": 1}, "output": {"run": str(folder / "run")}}


def run(raw: dict[str, Any]) -> tuple[int, str]:
    """Launch; returns the exit code and what was printed."""
    out = io.StringIO()
    return launch(load_config(raw), Console(file=out, width=200)), out.getvalue()


def metrics(raw: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (Path(raw["output"]["run"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def trained(raw: dict[str, Any]) -> list[tuple[int, float, float]]:
    """Step, loss and learning rate of each line of the metrics."""
    return [(line["step"], line["loss"], line["lr"]) for line in metrics(raw)]


def validation(text: str) -> list[str]:
    """The validation losses of the closing table."""
    return [line.split()[-1] for line in text.splitlines() if line.strip().startswith("validation")]


@pytest.fixture
def uninterrupted(raw: dict[str, Any], tmp_path: Path) -> tuple[list[tuple[int, float, float]], list[str]]:
    """Metrics and validation of the same run, had it not stopped, and not committed."""
    never = elsewhere(raw, tmp_path / "never") | {"commit": {"at_end": False}}
    (tmp_path / "never").mkdir()
    code, text = run(never)
    assert code == 0 and not CommitFolder(tmp_path / "never" / "pages").numbers()
    return trained(never), validation(text)


def test_a_killed_run_goes_on(raw: dict[str, Any], tmp_path: Path, uninterrupted: tuple[Any, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(signalled(raw, 7, "SIGKILL")))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support" / "runs")])
    command = [
        sys.executable,
        "-c",
        "from offload.cli import main; raise SystemExit(main())",
        "launch",
        str(tmp_path / "config.json"),
    ]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [step for step, _, _ in trained(raw)] == list(range(1, 8))
    code, text = run(raw)
    assert code == 0 and any(f"resumes after step {step}, from commit" in text for step in (2, 4, 6))
    assert (trained(raw), validation(text)) == uninterrupted


@pytest.mark.parametrize("at", [0, 1, 5])
def test_ctrl_c_and_the_same_command_again(at: int, raw: dict[str, Any], uninterrupted: tuple[Any, Any]) -> None:
    assert run(signalled(raw, at, "SIGINT"))[0] == 130
    assert [step for step, _, _ in trained(raw)] == list(range(1, at + 2))
    code, text = run(raw)
    assert code == 0 and f"resumes after step {at + 1}, from commit" in text
    assert f" {STEPS}, {STEPS - at - 1} of them in this launch (" in text
    assert (trained(raw), validation(text)) == uninterrupted


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_in_the_last_validation_and_the_same_command_again(
    name: str, code: int, raw: dict[str, Any], tmp_path: Path, uninterrupted: tuple[Any, Any]
) -> None:
    data = {"factory": "launch_data:signalled_validation", "arguments": {"at": 1, "name": name}}
    stopped, said = run({**raw, "data": data})
    assert stopped == code and validation(said)[1] == "measured" and trained(raw) == uninterrupted[0]
    assert said.splitlines()[-1] == (
        f"interrupted after step {STEPS}, which is committed in {tmp_path / 'pages'}; the same command makes the "
        "validation that is missing"
    )
    again, said = run(raw)
    assert again == 0 and f"resumes after step {STEPS}" in said and f"{STEPS}, 0 of them in this launch" in said
    assert (trained(raw), validation(said)) == uninterrupted
    assert run(raw)[1].startswith("finished: ")


def test_a_stopped_run_says_what_is_kept(raw: dict[str, Any], tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    assert run(signalled(raw, 2, "SIGINT"))[1].splitlines()[-1] == (
        f"interrupted after step 3, which is committed in {pages}; the same command resumes from there"
    )
    raw["commit"]["at_end"] = False
    assert run(signalled(raw, 3, "SIGINT"))[1].splitlines()[-1] == (
        f"interrupted after step 4; the same command resumes after step 3, committed in {pages}"
    )
    new = elsewhere(signalled(raw, 0, "SIGINT"), tmp_path / "new")
    (tmp_path / "new").mkdir()
    assert run(new)[1].splitlines()[-1] == (
        "interrupted after step 1; nothing is committed (commit.at_end is false); the same command starts over"
    )


def test_stopped_again_and_again(raw: dict[str, Any], uninterrupted: tuple[Any, Any]) -> None:
    for at in (0, 1, 2, 3, 6):
        assert run(signalled(raw, at, "SIGINT"))[0] == 130
    code, text = run(raw)
    assert code == 0 and (trained(raw), validation(text)) == uninterrupted


def test_a_finished_run_says_so_and_changes_nothing_and_more_steps_go_on(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"]["schedule"] = "constant"
    run(raw)
    before, metrics_before = content(tmp_path), metrics(raw)
    for steps in (STEPS, STEPS - 2):
        raw["train"]["steps"] = steps
        said = f"finished: the newest commit is of step {STEPS}, train.steps is {steps}; raise it to train on\n"
        assert run(raw) == (0, said) and content(tmp_path) == before
    raw["train"]["steps"] = STEPS + 3
    assert run(raw)[0] == 0
    assert metrics(raw)[:STEPS] == metrics_before and [line["step"] for line in metrics(raw)] == list(
        range(1, STEPS + 4)
    )


def test_never_means_never(raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(signalled(raw, 3, "SIGINT"))
    before, numbers = metrics(raw), CommitFolder(tmp_path / "pages").numbers()
    raw["commit"]["resume"] = "never"
    with pytest.raises(RunDirectoryError, match='holds commits and commit.resume is "never"'):
        run(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert main(["launch", str(tmp_path / "config.json")]) == 1
    assert capsys.readouterr().err.startswith("offload: error: ")
    assert metrics(raw) == before and CommitFolder(tmp_path / "pages").numbers() == numbers
    (tmp_path / "new").mkdir()
    assert run(elsewhere(raw, tmp_path / "new"))[0] == 0


def test_a_damaged_commit_stops_the_launch_and_nothing_is_lost(raw: dict[str, Any], tmp_path: Path) -> None:
    run(signalled(raw, 3, "SIGINT"))
    before = metrics(raw)
    folder = CommitFolder(tmp_path / "pages")
    newest = folder.path / f"commit-{folder.numbers()[-1]:08d}.json"
    os.truncate(newest, 100)
    with pytest.raises(CommitError, match=rf"{newest} is damaged.*it was cut.*commit \d+ \(step \d\) is whole"):
        run(raw)
    assert metrics(raw) == before
    newest.unlink()
    assert run(raw)[0] == 0 and [line["step"] for line in metrics(raw)] == list(range(1, STEPS + 1))


def test_metrics_of_the_beginning_are_whole_at_every_moment(raw: dict[str, Any], tmp_path: Path) -> None:
    """Also when the run is killed before its first step; a line that was cut is not taken for one."""
    run(signalled(raw, 3, "SIGINT"))
    path = Path(raw["output"]["run"]) / "metrics.jsonl"
    before = path.read_text()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    seen = []

    class Watching(MetricsFile):
        def on_start(self, run: RunStarted) -> None:
            super().on_start(run)
            seen.append(path.read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.launch.train.MetricsFile", Watching)
        assert run(raw)[0] == 0
    assert seen == [before]
    assert [line["step"] for line in metrics(raw)] == list(range(1, STEPS + 1))
