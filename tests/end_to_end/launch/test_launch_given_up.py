"""Launched runs that end before their end, or cannot begin."""

from __future__ import annotations

import copy
import signal
import threading
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launched_runs import HERE, MODEL, STEPS, metrics, run, run_command, table

from offload.config import ConfigError
from pagemem.errors import BudgetError, NonFiniteError, RunDirectoryError


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file below a folder, but for the data's own cache."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "data"]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# ---- the ends that are not the end -----------------------------------------------------------------------------------


def test_ctrl_c_stops_after_the_step_under_way(raw: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGINT)
    raw["data"] = {"factory": f"{HERE}:interrupting_text", "arguments": {"times": 1}}
    code, text = run(raw)
    assert code == 130 and "interrupted after step 4" in text
    assert len(metrics(raw)) == 4
    rows = table(text)
    assert rows["steps"].startswith("4 ") and rows["validation after, bits per byte"] == "not measured"
    assert (Path(raw["output"]["run"]) / "loss_curve.png").exists()
    assert signal.getsignal(signal.SIGINT) is before
    code, text = run({**raw, "data": {"factory": f"{HERE}:sentence_text"}})  # All was given back.
    assert (
        code == 0 and "resumes after step 4" in text and [m["step"] for m in metrics(raw)] == list(range(1, STEPS + 1))
    )


