"""`benchmarks.step`: the engine's configuration is a user's, turns are paired, the record becomes rows of the CSV."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks import common, subjects, turns
from benchmarks.common import SIZES
from benchmarks.floor import Floor, step_flops
from benchmarks.results_csv import OVER_PLAIN, OVER_SAME_HEAP, Row
from benchmarks.step import Run, arguments, csv_rows, summarize, table
from benchmarks.subjects import ENGINE, OPTIONS, PLAIN, SAME_HEAP, engine_config, options_of
from benchmarks.turns import Turns
from offload.config_loading import load_config

FLOOR = Floor(flops=2 * 10**11, flops_per_s=1e11, read_bytes_per_s=2e9, write_bytes_per_s=1e9)


def test_by_default_the_engine_has_nothing_but_a_budget_and_a_folder() -> None:
    config = engine_config(arguments(["--dir", "there"]))
    ram = int(0.25 * 12 * common.n_parameters(*SIZES["27m"], 256))
    assert config == {"memory": {"ram": ram}, "ssd": {"paths": ["there/pages"]}}


def test_what_the_command_line_names_is_configured() -> None:
    options = ["--clip-norm", "1", "--activations", "500MiB", "--device-share", "0.5", "--ssd-limit", "300"]
    config = engine_config(arguments(options))
    assert (config["update"], config["memory"]["activations"]) == ({"clip_norm": 1.0}, "500MiB")
    assert (config["device"], config["ssd"]["limit_mb_per_s"]) == ("cpu-emulated", 300.0)
    load_config(config)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--turn", "4"], "--turn is 4; below 5"),
        (["--turns", "0"], "--turns is 0"),
        (["--runs", "0"], "--runs is 0"),
        (["--device", "cuda"], "needs --device-share"),
        (["--torch-keeps-heap"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_is_refused(options: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(options)
    assert ended.value.code == 2
    assert error in capsys.readouterr().err


def test_measured_processes_are_given_the_options_that_were_set() -> None:
    options = options_of(arguments(["--recompute", "--seq", "64"]), OPTIONS)
    assert options == [
        "--size", "27m", "--ram-share", 0.25, "--device", "cpu", "--recompute", "--batch", 4, "--seq", 64,
        "--threads", 2, "--dir", "runs/benchmark",
    ]  # fmt: skip


class Scripted:
    """A process whose n-th step takes n seconds."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order, self.made = name, order, 0

    def step(self) -> dict[str, Any]:
        self.order.append(self.name)
        self.made += 1
        return {"step_s": float(self.made)}


def test_who_begins_changes_and_the_first_step_of_a_turn_is_not_timed() -> None:
    order: list[str] = []
    processes: Any = {name: Scripted(name, order) for name in "ab"}
    made = turns.take(processes, 2, 5)
    assert "".join(order) == "aaaaabbbbb" + "bbbbbaaaaa"
    assert made.mean_s("a") == [3.5, 8.5]
    assert [step["step_s"] for step in made.timed("a")] == [2, 3, 4, 5, 7, 8, 9, 10]
    assert made.ratios("a", "b") == [1.0, 1.0]


def scripted_run(engine_s: list[float]) -> Run:
    """One run of a turn each; what the engine's first step of a turn takes must not count."""

    def step(seconds: float, **more: float) -> dict[str, Any]:
        return {"step_s": seconds, "loss": 1.0, "disk_read": 5, "disk_written": 6, **more}

    counters = {"bytes_read": 400, "bytes_written": 300, "wait_s": 0.1, "update_s": 0.2, "deviations": 1}
    made = Turns(
        {
            PLAIN: [[step(2.0)] * 5 for _ in engine_s],
            SAME_HEAP: [[step(1.0)] * 5 for _ in engine_s],
            ENGINE: [[step(99.0, **counters), *[step(seconds, **counters)] * 4] for seconds in engine_s],
        }
    )
    memory = {"tiers": {"host": {"planned_peak_pages": 7, "peak_pages": 6}}}
    engine = {"peak_rss_bytes": 10, "planned_step_s": None, "device_units": 0, "units": 1, "memory": memory}
    summaries = {PLAIN: {"peak_rss_bytes": 30}, SAME_HEAP: {"peak_rss_bytes": 20}, ENGINE: engine}
    return Run({PLAIN: [], SAME_HEAP: [], ENGINE: [step(9.0, **counters)]}, made, summaries)


def options() -> argparse.Namespace:
    return arguments(["--turns", "3", "--ram-share", "0.5"])


def test_the_ratio_is_the_median_over_turns_beside_both_heaps(monkeypatch: pytest.MonkeyPatch) -> None:
    run = scripted_run([2.0, 3.0, 4.0])
    record = summarize(options(), [run], FLOOR)
    assert record["ratio"][PLAIN] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert record["ratio"][SAME_HEAP]["median"] == 3.0
    assert (record["pairs"], record["deviations"], record["read_bytes"]) == (3, 16, 400)
    assert (record["floor"]["compute_s"], record["floor"]["disk_s"]) == (2.0, 400 / 2e9 + 300 / 1e9)
    plain, same_heap = csv_rows(record)
    assert (plain["ratio_of"], same_heap["ratio_of"]) == (OVER_PLAIN, OVER_SAME_HEAP)
    assert (plain["peak_rss_bytes"], plain["other_peak_rss_bytes"], same_heap["other_peak_rss_bytes"]) == (10, 30, 20)
    assert (plain["pairs"], plain["steps_per_turn"], plain["ram_share"], plain["step_s"]) == (3, 5, 0.5, 3.0)
    assert set(plain) <= set(Row.__dataclass_fields__)
    shown = dict(table(record))
    assert shown[f"{OVER_PLAIN}, 95 %"] == "1.500 (1.000-2.000)"
    assert shown["host pages: planned, measured"] == "7, 6"


def test_losses_are_compared_in_every_step() -> None:
    run = scripted_run([2.0])
    run.warm_up[PLAIN].append({"loss": 1.0})
    run.warm_up[SAME_HEAP].append({"loss": 1.0})
    assert run.losses_equal(options())
    run.turns.steps[ENGINE][0][3]["loss"] = 1.5
    assert not run.losses_equal(options())


def test_flops_are_those_of_the_products() -> None:
    d_model, n_layer = SIZES["27m"]
    products = n_layer * 12 * d_model**2 + common.VOCAB * d_model
    assert step_flops("27m", 1, 256) >= 6 * products * 256
    assert step_flops("27m", 1, 256) < 1.2 * 6 * products * 256


@pytest.mark.parametrize(
    "kind", [pytest.param(PLAIN, marks=pytest.mark.long), pytest.param(SAME_HEAP, marks=pytest.mark.long), ENGINE]
)
def test_a_measured_process_steps_and_ends(kind: str, tmp_path) -> None:
    given = ["--ram-share", 2.0, "--batch", 1, "--seq", 16, "--threads", 1, "--dir", tmp_path]
    process = subjects.Process(kind, given)
    answer = process.step()
    summary = process.end()
    assert 8.5 < answer["loss"] < 9.5, "ln 8192 is 9.01"
    assert answer["step_s"] > 0
    assert summary["peak_rss_bytes"] > 27_000_000 * 12
    assert ("memory" in summary) == (kind == ENGINE)
