"""Lock-free against exact updates on a slow disk: seconds a step. Part of `benchmarks.lockfree`.

The disk is slowed until reading and writing the optimizer states once, 16 bytes a parameter, takes a multiple of what a
step computes. Engines take turns, each in a process of its own, in blocks of steps: lock-free updates, the same with
updates off, and exact updates with two budgets. A block begins with steps that are not timed, which bring the updates
into their steady state, and ends by making all updates, so that nothing runs while another engine is timed. Exact mode,
whose steps wait for the disk and differ little, is timed in one block between blocks of the others.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from benchmarks.common import Spread
from benchmarks.lockfree.child import Job, start
from benchmarks.subjects import Pipe

STATE_BYTES: Final = 16
PAGE: Final = "256KiB"


@dataclass(frozen=True)
class SpeedPlan:
    """How much is measured.

    Attributes:
        ratios: seconds of the disk for each second of compute.
        blocks: engines in the order of their blocks. same_ram_at: ratios at which exact mode is timed with lock-free's
            RAM, too.
        leads, timed: steps of a block by engine, before and in the measurement.
    """

    model: Mapping[str, int]
    ratios: Sequence[float]
    blocks: Sequence[str]
    same_ram_at: Sequence[float]
    leads: Mapping[str, int]
    timed: Mapping[str, int]
    ram_per_parameter: Mapping[str, float]


#: 25.6 million parameters. 10 bytes a parameter hold parameters, gradients on their way and the updater's windows; 5
#: hold the parameters in exact mode, whose gradients do not wait.
FULL: Final = SpeedPlan(
    model={"d_model": 512, "n_layer": 8, "n_head": 8, "seq": 256, "batch": 4},
    ratios=(1, 2, 3, 4),
    blocks=("off", "lock-free", "exact", "off", "lock-free", "exact, same RAM", "off", "lock-free"),
    same_ram_at=(3, 4.4),
    leads={"off": 1, "lock-free": 5, "exact": 1, "exact, same RAM": 1},
    timed={"off": 4, "lock-free": 6, "exact": 5, "exact, same RAM": 5},
    ram_per_parameter={"off": 10, "lock-free": 10, "exact": 5, "exact, same RAM": 10},
)
QUICK: Final = replace(
    FULL,
    model={"d_model": 256, "n_layer": 4, "n_head": 4, "seq": 128, "batch": 4},
    ratios=(3,),
    blocks=("off", "lock-free", "exact", "exact, same RAM"),
    timed={"off": 3, "lock-free": 4, "exact": 2, "exact, same RAM": 2},
    ram_per_parameter={"off": 14.5, "lock-free": 14.5, "exact": 7, "exact, same RAM": 14.5},
)
TRACED_STEPS: Final = 3


def measure(plan: SpeedPlan, folder: str, threads: int) -> list[dict[str, Any]]:
    """One record for each ratio."""
    base = Job(name="off", dir=folder, **plan.model, mode="off", ram_bytes=1, page=PAGE, threads=threads)
    n = base.n_parameters()
    jobs = {
        kind: replace(base, name=kind.replace(", ", "-").replace(" ", "-"), ram_bytes=int(share * n))
        for kind, share in plan.ram_per_parameter.items()
    }
    off = start(jobs["off"])
    off.ask(f"run {TRACED_STEPS}")
    records = []
    for ratio in plan.ratios:
        compute_s = statistics.median(step["step_s"] for step in off.ask("run 5"))
        limit_mb_per_s = STATE_BYTES * n / (ratio * compute_s) / 1e6
        children = {"off": off}
        kinds = ["lock-free", "exact", *(["exact, same RAM"] if ratio in plan.same_ram_at else [])]
        for kind in kinds:
            mode = "lock-free" if kind == "lock-free" else "exact"
            children[kind] = start(replace(jobs[kind], mode=mode, limit_mb_per_s=limit_mb_per_s))
            children[kind].ask(f"run {TRACED_STEPS}")
            children[kind].ask("drain")
        records.append(_ratio(plan, ratio, compute_s, limit_mb_per_s, children, n))
        for kind in kinds:
            records[-1][kind].update(children[kind].end())
    off.end()
    return records


def _ratio(
    plan: SpeedPlan, ratio: float, compute_s: float, limit_mb_per_s: float, children: Mapping[str, Pipe], n: int
) -> dict[str, Any]:
    """Blocks of all engines in turns at one speed of the disk."""
    steps: dict[str, list[dict[str, float]]] = {kind: [] for kind in children}
    loads = [os.getloadavg()[0]]
    for kind in plan.blocks:
        if kind not in children:
            continue
        children[kind].ask(f"run {plan.leads[kind]}")
        made = children[kind].ask(f"run {plan.timed[kind]}")
        children[kind].ask("drain")
        steps[kind] += made
        loads.append(os.getloadavg()[0])
        print(
            f"disk {ratio:g} x compute, {kind}: {[round(step['step_s'], 2) for step in made]} s, load {loads[-1]:.1f}",
            file=sys.stderr,
        )
    record: dict[str, Any] = {
        "ratio": ratio, "compute_s": compute_s, "limit_mb_per_s": limit_mb_per_s, "parameters": n, "load_1min": loads,
    }  # fmt: skip
    for kind, timed in steps.items():
        record[kind] = _kind(timed, n, plan.ram_per_parameter[kind])
    seconds = {
        "median": {kind: record[kind]["step_s"]["median"] for kind in steps},
        "mean": {kind: record[kind]["mean_s"] for kind in steps},
    }
    for by, step_s in seconds.items():
        record[f"lock-free over off, {by}"] = step_s["lock-free"] / step_s["off"]
        for kind in steps:
            if kind.startswith("exact"):
                record[f"{kind} over lock-free, {by}"] = step_s[kind] / step_s["lock-free"]
    return record


def _kind(steps: Sequence[Mapping[str, float]], n: int, ram_per_parameter: float) -> dict[str, Any]:
    """What one engine's timed steps took and moved."""

    def mean(key: str) -> float:
        return statistics.mean(step[key] for step in steps)

    return {
        "ram_per_parameter": ram_per_parameter,
        "step_s": asdict(Spread.of([step["step_s"] for step in steps])),
        "mean_s": mean("step_s"),
        "read_bytes_per_parameter": mean("bytes_read") / n,
        "written_bytes_per_parameter": mean("bytes_written") / n,
        "wait_s": mean("wait_s"),
        "update_s": mean("update_s"),
        "stale_mean": mean("stale_mean"),
        "stale_max": max(step["stale_max"] for step in steps),
        "steps": list(steps),
    }


