"""Step time of the engine over plain PyTorch's: same model, data and run, in turns, each in a process of its own.

    python -m benchmarks.step --size 27m --ram-share 0.25 --save

Three processes take turns of five steps: the engine as a user gets it by default, plain PyTorch as it is, and plain
PyTorch whose C library keeps freed memory as the engine's does (`memory.heap`). The first step of a turn is not timed,
see `benchmarks.turns`. A ratio is the median over turns of mean step over mean
step, with its bootstrap 95 % interval over turns.

``--ram-share`` is the RAM budget for parameters and states over their bytes (12 a parameter: fp32 and two moments); 1.6
holds everything. The engine traces in its first two steps and plans once more after its sixth; all that is warm-up. The
floor is what the machine needs for a step's products alone and for its bytes alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import common, turns
from benchmarks.common import SIZES, Spread
from benchmarks.floor import Floor
from benchmarks.results_csv import OVER_PLAIN, OVER_SAME_HEAP, OVER_TORCH_OFFLOAD
from benchmarks.subjects import (
    ENGINE,
    OPTIONS,
    PLAIN,
    SAME_HEAP,
    TORCH_OFFLOAD,
    WARM_UP,
    Process,
    model_arguments,
    options_of,
)
from benchmarks.turns import Turns

RATIO_OF: Final = {PLAIN: OVER_PLAIN, SAME_HEAP: OVER_SAME_HEAP, TORCH_OFFLOAD: OVER_TORCH_OFFLOAD}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    model_arguments(parser)
    common.batch_arguments(parser)
    turns.add_arguments(parser, 10)
    parser.add_argument(
        "--runs", type=int, default=1,
        help="sets of new processes, one after another: where their memory lies differs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--torch-offload", action="store_true", help="torch's own CPU offload (FSDP2) takes turns, too")
    common.common_arguments(parser)
    a = parser.parse_args(given)
    turns.check_arguments(parser, a)
    if a.runs < 1:
        parser.error(f"--runs is {a.runs}; at least 1")
    if a.device == "cuda" and a.device_share is None:
        parser.error("--device cuda needs --device-share, what the device holds of the parameters")
    return a


@dataclass(frozen=True)
class Run:
    """What one set of processes answered: steps of the warm-up by kind, turns, summaries by kind."""

    warm_up: dict[str, list[dict[str, Any]]]
    turns: Turns
    summaries: dict[str, dict[str, Any]]

    def steps(self, kind: str) -> list[dict[str, Any]]:
        """Every step, the warm-up's included."""
        return [*self.warm_up[kind], *self.turns.all(kind)]

    def losses_equal(self, a: argparse.Namespace) -> bool | None:
        """Whether engine and plain PyTorch had the same losses, bit for bit, in every step.

        None: not to be expected. On a GPU, plain PyTorch updates units that are not device-resident by other kernels
        than the CPU does, and adds norms up in another order.
        """
        engine = self.summaries[ENGINE]
        if a.device == "cuda" and (a.clip_norm or engine["device_units"] < engine["units"]):
            return None
        plain, same_heap, ours = ([step["loss"] for step in self.steps(k)] for k in (PLAIN, SAME_HEAP, ENGINE))
        return plain == same_heap == ours


def take_turns(a: argparse.Namespace, run: int) -> Run:
    """New processes that step in turns."""
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    kinds = [PLAIN, SAME_HEAP, ENGINE, *([TORCH_OFFLOAD] if a.torch_offload else [])]
    options = options_of(a, OPTIONS)
    processes = {kind: Process(kind, options) for kind in kinds}
    warm_up = {kind: [process.step() for _ in range(WARM_UP)] for kind, process in processes.items()}
    made = turns.take(processes, a.turns, a.turn, f"run {run + 1}/{a.runs}, ")
    summaries = {kind: process.end() for kind, process in processes.items()}
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    return Run(warm_up, made, summaries)


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """All runs; returns the record: ratios and times over all their turns, highest peaks, tiers of the last run."""
    floor = Floor.of(a.size, a.batch, a.seq, a.device, Path(a.dir))
    return summarize(a, [take_turns(a, run) for run in range(a.runs)], floor)


