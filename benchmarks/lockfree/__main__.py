"""What lock-free updates gain on a slow disk, and what they cost in quality: ``python -m benchmarks.lockfree
[--quick]``.

Speed: a step against the same step with updates off, and against exact mode with the states on the same disk. Quality:
validation loss after as many steps as exact mode, by disk and ``update.max_staleness``. Both train a byte-level GPT on
the Python standard library's source. The two parts, and ratios, seeds and bounds, can be measured in several runs, each
adding to the file of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.lockfree import quality as lockfree_quality
from benchmarks.lockfree import speed as lockfree_speed
from examples.byte_gpt import python_source_text
from offload.config import UpdateConfig

SMOOTHED_STEPS = 20


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="+", choices=["speed", "quality"], default=["speed", "quality"])
    parser.add_argument("--quick", action="store_true", help="small models, one ratio, one seed: does it run?")
    parser.add_argument("--ratios", nargs="+", type=float, help="speed: seconds of the disk for each second of compute")
    parser.add_argument("--seeds", nargs="+", type=int, help="quality: seeds")
    parser.add_argument(
        "--points", nargs="+", metavar="RATIO:BOUND:LR", help="quality: disk, max_staleness, highest learning rate"
    )
    parser.add_argument("--threads", type=int, default=2, help="speed: compute threads (default: %(default)s)")
    parser.add_argument("--add", action="store_true", help="keep what --record FILE has and this run does not measure")
    parser.add_argument("--picture", metavar="FILE", help="draw the quality part")
    parser.add_argument("--draw-only", action="store_true", help="measure nothing; table and picture of --record FILE")
    common.common_arguments(parser)
    chosen = parser.parse_args()
    if (chosen.add or chosen.draw_only) and not chosen.record:
        parser.error("--add and --draw-only need --record FILE")
    return chosen


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """The parts that are asked for."""
    shutil.rmtree(a.dir, ignore_errors=True)
    python_source_text(f"{a.dir}/text")  # Written once, before processes that would write it at the same time.
    record: dict[str, Any] = {
        "benchmark": "lockfree",
        "surroundings": common.surroundings(),
        "default_max_staleness": UpdateConfig().max_staleness,
    }
    if "speed" in a.parts:
        speed = lockfree_speed.QUICK if a.quick else lockfree_speed.FULL
        speed = replace(speed, ratios=a.ratios or speed.ratios)
        record["speed_config"] = {**vars(speed), "page": lockfree_speed.PAGE, "threads": a.threads}
        record["speed"] = lockfree_speed.measure(speed, a.dir, a.threads)
    if "quality" in a.parts:
        quality = lockfree_quality.QUICK if a.quick else lockfree_quality.FULL
        points = [_point(text) for text in a.points] if a.points else quality.points
        quality = replace(quality, seeds=a.seeds or quality.seeds, points=points)
        settings = {
            "ram_per_parameter": lockfree_quality.RAM_PER_PARAMETER,
            "exact_ram_per_parameter": lockfree_quality.EXACT_RAM_PER_PARAMETER,
            "page": lockfree_quality.PAGE,
            "threads": 1,
            "exact_steps": UpdateConfig().exact_steps,
        }
        record["quality_config"] = {**vars(quality), **settings}
        record["quality"] = lockfree_quality.measure(quality, a.dir)
    shutil.rmtree(a.dir, ignore_errors=True)
    return record


def _point(text: str) -> tuple[float, int, float]:
    ratio, bound, lr = text.split(":")
    return float(ratio), int(bound), float(lr)


def joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Two records as one; what both measured is the new one's."""
    record = {**old, **new}
    if "speed" in old and "speed" in new:
        made = {entry["ratio"]: entry for entry in [*old["speed"], *new["speed"]]}
        record["speed"] = [made[ratio] for ratio in sorted(made)]
    if "quality" in old and "quality" in new:
        runs = {
            (r["mode"], r["ratio"], r["max_staleness"], r["lr"], r["seed"]): r
            for r in [*old["quality"]["runs"], *new["quality"]["runs"]]
        }
        exact_step_s = {**old["quality"]["exact_step_s"], **new["quality"]["exact_step_s"]}
        record["quality"] = {**new["quality"], "exact_step_s": exact_step_s, "runs": list(runs.values())}
    return record


# ---- the picture --------------------------------------------------------------------------------------------------