def test_sigterm_stops_as_ctrl_c_does(raw: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    raw["data"] = {"factory": f"{HERE}:interrupting_text", "arguments": {"times": 1, "name": "SIGTERM"}}
    code, text = run(raw)
    assert code == 143 and "interrupted after step 4" in text and len(metrics(raw)) == 4
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """All signals after the first come two seconds later."""
    clock = chain([0.0], repeat(2.0))
    monkeypatch.setattr("offload.launch.interrupt.time", SimpleNamespace(monotonic=lambda: next(clock)))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_burst_of_signals_is_one_and_is_answered_at_once(
    raw: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    raw["data"] = {"factory": f"{HERE}:interrupting_text", "arguments": {"times": 3, "name": name}}
    assert run_command(raw, tmp_path) == 128 + signal.Signals[name]
    said = capfd.readouterr()
    assert said.out.splitlines()[-2:] == [
        f"metrics, configuration and loss curve are in {tmp_path / 'run'}",
        f"interrupted after step 4, which is committed in {tmp_path / 'pages'}; the same command resumes from there",
    ]
    again = "Ctrl-C" if name == "SIGINT" else name
    assert said.err == (
        f"offload: stopping after this step or validation batch, committing; {again} again, more than 1 s later, stops "
        "at once, without a commit\n"
    )


def test_the_answer_says_when_nothing_will_be_committed(raw: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    raw["data"] = {"factory": f"{HERE}:interrupting_text", "arguments": {"times": 1}}
    raw["commit"] = {"at_end": False}
    assert run(raw)[0] == 130
    assert "validation batch, without a commit (commit.at_end is false); Ctrl-C again" in capfd.readouterr().err


def signalled_validation(raw: dict[str, Any], at: int) -> dict[str, Any]:
    """The run with Ctrl-C in a validation."""
    return {**raw, "data": {"factory": f"{HERE}:signalled_validation", "arguments": {"at": at, "name": "SIGINT"}}}


def test_of_a_run_without_a_step_nothing_is_left(raw: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        code, text = run(signalled_validation(raw, 0))
        assert code == 130 and text.splitlines()[-1] == "interrupted before the first step"
        assert "validating" not in text and not table(text) and "kept as" not in text
        assert sorted(path.name for path in tmp_path.rglob("*")) == [
            "data", "offload-run.json", "run", "train.bin", "validation.bin",
        ]  # fmt: skip
    run(raw)
    before = content(tmp_path)
    assert run(elsewhere_pages(signalled_validation(raw, 0), tmp_path))[0] == 130 and content(tmp_path) == before


def elsewhere_pages(raw: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same run folder, other page files."""
    return {**raw, "ssd": {**raw["ssd"], "paths": [str(tmp_path / "others")]}}


def test_metrics_without_a_step_are_not_set_aside(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["output"]["log"] = ["jsonl", "csv"]
    failing = {**raw, "model": {**raw["model"], "factory": f"{HERE}:poisoned_at_once"}}
    with pytest.raises(NonFiniteError):
        run(failing)
    code, text = run(raw)
    assert code == 0 and "kept as" not in text and not list((tmp_path / "run").glob("*-1.*"))


def test_ctrl_c_in_the_last_step_says_that_nothing_is_missing(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"] |= {"steps": 4, "evaluate_every": 4}
    raw["output"]["callbacks"] = [f"{HERE}:Interrupting"]
    code, text = run(raw)
    assert code == 130 and table(text)["validation after, bits per byte"] != "not measured"
    assert text.splitlines()[-1] == (
        f"interrupted after step 4, which is committed in {tmp_path / 'pages'}; it was the last one, nothing is "
        "left to do"
    )
    assert run(raw)[1].startswith("finished: ")


@pytest.mark.usefixtures("apart")
def test_a_second_sigterm_does_not_wait(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["data"] = {"factory": f"{HERE}:interrupting_text", "arguments": {"times": 2, "name": "SIGTERM"}}
    with pytest.raises(SystemExit) as ended:
        run_command(raw, tmp_path)
    assert ended.value.code == 143 and len(metrics(raw)) == 3


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("times", [2, 6])
def test_a_second_ctrl_c_does_not_wait(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], times: int
) -> None:
    raw["data"] = {"factory": f"{HERE}:interrupting_text", "arguments": {"times": times}}
    assert run_command(raw, tmp_path) == 130
    assert capsys.readouterr().err == "offload: interrupted\n"
    assert len(metrics(raw)) == 3


def test_a_loss_that_is_not_finite_ends_the_run(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw["model"]["factory"] = f"{HERE}:poisoned"
    assert run_command(raw, tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("offload: error: the loss of step 4 is nan") and error.count("\n") == 1
    assert len(metrics(raw)) == 3
    with pytest.raises(NonFiniteError):
        run(raw)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory": {"ram": "64KiB"}}, "memory.ram"),
        (
            {"model": {"factory": "offload.nowhere:x"}},
            "model.factory: 'offload.nowhere:x': No module named 'offload.nowhere'",
        ),
        ({"model": {"factory": "examples.byte_gpt:nothing"}}, "has no attribute 'nothing'"),
        ({"model": {"factory": f"{HERE}:not_callable"}}, "is a int, not callable"),
        (
            {"model": {"arguments": {"depth": 3}}},
            "model.arguments: examples.byte_gpt:byte_gpt: got an unexpected keyword argument 'depth'",
        ),
        ({"model": {"arguments": {"d_model": 60, "n_head": 7}}}, "d_model (60) is not a multiple of n_head (7)"),
        ({"data": {"arguments": {"depth": 3}}}, "data.arguments: "),
        ({"train": {"seq": 64}}, "64 tokens a row, the model was built for 32"),
        ({"train": {"seq": 10_000}}, "a row needs 10001; take a smaller train.seq or more text"),
    ],
)
def test_what_cannot_work_is_one_line(
    change: dict[str, Any], said: str, raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for section, values in change.items():
        raw[section] = {**raw[section], **values}
    assert run_command(raw, tmp_path) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("offload: error: ") and error.count("\n") == 1


def test_missing_sections_are_named(raw: dict[str, Any], tmp_path: Path) -> None:
    del raw["data"], raw["output"]
    with pytest.raises(ConfigError, match="launch needs the sections data, output as well"):
        run(raw)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_factory_is_found_before_anything_is_written(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["data"]["factory"] = f"{HERE}:nothing"
    with pytest.raises(ConfigError):
        run(raw)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_run_folder_is_refused_and_left_alone(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious")
    with pytest.raises(RunDirectoryError, match="holds files that are not of a run; name a new or empty folder"):
        run(raw)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "precious"
    assert not (tmp_path / "pages").exists()


def test_a_run_folder_of_which_a_crash_left_the_beginning_is_used(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "offload-run.json.new").write_text('{"form')
    run(raw)
    assert (tmp_path / "run" / "offload-run.json").exists()
    assert not (tmp_path / "run" / "offload-run.json.new").exists()


def test_a_folder_for_pages_that_cannot_be_made_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["ssd"]["paths"] = [str(tmp_path / "new" / "pages"), "/proc/x"]
    with pytest.raises(RunDirectoryError, match="ssd.paths: /proc/x cannot be made: making /proc/x: "):
        run(raw)
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_is_a_file_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(RunDirectoryError, match="cannot be used: .*run: Not a directory"):
        run(raw)
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize(
    "arguments",
    [{**MODEL, "d_model": 60, "n_head": 7}, {**MODEL, "d_model": 512}],
    ids=["refused by the factory", "too large"],
)
def test_a_run_that_cannot_begin_leaves_everything_as_it_was(
    arguments: dict[str, int], raw: dict[str, Any], tmp_path: Path
) -> None:
    failing = copy.deepcopy(raw)
    failing["model"]["arguments"] = arguments
    failing["ssd"]["paths"] = [str(tmp_path / "new" / "pages")]
    with pytest.raises((ValueError, BudgetError)):
        run(failing)
    # A cache of data that was made stays for the next attempt.
    assert sorted(path.name for path in tmp_path.rglob("*")) in (
        [],
        ["data", "offload-run.json", "run", "train.bin", "validation.bin"],
    )
    run(raw)
    before = content(tmp_path)
    with pytest.raises((ValueError, BudgetError)):
        run(failing)
    assert content(tmp_path) == before and threading.active_count() == 1
