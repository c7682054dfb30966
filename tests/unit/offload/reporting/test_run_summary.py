"""The closing table, the loss curve, and what a run shows while it trains."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from reported_runs import reported
from rich.console import Console

from offload.callbacks import Evaluation, StepMetrics
from offload.config import TrainConfig
from offload.console.tables import print_rows
from offload.profiling.stats import MemoryReport, Stats, TierUse
from offload.reporting.loss_curve import save_loss_curve, smoothed
from offload.reporting.metrics_file import FORMATS, MetricsFile
from offload.reporting.progress import Progress
from offload.reporting.summary import RankUse, RunSummary, summary_rows

MIB = 1 << 20
STATS = Stats(
    steps=10, planned_steps=8, on_demand_steps=2, deviations=0,
    bytes_read=10 * 16_000, bytes_written=10 * 12_000, wait_s=0.5, update_s=1.0,
)  # fmt: skip
MEMORY = MemoryReport(
    {"host": TierUse(4 * MIB, 2 * MIB, 3 * MIB, 48, 48), "ssd": TierUse(None, MIB, MIB, 16, None)},
    {"PARAM": MIB},
    65536,
)
RUN = RunSummary(
    n_parameters=1000,
    steps=10,
    made=10,
    train_s=20.0,
    samples=50,
    tokens_per_sample=80,
    before_nats=8.01 * math.log(2),
    after_nats=2.5 * math.log(2),
    unit="byte",
    unigram_bits=4.5,
    stats=STATS,
    memory=MEMORY,
    planned_step_s=1.9,
    process_peak_bytes=300 * MIB,
    page_files_bytes=64 * MIB,
)


def metrics(step: int) -> StepMetrics:
    """One step's figures."""
    return StepMetrics(
        step=step,
        loss=2.0 / step,
        lr=1e-3,
        step_s=2.0,
        samples_per_s=4.0,
        tokens_per_s=512.0,
        host_bytes=3 * MIB,
        ssd_bytes=MIB,
        ssd_read_bytes=3_000_000,
        ssd_written_bytes=1_000_000,
        wait_share=0.25,
    )


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    """A console and what is written to it."""
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=240), out


def test_the_table_worked_by_hand() -> None:
    assert dict(summary_rows(RUN)) == {
        "parameters": "1,000",
        "steps": "10 (8 by plan, 0 deviations)",
        "validation before, bits per byte": "8.010",
        "validation after, bits per byte": "2.500",
        "unigram entropy of the validation text, bits per byte": "4.500",
        "tokens/s": "200",
        "waiting for pages": "2.5% of the time",
        "step, mean against planned": "2.000 s, 1.900 s",
        "host peak of budget": "3.0 MiB of 4.0 MiB",
        "host pages touched": "48 of 64.0 KiB, 48 planned",
        "ssd peak of budget": "1.0 MiB of no limit",
        "ssd pages touched": "16 of 64.0 KiB, no plan",
        "page files on disk": "64.0 MiB",
        "SSD bytes read a step": "15.6 KiB (16.0 a parameter)",
        "SSD bytes written a step": "11.7 KiB (12.0 a parameter)",
        "process peak (VmHWM), activations and interpreter included": "300.0 MiB",
    }


def test_without_a_word_of_the_data_the_table_speaks_of_nats_and_samples() -> None:
    run = dataclasses.replace(RUN, unit=None, tokens_per_sample=None, before_nats=8.01)
    assert dict(summary_rows(run))["unigram entropy of the validation text, nats"] == f"{4.5 * math.log(2):.3f}"
    run = dataclasses.replace(run, unigram_bits=None)
    rows = dict(summary_rows(run))
    assert rows["validation before, nats"] == "8.010" and rows["samples/s"] == "2.5"
    assert not [row for row in summary_rows(run) if "bits" in row[0] or "token" in row[0] or "unigram" in row[0]]


