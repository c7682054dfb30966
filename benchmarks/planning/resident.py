"""What pages cost where nothing moves: steps over plain PyTorch's with a RAM budget that holds everything.

    python -m benchmarks.planning.resident --save

The engine as a user gets it and plain PyTorch with its heap set as the engine's take turns of five steps, each in a
process of its own; the first step of a turn is not timed, see `benchmarks.turns`. Four models: one whose step is long,
the same with few tokens, and two small ones, of few large and of many small parameters. A ratio is the median over
turns, of seconds and of processor time of the training thread: of a step of some milliseconds the latter tells more, as
what else runs is not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
from collections.abc import Sequence
from typing import Any, Final

import torch

from benchmarks import common, turns
from benchmarks.common import Spread
from benchmarks.subjects import ENGINE, SAME_HEAP, WARM_UP, Process
from benchmarks.turns import Turns

#: Model of `common.SIZES`, rows and tokens of its batch.
CASES: Final = {
    "112m": ("112m", 4, 256),
    "112m-few": ("112m", 1, 64),
    "2x512": ("2x512", 1, 64),
    "24x64": ("24x64", 1, 64),
}
SECONDS_RATIO: Final = "step / plain PyTorch, heap as ours"
THREAD_RATIO: Final = "processor time of the training thread / plain PyTorch's"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning.resident", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ram-share", type=float, default=1.6, help="memory.ram over 12 bytes a parameter")
    parser.add_argument("--threads", type=int, default=2)
    turns.add_arguments(parser, 10)
    common.common_arguments(parser)
    a = parser.parse_args(given)
    turns.check_arguments(parser, a)
    return a


def measure(a: argparse.Namespace, case: str) -> dict[str, Any]:
    """One case: both ratios over all turns, seconds and processor time of a step, and whether losses were equal."""
    size, rows, seq = CASES[case]
    options = ["--size", size, "--ram-share", a.ram_share, "--batch", rows, "--seq", seq]
    options += ["--threads", a.threads, "--dir", a.dir]
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    processes = {kind: Process(kind, options) for kind in (SAME_HEAP, ENGINE)}
    warm_up = {kind: [process.step() for _ in range(WARM_UP)] for kind, process in processes.items()}
    made = turns.take(processes, a.turns, a.turn, f"{case}, ")
    summaries = {kind: process.end() for kind, process in processes.items()}
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    losses = {kind: [step["loss"] for step in [*warm_up[kind], *made.all(kind)]] for kind in processes}
    return {
        "size": size, "batch": f"{rows}x{seq}",
        SECONDS_RATIO: dataclasses.asdict(Spread.bootstrap(made.ratios(ENGINE, SAME_HEAP))),
        THREAD_RATIO: dataclasses.asdict(Spread.bootstrap(_thread_ratios(made))),
        "step_s": {kind: _median(made, kind, "step_s") for kind in processes},
        "thread_s": {kind: _median(made, kind, "thread_s") for kind in processes},
        "peak_rss_bytes": {kind: summary["peak_rss_bytes"] for kind, summary in summaries.items()},
        "moved_bytes": sum(step["bytes_read"] + step["bytes_written"] for step in made.timed(ENGINE)),
        "deviations": sum(step["deviations"] for step in made.all(ENGINE)),
        "losses_equal": losses[ENGINE] == losses[SAME_HEAP],
    }  # fmt: skip


def _median(made: Turns, kind: str, key: str) -> float:
    seconds: list[float] = [step[key] for step in made.timed(kind)]
    return statistics.median(seconds)


def _thread_ratios(made: Turns) -> list[float]:
    """Medians of a turn: one step that was interrupted counts little."""
    medians = {
        kind: [statistics.median(step["thread_s"] for step in turn[turns.LEAD :]) for turn in made.steps[kind]]
        for kind in (ENGINE, SAME_HEAP)
    }
    return [ours / plain for ours, plain in zip(medians[ENGINE], medians[SAME_HEAP], strict=True)]


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Two rows a case."""
    config = record["config"]
    return [
        common.ratio_row(
            ratio_of, Spread(**found[ratio_of]), model=found["size"], batch=found["batch"],
            ram_share=config["ram_share"], threads=config["threads"], pairs=config["turns"],
            steps_per_turn=config["turn"], step_s=found[key][ENGINE], other_step_s=found[key][SAME_HEAP],
            peak_rss_bytes=found["peak_rss_bytes"][ENGINE], other_peak_rss_bytes=found["peak_rss_bytes"][SAME_HEAP],
        )
        for found in record["cases"].values()
        for ratio_of, key in ((SECONDS_RATIO, "step_s"), (THREAD_RATIO, "thread_s"))
    ]  # fmt: skip


def table(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The result for people."""
    rows: list[tuple[str, str]] = []
    for case, found in record["cases"].items():
        rows += [(f"{case}, batch {found['batch']}: step, 95 %", str(Spread(**found[SECONDS_RATIO])))]
        for what, key, ratio in (("seconds", "step_s", ""), ("processor time", "thread_s", THREAD_RATIO)):
            ours, plain = found[key][ENGINE] * 1e3, found[key][SAME_HEAP] * 1e3
            spread = f": {Spread(**found[ratio])}" if ratio else ""
            rows.append((f"  {what}, ms, ours and plain", f"{ours:.2f}, {plain:.2f}{spread}"))
        rows.append(("  bytes moved, deviations, losses equal", _unmoved(found)))
    return rows


def _unmoved(found: dict[str, Any]) -> str:
    return f"{found['moved_bytes']}, {found['deviations']}, {found['losses_equal']}"


def main() -> None:
    """Measure and print."""
    a = arguments()
    torch.set_num_threads(a.threads)
    record = {
        "benchmark": "resident",
        "config": common.config_of(a),
        "surroundings": common.surroundings(),
        "cases": {case: measure(a, case) for case in a.cases},
    }
    common.save(a, record, csv_rows(record))
    common.show("everything in RAM, over plain PyTorch with its heap as ours", table(record), record, as_json=a.json)


if __name__ == "__main__":
    main()