def draw(quality: Mapping[str, Any], config: Mapping[str, Any], default_bound: int, path: str) -> None:
    """Loss against steps and against seconds on one disk, and the final difference by disk and bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = quality["runs"]
    bounds_at: dict[float, set[int]] = {}
    for run in runs:
        if run["mode"] != "exact":
            bounds_at.setdefault(run["ratio"], set()).add(run["max_staleness"])
    shown = max(bounds_at, key=lambda ratio: (len(bounds_at[ratio]), ratio))
    figure, (by_step, by_time, final) = pyplot.subplots(1, 3, figsize=(16, 5), constrained_layout=True)
    lr = max(run["lr"] for run in runs)
    exact = [run for run in runs if run["mode"] == "exact" and run["lr"] == lr]
    exact_step_s = quality["exact_step_s"][f"{shown:g}"]
    curve = _mean_curve(exact)
    by_step.plot(range(SMOOTHED_STEPS, len(curve) + SMOOTHED_STEPS), curve, color="black", linewidth=2.5, label="exact")
    timed_as = f"exact, {config['exact_ram_per_parameter']:g} bytes of RAM a parameter"
    by_time.plot(
        [(k + SMOOTHED_STEPS) * exact_step_s for k in range(len(curve))],
        curve,
        color="black",
        linewidth=2.5,
        label=timed_as,
    )
    bounds = sorted(
        {run["max_staleness"] for run in runs if run["mode"] != "exact" and (run["ratio"], run["lr"]) == (shown, lr)}
    )
    for number, bound in enumerate(bounds):
        ours = [
            run
            for run in runs
            if run["mode"] != "exact" and (run["ratio"], run["max_staleness"], run["lr"]) == (shown, bound, lr)
        ]
        curve, color = _mean_curve(ours), f"C{number}"
        seconds = torch.tensor([run["step_times_s"] for run in ours]).mean(0).cumsum(0)[SMOOTHED_STEPS - 1 :]
        name = f"lock-free, max_staleness {bound}" + (" (default)" if bound == default_bound else "")
        by_step.plot(range(SMOOTHED_STEPS, len(curve) + SMOOTHED_STEPS), curve, color=color, linewidth=1.2, label=name)
        by_time.plot(seconds.tolist(), curve, color=color, linewidth=1.2, label=name)
    by_step.set(xlabel="steps", title=f"Disk {shown:g} x compute: training loss by step")
    by_time.set(xlabel="seconds", title=f"Disk {shown:g} x compute: training loss by time")
    for axes in (by_step, by_time):
        axes.set_ylabel(f"bits a byte, mean of {SMOOTHED_STEPS} steps and of the seeds")
        axes.grid(alpha=0.3)
        axes.legend()
    _draw_final(final, quality, default_bound)
    figure.savefig(path, dpi=110)


def _draw_final(axes: Any, quality: Mapping[str, Any], default_bound: int) -> None:
    """Points of all seeds, and their mean, at each disk and bound."""
    points = lockfree_quality.against_exact(quality["runs"])
    names = [f"{p['ratio']:g} x\n{p['max_staleness']}\n{p['lr']:g}" for p in points]
    for place, point in enumerate(points):
        color = "C3" if point["max_staleness"] == default_bound else "C0"
        shares = [share * 100 for share in point["excess"]]
        axes.scatter([place] * len(shares), shares, color=color, s=18, alpha=0.6)
        axes.hlines(point["mean_excess"] * 100, place - 0.3, place + 0.3, color=color, linewidth=2.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(1, color="grey", linestyle="--", linewidth=1, label="1 %")
    axes.set_xticks(range(len(points)), names)
    axes.set_title("Final validation loss: seeds, and their mean")
    axes.set(
        xlabel="disk over compute; max_staleness (default in red); learning rate",
        ylabel="% above exact, same seed and steps",
    )
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="lower right")


def _mean_curve(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Training loss in bits a byte, mean of the runs and of the steps before each."""
    losses = torch.tensor([run["losses"] for run in runs]).mean(0) / torch.log(torch.tensor(2.0))
    return [float(window.mean()) for window in losses.unfold(0, SMOOTHED_STEPS, 1)]


# ---- the whole ----------------------------------------------------------------------------------------------------


def rows_of(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table."""
    rows = []
    for part, rows_of_part in (("speed", lockfree_speed.rows_of), ("quality", lockfree_quality.rows_of)):
        if part in record:
            model = record[f"{part}_config"]["model"]
            rows += rows_of_part(record[part], model["batch"] * model["seq"])
    return rows


def summary_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without the single steps."""
    brief = {key: value for key, value in record.items() if key not in ("speed", "quality")}
    if "speed" in record:
        brief["speed"] = [{key: _without_steps(value) for key, value in entry.items()} for entry in record["speed"]]
    if "quality" in record:
        brief["quality"] = lockfree_quality.against_exact(record["quality"]["runs"])
    return brief


def _without_steps(value: Any) -> Any:
    return {key: kept for key, kept in value.items() if key != "steps"} if isinstance(value, dict) else value


def csv_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the parts that the record has."""
    rows = []
    for part, of_part in (("speed", lockfree_speed.csv_rows), ("quality", lockfree_quality.csv_rows)):
        if part in record:
            rows += of_part(record[part], record[f"{part}_config"])
    return rows


def main() -> None:
    """Measure, keep, draw and print."""
    a = arguments()
    record = {} if a.draw_only else measure(a)
    rows = csv_rows(record)
    if a.add or a.draw_only:
        record = joined(json.loads(Path(a.record).read_text()) if os.path.exists(a.record) else {}, record)
    common.save(a, record, rows)
    if a.picture and "quality" in record:
        draw(record["quality"], record["quality_config"], record["default_max_staleness"], a.picture)
    common.show("lock-free updates on a slow disk", rows_of(record), summary_of(record), as_json=a.json)


if __name__ == "__main__":
    main()