def test_counters_of_this_launch_are_of_its_own_steps() -> None:
    rows, fresh = dict(summary_rows(dataclasses.replace(RUN, steps=60))), dict(summary_rows(RUN))
    assert rows.pop("steps") == "60, 10 of them in this launch (8 by plan, 0 deviations)"
    assert rows == {what: value for what, value in fresh.items() if what != "steps"}
    nothing = dict(summary_rows(dataclasses.replace(RUN, steps=60, made=0, samples=0, train_s=0.0)))
    assert "SSD bytes read a step" not in nothing and "step, mean against planned" not in nothing


def test_several_ranks_have_their_peaks_and_waits_side_by_side() -> None:
    uses = [RankUse(2**20, 0.1 * RUN.train_s, 0.0), RankUse(2**21, 0.2 * RUN.train_s, 0.05 * RUN.train_s)]
    rows = dict(summary_rows(RUN, uses))
    assert rows["waiting for pages and sums of ranks 0 to 1"] == "10.0%, 20.0% of the time"
    assert rows["waiting for other ranks between steps of ranks 0 to 1"] == "0.0%, 5.0% of the time"
    peaks = "process peak of ranks 0 to 1 (VmHWM), activations and interpreter included"
    assert rows[peaks] == "1.0 MiB, 2.0 MiB" and "waiting for pages" not in rows


def test_page_files_say_what_commits_add() -> None:
    ssd = dataclasses.replace(MEMORY.tiers["ssd"], planned_with_commits=True)
    memory = dataclasses.replace(MEMORY, tiers={**MEMORY.tiers, "ssd": ssd})
    rows = dict(summary_rows(dataclasses.replace(RUN, memory=memory)))
    assert rows["page files on disk"] == "64.0 MiB, with room for the versions that commits keep"


def test_a_run_stopped_before_its_first_step_has_a_table() -> None:
    nothing = Stats(0, 0, 0, 0, 0, 0, 0.0, 0.0)
    run = dataclasses.replace(
        RUN,
        steps=0,
        made=0,
        samples=0,
        train_s=0.0,
        before_nats=None,
        after_nats=None,
        unigram_bits=None,
        stats=nothing,
        planned_step_s=None,
    )
    rows = dict(summary_rows(run))
    assert rows["validation after, bits per byte"] == "not measured" and rows["tokens/s"] == "-"
    assert "SSD bytes read a step" not in rows and "step, mean against planned" not in rows


def test_the_table_in_a_pipe_is_aligned_plain_text() -> None:
    target, out = console(terminal=False)
    print_rows("Run", summary_rows(RUN), target)
    lines = out.getvalue().splitlines()
    rows = summary_rows(RUN)
    assert len(lines) == len(rows) and "\x1b" not in out.getvalue()
    assert len({line.index(value, len(what)) for line, (what, value) in zip(lines, rows, strict=True)}) == 1


def test_the_table_on_a_terminal_is_framed() -> None:
    target, out = console(terminal=True)
    print_rows("Run", summary_rows(RUN), target)
    assert "┃" in out.getvalue() or "│" in out.getvalue()
    assert all(value in out.getvalue() for _, value in summary_rows(RUN))


