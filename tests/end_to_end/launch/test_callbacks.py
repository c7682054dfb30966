"""Callbacks of a launched run, evaluation, the best commit, and the learning rate of a resumed run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from offload import Callback, load_config
from offload.callbacks import CommitBegun, Evaluation, RunEnded, RunStarted, StepMetrics
from offload.config import ConfigError
from offload.launch.train import launch
from pagemem.durable.commit_folder import CommitFolder

HERE = "test_callbacks"
STEPS = 6
heard: list[Any] = []


class Listening(Callback):
    """Notes what it is told."""

    def on_start(self, run: RunStarted) -> None:
        heard.append(run)

    def on_step(self, metrics: StepMetrics) -> None:
        heard.append(metrics)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        heard.append(evaluation)

    def on_commit(self, commit: CommitBegun) -> None:
        heard.append(commit)

    def on_end(self, end: RunEnded) -> None:
        heard.append(end)


class Failing(Listening):
    """Raises after the third step."""

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise ZeroDivisionError("by 3")


class FailingAtBest(Listening):
    """Raises in the method ``at`` for the best evaluation, of step 4."""

    at = ""

    def _fail(self, method: str, step: int) -> None:
        if method == self.at and step == 4:
            raise ZeroDivisionError(method)

    def on_step(self, metrics: StepMetrics) -> None:
        self._fail("on_step", metrics.step)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self._fail("on_evaluation", evaluation.step)

    def on_commit(self, commit: CommitBegun) -> None:
        super().on_commit(commit)
        self._fail("on_commit", commit.step)


class FailingAtEnd(Listening):
    """Raises when it is ended."""

    def on_end(self, end: RunEnded) -> None:
        raise ZeroDivisionError("at the end")


class Misspelt(Callback):
    """Would never be called."""

    def on_stepp(self, metrics: StepMetrics) -> None:
        """Nothing."""


class Half:
    """Has one of the methods."""

    def on_start(self, run: RunStarted) -> None:
        """Nothing."""


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A small run that evaluates and commits every two steps."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(__import__("sys").modules, HERE, __import__("sys").modules[__name__])
    heard.clear()
    threads = torch.get_num_threads()
    yield {
        "memory": {"ram": "768KiB", "page": "64KiB"},
        "ssd": {"paths": [str(tmp_path / "pages")], "threads": 1},
        "optimizer": {"lr": 1e-3},
        "model": {"factory": "launch_data:Regression"},
        "data": {"factory": "launch_data:vectors"},
        "train": {"steps": STEPS, "batch": 4, "evaluate_batches": 2, "evaluate_every": 2, "threads": 1},
        "output": {"run": str(tmp_path / "run"), "callbacks": [f"{HERE}:Listening"]},
    }
    torch.set_num_threads(threads)


def run(raw: dict[str, Any]) -> tuple[int, str]:
    """Launch; returns the exit code and what was printed."""
    out = io.StringIO()
    code = launch(load_config(raw), Console(file=out, width=200))
    return code, out.getvalue()


def metrics(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(raw["output"]["run"]) / "metrics.jsonl").read_text().splitlines()]


def commits(raw: dict[str, Any]) -> dict[int, str | None]:
    """Names of the commits by their steps."""
    folder = CommitFolder(Path(raw["ssd"]["paths"][0]))
    return {manifest.step: manifest.name for manifest in map(folder.read, folder.numbers())}


def test_a_callback_is_told_of_everything_in_order(raw: dict[str, Any]) -> None:
    code, text = run(raw)
    assert code == 0
    start, end = heard[0], heard[-1]
    assert isinstance(start, RunStarted) and (start.step, start.folder) == (0, Path(raw["output"]["run"]))
    assert start.n_parameters == 16 * 192 + 192 + 192 * 192 + 192 + 192 * 16 + 16 and start.unit is None
    assert end == RunEnded(STEPS, None)
    kinds = [(type(record).__name__, record.step) for record in heard[1:-1]]
    steps = [[("StepMetrics", step)] + [("Evaluation", step)] * (step % 2 == 0) for step in range(1, STEPS + 1)]
    assert kinds == [("Evaluation", 0), *(one for step in steps for one in step), ("CommitBegun", STEPS)]
    evaluations = {record.step: record.loss for record in heard if isinstance(record, Evaluation)}
    lines = metrics(raw)
    assert [asdict(record) for record in heard if isinstance(record, StepMetrics)] == lines
    assert [line["validation_loss"] for line in lines] == [evaluations.get(step) for step in range(1, STEPS + 1)]
    assert f"step 2/{STEPS}  validation loss {evaluations[2]:.4f} nats" in text
    assert [line.split()[1] for line in text.splitlines() if "validation loss" in line] == ["0/6", "2/6", "4/6", "6/6"]


def test_evaluation_changes_no_loss(raw: dict[str, Any], tmp_path: Path) -> None:
    run(raw)
    with_evaluation = [line["loss"] for line in metrics(raw)]
    del raw["train"]["evaluate_every"]
    raw["ssd"]["paths"], raw["output"]["run"] = [str(tmp_path / "other")], str(tmp_path / "plain")
    run(raw)
    assert [line["loss"] for line in metrics(raw)] == with_evaluation
    assert all(line["validation_loss"] is None for line in metrics(raw))


def test_csv_and_jsonl_have_the_same_metrics_also_after_resuming(raw: dict[str, Any]) -> None:
    raw["output"] |= {"log": ["csv", "jsonl"], "callbacks": []}
    run(raw)
    raw["train"]["steps"] = STEPS + 2
    run(raw)
    with (Path(raw["output"]["run"]) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = metrics(raw)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 3))
    assert [{name: json.loads(cell or "null") for name, cell in row.items()} for row in rows] == lines


def test_csv_alone_is_continued(raw: dict[str, Any]) -> None:
    raw["output"] |= {"log": "csv", "callbacks": []}
    run(raw)
    raw["train"]["steps"] = STEPS + 2
    code, text = run(raw)
    path = Path(raw["output"]["run"]) / "metrics.csv"
    assert code == 0 and len(path.read_text().splitlines()) == STEPS + 3 and "no metrics" not in text
    assert not path.with_suffix(".jsonl").exists()


def test_an_error_of_a_callback_is_raised_once_the_steps_are_committed(
    raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    raw["output"]["callbacks"] = [f"{HERE}:Failing", f"{HERE}:Listening"]
    with pytest.raises(ConfigError, match=f"output.callbacks: {HERE}:Failing: on_step fails: ZeroDivisionError: by 3"):
        launch(load_config(raw), Console(width=300))
    assert commits(raw) == {3: None}
    kept = f"ended by an error after step 3, which is committed in {raw['ssd']['paths'][0]}; the same command resumes"
    assert kept in capsys.readouterr().out
    ends = [record for record in heard if isinstance(record, RunEnded)]
    assert [(end.step, type(end.error)) for end in ends] == [(3, ConfigError)] * 2
    raw["output"]["callbacks"] = []
    assert run(raw)[0] == 0 and [line["step"] for line in metrics(raw)] == list(range(1, STEPS + 1))


def test_an_error_at_the_end_is_raised_when_all_callbacks_have_ended(raw: dict[str, Any]) -> None:
    raw["output"]["callbacks"] = [f"{HERE}:FailingAtEnd", f"{HERE}:Listening"]
    with pytest.raises(ConfigError, match="on_end fails: ZeroDivisionError: at the end"):
        run(raw)
    assert commits(raw) == {STEPS: None} and heard[-1] == RunEnded(STEPS, None)


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (f"{HERE}:Half", "returns a Half, which has no method on_step; derive it from offload.Callback"),
        (f"{HERE}:Misspelt", "returns a Misspelt, whose on_stepp is never called; did you mean 'on_step'?"),
        (f"{HERE}:nothing", "has no attribute 'nothing'"),
        (f"{HERE}:heard", "is a list, not callable"),
    ],
)
def test_what_is_no_callback_is_refused_before_the_first_step(reference: str, text: str, raw: dict[str, Any]) -> None:
    raw["output"]["callbacks"] = [reference]
    with pytest.raises(ConfigError, match=text):
        run(raw)
    assert not (Path(raw["output"]["run"]) / "metrics.jsonl").exists()


# ---- the best commit -----------------------------------------------------------------------------------------------


def test_the_lowest_validation_loss_is_kept_by_name(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([9.0, 5.0, 3.0, 4.0])
    monkeypatch.setattr("offload.launch.loop.validation_loss", lambda *_: next(losses))
    monkeypatch.setattr("offload.launch.train.validation_loss", lambda *_: next(losses))
    raw["commit"] = {"keep_best": True}
    code, text = run(raw)
    assert code == 0 and commits(raw) == {4: "best", 6: None}
    assert [record.best for record in heard if isinstance(record, Evaluation)] == [False, True, True, False]
    assert [(record.step, record.name) for record in heard if isinstance(record, CommitBegun)] == [
        (2, "best"),
        (4, "best"),
        (6, None),
    ]
    assert f"step 4/{STEPS}  validation loss 3.0000 nats  (best)" in text
    losses = iter([3.5, 2.0])
    raw["train"]["steps"] = 10
    assert run(raw)[0] == 0 and commits(raw) == {6: None, 10: "best"}, "the best so far is known after resuming"


@pytest.mark.parametrize("method", ["on_step", "on_evaluation", "on_commit"])
def test_the_best_commit_has_its_name_also_where_a_callback_fails_before_it(
    method: str, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([9.0, 5.0, 3.0, 4.0])
    monkeypatch.setattr("offload.launch.loop.validation_loss", lambda *_: next(losses))
    monkeypatch.setattr("offload.launch.train.validation_loss", lambda *_: next(losses))
    monkeypatch.setattr(FailingAtBest, "at", method)
    raw |= {"commit": {"keep_best": True}, "output": {**raw["output"], "callbacks": [f"{HERE}:FailingAtBest"]}}
    with pytest.raises(ConfigError, match=f"{method} fails"):
        run(raw)
    assert commits(raw) == {4: "best"}
    assert [(record.step, record.name) for record in heard if isinstance(record, CommitBegun)][-1] == (4, "best")
    raw["output"]["callbacks"] = []
    assert run(raw)[0] == 0 and commits(raw) == {4: "best", 6: None}


def test_the_whole_commit_at_the_end_takes_the_name_over_in_lock_free_mode(raw: dict[str, Any]) -> None:
    raw |= {"commit": {"keep_best": True}, "update": {"mode": "lock-free", "exact_steps": 0}}
    raw["memory"]["ram"] = "8MiB"
    raw["train"] |= {"steps": 2}
    assert run(raw)[0] == 0
    assert [(record.step, record.name) for record in heard if isinstance(record, CommitBegun)] == [(2, "best")] * 2
    assert commits(raw) == {2: "best"}


@pytest.mark.parametrize(
    ("section", "values", "text"),
    [
        ("train", {"evaluate_every": None}, "commit.keep_best needs train.evaluate_every"),
        ("train", {"evaluate_batches": 0}, "evaluate_every is 2, but evaluate_batches is 0"),
        ("output", {"log": "tensorboard"}, "output.log.0: Input should be 'jsonl' or 'csv', not 'tensorboard'"),
        ("output", {"log": []}, "output.log is empty; name at least one"),
        ("output", {"callbacks": ["print"]}, "output.callbacks.0"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    section: str, values: dict[str, Any], text: str, raw: dict[str, Any]
) -> None:
    raw["commit"] = {"keep_best": True}
    raw[section] |= values
    with pytest.raises(ConfigError, match=text):
        load_config(raw)


# ---- hyper-parameters of a run that resumes ------------------------------------------------------------------------


def test_a_new_learning_rate_holds_where_the_configuration_says_so(raw: dict[str, Any]) -> None:
    run(raw)
    raw["optimizer"]["lr"], raw["train"]["steps"] = 5e-4, STEPS + 1
    _, text = run(raw)
    assert "changed since: optimizer.lr: 0.001 -> 0.0005; the commit's value holds; set commit.hyper_parameters" in text
    assert metrics(raw)[-1]["lr"] == 1e-3
    raw["train"]["steps"], raw["commit"] = STEPS + 2, {"hyper_parameters": "configuration"}
    _, text = run(raw)
    assert "changed since: optimizer.lr: 0.001 -> 0.0005; the new one holds" in text
    assert metrics(raw)[-1]["lr"] == 5e-4
    raw["train"]["steps"], raw["commit"] = STEPS + 3, {}
    _, text = run(raw)
    assert "optimizer.lr" not in text and metrics(raw)[-1]["lr"] == 5e-4