def summarize(a: argparse.Namespace, runs: Sequence[Run], floor: Floor) -> dict[str, Any]:
    """The record."""
    kinds = list(runs[0].summaries)
    summaries = [run.summaries for run in runs]
    ours = [step for run in runs for step in run.turns.timed(ENGINE)]
    per_step = {key: statistics.mean(step[key] for step in ours) for key in ours[0]}

    def highest(key: str) -> dict[str, int | None]:
        return {kind: max((s[kind][key] for s in summaries if key in s[kind]), default=None) for kind in kinds}

    return {
        "benchmark": "step",
        "config": common.config_of(a),
        "surroundings": common.surroundings(),
        "parameters": common.n_parameters(*SIZES[a.size], a.seq),
        "pairs": len(runs) * a.turns,
        "ratio": {
            kind: dataclasses.asdict(
                Spread.bootstrap([ratio for run in runs for ratio in run.turns.ratios(ENGINE, kind)])
            )
            for kind in kinds
            if kind != ENGINE
        },
        "ratio_of_each_run": [statistics.median(run.turns.ratios(ENGINE, PLAIN)) for run in runs],
        "step_s": {
            kind: dataclasses.asdict(Spread.of([step["step_s"] for run in runs for step in run.turns.timed(kind)]))
            for kind in kinds
        },
        "peak_rss_bytes": highest("peak_rss_bytes"),
        "device_peak_bytes": highest("device_peak_bytes"),
        "read_bytes": per_step["bytes_read"],
        "written_bytes": per_step["bytes_written"],
        "disk_read_bytes": per_step["disk_read"],
        "disk_written_bytes": per_step["disk_written"],
        "waiting_s": per_step["wait_s"],
        "update_s": per_step["update_s"],
        "planned_step_s": summaries[-1][ENGINE]["planned_step_s"],
        "floor": dataclasses.asdict(floor)
        | {
            "compute_s": floor.compute_s,
            "disk_s": floor.disk_s(per_step["bytes_read"], per_step["bytes_written"]),
        },
        "device_units": max(summary[ENGINE]["device_units"] for summary in summaries),
        "deviations": sum(step["deviations"] for run in runs for step in run.steps(ENGINE)),
        "losses_equal": None if runs[0].losses_equal(a) is None else all(run.losses_equal(a) for run in runs),
        "memory": summaries[-1][ENGINE]["memory"],
        "all_turns": [run.turns.steps for run in runs],
    }


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each ratio."""
    config, seconds, peaks = record["config"], record["step_s"], record["peak_rss_bytes"]
    return [
        common.ratio_row(
            RATIO_OF[kind], Spread(**ratio), model=config["size"], batch=f"{config['batch']}x{config['seq']}",
            ram_share=config["ram_share"], threads=config["threads"], pairs=record["pairs"],
            steps_per_turn=config["turn"], step_s=seconds[ENGINE]["median"], other_step_s=seconds[kind]["median"],
            peak_rss_bytes=peaks[ENGINE], other_peak_rss_bytes=peaks[kind],
            read_bytes_per_step=round(record["read_bytes"]), written_bytes_per_step=round(record["written_bytes"]),
        )
        for kind, ratio in record["ratio"].items()
    ]  # fmt: skip


def table(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The result for people."""
    seconds = {kind: Spread(**spread) for kind, spread in record["step_s"].items()}
    n, floor = record["parameters"], record["floor"]
    rest_s = seconds[ENGINE].median - record["waiting_s"] - record["update_s"]
    runs = record["ratio_of_each_run"]
    equal = {None: "not compared: other kernels"}.get(record["losses_equal"], str(record["losses_equal"]))
    rows = [("parameters", f"{n:,}")]
    rows += [(f"{RATIO_OF[kind]}, 95 %", str(Spread(**ratio))) for kind, ratio in record["ratio"].items()]
    if len(runs) > 1:
        rows.append(("  of each run", ", ".join(f"{median:.3f}" for median in runs)))
    rows += [(f"{kind}, s a step", str(spread)) for kind, spread in seconds.items()]
    rows += [
        ("  engine waiting for reads", f"{record['waiting_s']:.3f}"),
        ("  engine updates", f"{record['update_s']:.3f}"),
        ("  engine compute and everything else", f"{rest_s:.3f}"),
        ("  engine as the plan forecast it", f"{record['planned_step_s'] or 0:.3f}"),
        ("floor, products", f"{floor['compute_s']:.3f} s: {floor['flops'] / 1e9:,.0f} GFLOP"),
        ("  at the best rate", f"{floor['flops_per_s'] / 1e9:,.0f} GFLOP/s"),
        ("floor, bytes", f"{floor['disk_s']:.3f} s"),
        ("  MB a step", _moved(record["read_bytes"] / 1e6, record["written_bytes"] / 1e6)),
        ("  at the disk's rates", f"{_moved(floor['read_bytes_per_s'] / 1e9, floor['write_bytes_per_s'] / 1e9)} GB/s"),
        ("SSD bytes a parameter and step", _moved(record["read_bytes"] / n, record["written_bytes"] / n)),
        ("  as the block device counts", _moved(record["disk_read_bytes"] / n, record["disk_written_bytes"] / n)),
        ("losses equal, bit for bit", equal),
    ]  # fmt: skip
    for what, key in (("peak RSS", "peak_rss_bytes"), ("peak of device memory", "device_peak_bytes")):
        rows += [(f"{what}, {k}", f"{v / 1e6:,.0f} MB") for k, v in record[key].items() if v is not None]
    if record["device_units"]:
        rows.append(("units updated on the device", str(record["device_units"])))
    for name, tier in record["memory"]["tiers"].items():
        rows.append((f"{name} pages: planned, measured", f"{tier['planned_peak_pages']}, {tier['peak_pages']}"))
    return rows


def _moved(read: float, written: float) -> str:
    return f"{read:.2f} read, {written:.2f} written"


def main() -> None:
    """Measure and print."""
    a = arguments()
    torch.set_num_threads(a.threads)
    record = measure(a)
    common.save(a, record, csv_rows(record))
    title = f"{a.size}, batch {a.batch} x {a.seq}, RAM for states {a.ram_share:g} of them"
    title += f", {a.activations} of activations" if a.activations else ""
    title += "" if a.device_share is None else f", device for parameters {a.device_share:g} of them"
    common.show(title, table(record), {k: v for k, v in record.items() if k != "all_turns"}, as_json=a.json)


if __name__ == "__main__":
    main()