def csv_rows(records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for each speed of the disk: lock-free over updates off, exact over lock-free."""
    shared = {"model": f"byte-gpt-{records[0]['parameters'] / 1e6:.1f}m", "threads": config["threads"]}
    shared["batch"] = f"{config['model']['batch']}x{config['model']['seq']}"
    rows = []
    for record in records:
        for ours, other in (("lock-free", "off"), ("exact", "lock-free"), ("exact, same RAM", "lock-free")):
            if ours in record:
                what = (
                    f"step, {ours} / {'updates off' if other == 'off' else other}, disk {record['ratio']:g} x compute"
                )
                seconds = {
                    key: record[kind]["step_s"]["median"] for key, kind in (("step_s", ours), ("other_step_s", other))
                }
                rows.append({"ratio_of": what, "ratio": record[f"{ours} over {other}, median"], **seconds, **shared})
    return rows


def rows_of(records: Sequence[Mapping[str, Any]], tokens_a_step: int) -> list[tuple[str, str]]:
    """The table."""
    rows = []
    for record in records:
        ours = record["lock-free"]
        what = f"disk {record['ratio']:g} x compute: lock-free step over updates off"
        over_off = {by: f"{record[f'lock-free over off, {by}']:.3f} of {by}s" for by in ("median", "mean")}
        rows.append((what, ", ".join(over_off.values())))
        for kind in ("exact", "exact, same RAM"):
            if kind in record:
                both = (
                    f"{record[f'{kind} over lock-free, median']:.2f} of medians, "
                    f"{record[f'{kind} over lock-free, mean']:.2f} of means"
                )
                rows.append((f"  {kind} step over lock-free", both))
        rows.append(("  steps missed, mean and most", f"{ours['stale_mean']:.2f}, {ours['stale_max']}"))
        for kind in ("off", "lock-free", "exact", "exact, same RAM"):
            if kind not in record:
                continue
            made = record[kind]
            moved = (
                f"{made['read_bytes_per_parameter']:.1f} + {made['written_bytes_per_parameter']:.1f} B/parameter read "
                "+ written"
            )
            speed = f"{Spread(**made['step_s'])} s, {tokens_a_step / made['mean_s']:,.0f} tokens/s"
            rows.append((f"  {kind}, RAM {made['ram_per_parameter']:g} B/parameter", f"{speed}, {moved}"))
        rows.append(("  load, 1 minute", ", ".join(f"{load:.1f}" for load in record["load_1min"])))
    return rows
