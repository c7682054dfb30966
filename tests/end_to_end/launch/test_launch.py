"""`offload launch` from configuration to run folder: a real engine, a small model, a text made here."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from examples.byte_corpus import ByteCorpus
from examples.byte_gpt import ByteGPT, byte_gpt
from offload.cli import main
from offload.config import ConfigError, load_config
from offload.factories import factory_of, resolve
from offload.launch.loop import learning_rate
from offload.launch.train import launch
from offload.parameters.optimizer_template import template_from
from pagemem.errors import BudgetError, NonFiniteError, RunDirectoryError

HERE = __name__
STEPS, ROWS, SEQ = 12, 2, 32
MODEL = {"d_model": 64, "n_layer": 2, "n_head": 4, "seq": SEQ}
SENTENCE = b"the quick brown fox jumps over the lazy dog. "


# ---- factories that configurations of these tests name -------------------------------------------------------------


def small_text(folder: Path, seed: int) -> ByteCorpus:
    """One sentence, again and again."""
    folder.mkdir(exist_ok=True)
    (folder / "train.bin").write_bytes(SENTENCE * 200)
    (folder / "validation.bin").write_bytes(SENTENCE * 20)
    return ByteCorpus(folder, seed=seed)


class InterruptingText(ByteCorpus):
    """Presses Ctrl-C while the batch of step number ``at`` is made, ``times`` times."""

    at, times, number = 3, 1, signal.SIGINT

    def batch(self, step: int, rows: int, seq: int) -> tuple[Tensor, Tensor]:
        """As any corpus, and a signal."""
        if step == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return super().batch(step, rows, seq)


def interrupting_text(folder: Path, seed: int, times: int, name: str = "SIGINT") -> ByteCorpus:
    """The small text with Ctrl-C, or another signal, in it."""
    small_text(folder, seed)
    corpus = InterruptingText(folder, seed=seed)
    corpus.times, corpus.number = times, signal.Signals[name]
    return corpus


class Poisoned(ByteGPT):
    """Its loss is NaN from the fourth training batch on."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """As any byte GPT, until it is not."""
        loss = super().forward(x, y)
        if self.training:
            self.batches = getattr(self, "batches", 0) + 1
            loss = loss * (float("nan") if self.batches > 3 else 1.0)
        return loss


def poisoned(d_model: int, n_layer: int, n_head: int, seq: int) -> ByteGPT:
    """The model that fails."""
    return Poisoned(d_model, n_layer, n_head, seq, tied=False)


class Drawing(ByteGPT):
    """Initialised with all kinds of random numbers."""

    def __init__(self, *args: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with torch.no_grad():
            self.norm.weight.fill_(random.random())
            self.norm.bias.fill_(float(np.random.rand()))


def drawing(d_model: int, n_layer: int, n_head: int, seq: int) -> ByteGPT:
    """The model that draws."""
    return Drawing(d_model, n_layer, n_head, seq, tied=False)


class Measured(ByteGPT):
    """Looks at its values while it is built."""

    def __init__(self, *args: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spread = float(self.tokens.weight.detach().std())


def measured(d_model: int, n_layer: int, n_head: int, seq: int) -> ByteGPT:
    """The model that cannot be built without values."""
    return Measured(d_model, n_layer, n_head, seq, tied=False)


not_callable = 3


# ---- what every test starts from -----------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A run whose states do not fit in its RAM, on one compute thread: threads cost a model this small more than they
    bring."""
    threads = torch.get_num_threads()
    yield {
        "seed": 5,
        "memory": {"ram": "768KiB", "page": "64KiB"},
        "ssd": {"paths": [str(tmp_path / "pages")], "threads": 1},
        "optimizer": {"lr": 3e-3, "no_decay": ["1d"]},
        "model": {"factory": "examples.byte_gpt:byte_gpt", "arguments": MODEL},
        "data": {"factory": f"{HERE}:small_text"},
        "train": {
            "steps": STEPS, "batch": ROWS, "seq": SEQ, "evaluate_batches": 2, "schedule": "cosine", "warmup_steps": 2,
            "log_every": 5, "threads": 1,
        },
        "output": {"run": str(tmp_path / "run")},
    }  # fmt: skip
    torch.set_num_threads(threads)


def run(raw: dict[str, Any], *, terminal: bool = False) -> tuple[int, str]:
    """Launch; returns the exit code and what was printed."""
    out = io.StringIO()
    code = launch(load_config(raw), Console(file=out, force_terminal=terminal, width=200))
    return code, out.getvalue()


