"""`offload launch` from configuration to run folder: a real engine, a small model, a text made here."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch_data
import numpy as np
import pytest
import torch
from launch_data import sentence_text
from launched_runs import HERE, MODEL, ROWS, SEQ, STEPS, metrics, run, run_command, table

from examples.byte_corpus import ByteCorpus
from examples.byte_gpt import ByteGPT, byte_gpt
from offload.config_loading import load_config
from offload.factories import factory_of, resolve
from offload.launch.loop import learning_rate
from offload.parameters.optimizer_template import template_from

# ---- what every test starts from -----------------------------------------------------------------------------------


def plain_losses(raw: dict[str, Any], folder: Path, build: Callable[..., ByteGPT] = byte_gpt) -> list[float]:
    """The losses of the same training in plain PyTorch, step by step."""
    config = load_config(raw)
    assert config.train is not None
    torch.manual_seed(config.seed)
    data, model = sentence_text(folder, config.seed), build(**MODEL)
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
    assert [m["loss"] for m in metrics(raw)] == plain_losses(raw, tmp_path / "plain", launch_data.drawing)


def test_a_pipe_gets_plain_lines_every_few_steps(raw: dict[str, Any]) -> None:
    _, text = run(raw)
    line = r"^step (\d+)/12  loss [\d.]+ bits per byte  [\d,]+ tokens/s  RAM .+  SSD .+  waiting .+%$"
    assert re.findall(line, text, re.M) == ["5", "10", "12"]
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
    assert resolve("data.factory", "examples.byte_corpus:ByteCorpus.of_files") == ByteCorpus.of_files


def test_what_a_factory_raises_itself_passes_through() -> None:
    with pytest.raises(ValueError, match="multiple"):
        factory_of("model.factory", "examples.byte_gpt:byte_gpt", {"d_model": 60, "n_head": 7})()