@pytest.mark.parametrize("n_steps", [0, 1, 5])
def test_the_curve_is_a_picture(n_steps: int, tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, after_nats=None if n_steps == 0 else 2.5)
    save_loss_curve(tmp_path / "curve.png", [metrics(step + 1) for step in range(n_steps)], run, "run: model")
    content = (tmp_path / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_smoothing_is_centred() -> None:
    line = [float(step) for step in range(200)]
    assert smoothed(line) == pytest.approx(line) and smoothed([]) == []
    assert smoothed([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0], "nothing is smoothed of a few steps"
    losses = [4.0, 2.0] * 100
    assert smoothed(losses)[0] == 4.0 and smoothed(losses)[100] == pytest.approx(3.0, abs=0.2)


def printed(tmp_path: Path, train: TrainConfig, unit: str | None, *records: StepMetrics | Evaluation) -> list[str]:
    """The lines of a pipe."""
    target, out = console(terminal=False)
    with reported(tmp_path, Progress(target, train, unit)) as reporter:
        for record in records:
            reporter.tell(record)
    return out.getvalue().splitlines()


def test_a_line_has_every_figure_and_names_the_unit_of_the_loss(tmp_path: Path) -> None:
    train = TrainConfig(steps=10, batch=1, log_every=4)
    figures = "RAM 3.0 MiB  SSD 1.0 MiB  2 MB/s  waiting 25.0%"
    rows = dataclasses.replace(metrics(4), tokens_per_s=None)
    nats = ["step 4/10  loss 0.5000 nats  4.0 samples/s  " + figures, "step 4/10  validation loss 2.0000 nats  (best)"]
    assert printed(tmp_path, train, None, rows, Evaluation(4, 2.0, best=True)) == nats
    loss = 0.5 / math.log(2)
    assert printed(tmp_path, train, "byte", metrics(4), Evaluation(4, 2.0, best=False)) == [
        f"step 4/10  loss {loss:.4f} bits per byte  512 tokens/s  {figures}",
        f"step 4/10  validation loss {4 * loss:.4f} bits per byte",
    ]


@pytest.mark.parametrize("step", [0, 10])
def test_the_first_and_the_last_evaluation_have_lines(step: int, tmp_path: Path) -> None:
    said = printed(tmp_path, TrainConfig(steps=10, batch=1), None, Evaluation(step, 2.0, best=step > 0))
    assert said == [f"step {step}/10  validation loss 2.0000 nats" + ("  (best)" if step else "")]


def test_metrics_are_on_disk_after_each_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("of an earlier run\n")
    with reported(tmp_path, MetricsFile(tmp_path, FORMATS["jsonl"])) as reporter:
        for step in (1, 2, 3):
            reporter.tell(metrics(step))
            lines = path.read_text().splitlines()
            assert len(lines) == step and json.loads(lines[-1]) == dataclasses.asdict(metrics(step))


def test_plain_lines_come_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    target, out = console(terminal=False)
    with reported(tmp_path, Progress(target, TrainConfig(steps=7, batch=1, log_every=3), None)) as reporter:
        for step in range(1, 8):
            reporter.tell(metrics(step))
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["3/7", "6/7", "7/7"]


def test_a_terminal_gets_one_live_line(tmp_path: Path) -> None:
    target, out = console(terminal=True)
    with reported(tmp_path, Progress(target, TrainConfig(steps=2, batch=1), None)) as reporter:
        reporter.tell(metrics(1))
        reporter.tell(metrics(2))
    assert "step 1/2" not in out.getvalue() and "2/2" in out.getvalue()
    assert "loss 1.0000 nats  512 tokens/s" in out.getvalue()


def test_a_long_validation_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, out = console(terminal=False)
    progress = Progress(target, TrainConfig(steps=2, batch=1, evaluate_batches=3), None)
    progress.validating(0)
    progress.validating(1)
    assert out.getvalue() == "", "a short one has the line of its result alone"
    monkeypatch.setattr("offload.reporting.progress._VALIDATING_EVERY_S", 0.0)
    progress.validating(2)
    assert out.getvalue() == "validating, 2 of 3 batches\n"
    target, out = console(terminal=True)
    progress = Progress(target, TrainConfig(steps=2, batch=1, evaluate_batches=3), None)
    with reported(tmp_path, progress):
        progress.validating(1)
    assert "validating, 1 of 3 batches" in out.getvalue() and "\nvalidating" not in out.getvalue()


def test_an_error_closes_the_metrics_file(tmp_path: Path) -> None:
    files = [MetricsFile(tmp_path, log) for log in FORMATS.values()]
    with pytest.raises(RuntimeError), reported(tmp_path, *files) as reporter:
        reporter.tell(metrics(1))
        raise RuntimeError("in the middle")
    assert [len((tmp_path / f"metrics.{end}").read_text().splitlines()) for end in ("jsonl", "csv")] == [1, 2]