def run_command(raw: dict[str, Any], tmp_path: Path) -> int:
    """Launch as the command does, from a file."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return main(["launch", str(tmp_path / "config.json")])


def metrics(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of the run."""
    lines = (Path(raw["output"]["run"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file below a folder, but for the data's own cache."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "data"]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def table(text: str) -> dict[str, str]:
    """The closing table of a run in a pipe."""
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in text.splitlines() if re.search(r"\S {2,}\S", line))  # type: ignore[misc]


def plain_losses(raw: dict[str, Any], folder: Path, build: Callable[..., ByteGPT] = byte_gpt) -> list[float]:
    """The losses of the same training in plain PyTorch, step by step."""
    config = load_config(raw)
    assert config.train is not None
    torch.manual_seed(config.seed)
    data, model = small_text(folder, config.seed), build(**MODEL)
    optimizer = template_from(config.optimizer, model)
    for group in optimizer.param_groups:
        group["fused"] = True
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(config.train))
    losses = []
    for step in range(config.train.steps):
        total = 0.0
        for micro in range(config.update.accumulation):
            loss = model(*data.batch(step * config.update.accumulation + micro, ROWS, SEQ))
            total += float(loss.detach())
            (loss / config.update.accumulation).backward()
        losses.append(total / config.update.accumulation)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses


# ---- a whole run ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_table_metrics_configuration_and_picture(raw: dict[str, Any]) -> None:
    code, text = run(raw)
    assert code == 0 and torch.get_num_threads() == 1
    rows = table(text)
    before, after = (float(rows[f"validation {when}, bits per byte"]) for when in ("before", "after"))
    unigram = float(rows["unigram entropy of the validation text, bits per byte"])
    assert 6 < before < 10 and after < before and 3 < unigram < 5
    touched, planned = re.findall(r"(\d+)(?: of| planned)", rows["host pages touched"])
    assert int(touched) == int(planned) <= (768 << 10) // (64 << 10)
    assert int(rows["parameters"].replace(",", "")) * 12 > 768 << 10
    assert "a parameter" in rows["SSD bytes read a step"] and "a parameter" in rows["SSD bytes written a step"]

    folder = Path(raw["output"]["run"])
    assert load_config(folder / "config.json") == load_config(raw)
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert [m["step"] for m in metrics(raw)] == list(range(1, STEPS + 1))
    assert sum(m["ssd_read_bytes"] for m in metrics(raw)) > 0 < sum(m["ssd_written_bytes"] for m in metrics(raw))
    assert all(0 < m["host_bytes"] <= 768 << 10 for m in metrics(raw))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_plain_torchs(accumulation: int, raw: dict[str, Any], tmp_path: Path) -> None:
    raw["update"] = {"accumulation": accumulation}
    run(raw)
    assert [m["loss"] for m in metrics(raw)] == plain_losses(raw, tmp_path / "plain")


def test_what_is_built_beforehand_takes_no_random_numbers_from_the_model(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["model"]["factory"] = f"{HERE}:drawing"
    random.seed(3)
    np.random.seed(4)
    run(raw)
    random.seed(3)
    np.random.seed(4)
    assert [m["loss"] for m in metrics(raw)] == plain_losses(raw, tmp_path / "plain", drawing)


def test_a_pipe_gets_plain_lines_every_few_steps(raw: dict[str, Any]) -> None:
    _, text = run(raw)
    assert re.findall(r"^step (\d+)/12  loss [\d.]+  [\d,]+ tokens/s  RAM .+  SSD .+  waiting .+%$", text, re.M) == [
        "5",
        "10",
        "12",
    ]
    assert "\x1b" not in text


def test_a_terminal_gets_a_live_line_and_a_framed_table(raw: dict[str, Any]) -> None:
    _, text = run(raw, terminal=True)
    assert not re.search(r"^step \d+/12", text, re.M)
    assert "tokens/s" in text and "│" in text


def test_no_validation_is_said(raw: dict[str, Any]) -> None:
    raw["train"]["evaluate_batches"] = 0
    assert table(run(raw)[1])["validation after, bits per byte"] == "not measured"


def test_results_of_another_run_are_set_aside_and_nothing_else_changes(raw: dict[str, Any], tmp_path: Path) -> None:
    run(raw)
    first, folder = metrics(raw), Path(raw["output"]["run"])
    kept = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "loss_curve.png", "config.json")}
    (folder / "note.txt").write_text("mine")
    for number, steps in ((1, 5), (2, 4)):
        other = {
            **raw,
            "train": {**raw["train"], "steps": steps},
            "ssd": {"paths": [str(tmp_path / f"pages {number}")], "threads": 1},
        }
        text = run(other)[1]
        assert f"are kept as metrics-{number}.jsonl, loss_curve-{number}.png, config-{number}.json" in text
        assert len(metrics(other)) == steps and metrics(other)[0]["loss"] == first[0]["loss"]
    assert {name: (folder / f"{Path(name).stem}-1{Path(name).suffix}").read_bytes() for name in kept} == kept
    assert (folder / "note.txt").read_text() == "mine"


# ---- a budget that is too small --------------------------------------------------------------------------------------


def smallest_named(raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """The number of the one line with which the command refuses the budget."""
    assert run_command(raw, tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("offload: error: memory.ram is ") and error.count("\n") == 1
    found = re.search(
        r"the largest unit, blocks\.0\.up \(66560 bytes .*needs (\d+) bytes.*set memory\.ram to at least (\d+)$", error
    )
    assert found is not None and found[1] == found[2], error
    assert not (tmp_path / "pages").exists(), "nothing was built"
    return int(found[1])


@pytest.mark.parametrize(
    "more", [{}, {"update": {"clip_norm": 0.5, "accumulation": 2}}, {"dtype": "bf16"}], ids=["plain", "clipped", "bf16"]
)
def test_the_budget_that_the_error_names_trains(
    more: dict[str, Any], raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw["model"]["dtype"] = more.get("dtype", "fp32")
    raw["update"] = more.get("update", {})
    raw["memory"]["ram"] = "128KiB"
    smallest = smallest_named(raw, tmp_path, capsys)
    raw["memory"]["ram"] = smallest - (64 << 10)
    assert smallest_named(raw, tmp_path, capsys) == smallest
    raw["memory"]["ram"] = smallest
    assert run(raw)[0] == 0 and len(metrics(raw)) == STEPS


def test_a_model_that_cannot_be_built_without_values_is_said_to_be_checked_while_it_is_built(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw["model"]["factory"] = f"{HERE}:measured"
    code, text = run(raw)
    said = (
        "memory.ram is checked only while the model is built, unit by unit: the model cannot be built on torch's meta "
        "device"
    )
    assert code == 0 and said in " ".join(text.split()) and metrics(raw)[-1]["step"] == STEPS
    raw["memory"]["ram"] = "64KiB"
    raw["ssd"]["paths"] = [str(tmp_path / "others")]
    assert run_command(raw, tmp_path) == 1
    error = capsys.readouterr().err
    assert "which is being built, needs at least 131072 bytes" in error and error.count("\n") == 1


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
    code, text = run({**raw, "data": {"factory": f"{HERE}:small_text"}})  # All was given back.
    assert (
        code == 0 and "resumes after step 4" in text and [m["step"] for m in metrics(raw)] == list(range(1, STEPS + 1))
    )


def test_sigterm_stops_as_ctrl_c_does(raw: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    raw["data"] = {"factory": f"{HERE}:interrupting_text", "arguments": {"times": 1, "name": "SIGTERM"}}
    code, text = run(raw)
    assert code == 143 and "interrupted after step 4" in text and len(metrics(raw)) == 4
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_does_not_wait(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["data"] = {"factory": f"{HERE}:interrupting_text", "arguments": {"times": 2, "name": "SIGTERM"}}
    with pytest.raises(SystemExit) as ended:
        run_command(raw, tmp_path)
    assert ended.value.code == 143 and len(metrics(raw)) == 3


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
        ({"model": {"factory": "offload.nowhere:x"}}, "factory 'offload.nowhere:x': No module named 'offload.nowhere'"),
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


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_the_learning_rate_worked_by_hand() -> None:
    config = load_config({
        "memory": {"ram": "64MiB"}, "ssd": {"paths": ["pages"]},
        "train": {"steps": 6, "batch": 1, "seq": 1, "schedule": "cosine", "warmup_steps": 2},
    })  # fmt: skip
    assert config.train is not None
    factor = learning_rate(config.train)
    expected = [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + 2**-0.5), 0.55, 0.1 + 0.45 * (1 - 2**-0.5), 0.1, 0.1]
    assert [factor(step) for step in range(8)] == pytest.approx(expected)
    constant = learning_rate(config.train.model_copy(update={"schedule": "constant"}))
    assert [constant(step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_a_factory_may_be_an_attribute_of_a_class() -> None:
    assert resolve("examples.byte_corpus:ByteCorpus.of_files") == ByteCorpus.of_files


def test_what_a_factory_raises_itself_passes_through() -> None:
    with pytest.raises(ValueError, match="multiple"):
        factory_of("model", "examples.byte_gpt:byte_gpt", {"d_model": 60, "n_head": 7})()
