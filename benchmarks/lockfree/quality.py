"""Lock-free against exact updates on a slow disk: what a small GPT has learnt after as many steps. Part of
`benchmarks.lockfree`.

Runs with the same seed start from the same values and see the same batches. Two runs go on at a time, each with one
compute thread; the disk's speed is a multiple of a step's compute as measured in the same way. What exact mode learns
does not depend on the disk: it is trained without a limit, and a few steps with the limit say how long it would take.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

from benchmarks.lockfree.child import Job, start
from offload.config import UpdateConfig

WORKERS: Final = 2
PAGE: Final = "64KiB"
#: Parameters and gradients stay in RAM, and none of the states do.
RAM_PER_PARAMETER: Final = 13.5
#: Exact mode with the states on the disk, to see how long its steps take.
EXACT_RAM_PER_PARAMETER: Final = 6
#: Enough for everything: exact mode that does not touch the disk.
ALL_RAM_PER_PARAMETER: Final = 40
#: Near the best for exact mode (1e-3 ends higher), and a quarter of it.
BEST_LR: Final = 2e-3
LOW_LR: Final = 5e-4


@dataclass(frozen=True)
class QualityPlan:
    """How much is measured.

    Attributes:
        points: disk ratio, ``max_staleness`` and highest learning rate; exact mode is trained with each of the latter.
        validation: batches, and rows of each.
    """

    model: Mapping[str, int]
    steps: int
    seeds: Sequence[int]
    points: Sequence[tuple[float, int, float]]
    validation: tuple[int, int]


FULL: Final = QualityPlan(
    model={"d_model": 128, "n_layer": 4, "n_head": 4, "seq": 128, "batch": 4},
    steps=1200,
    seeds=(1, 2, 3),
    points=(
        *((ratio, bound, BEST_LR) for ratio in (1, 2, 4) for bound in (1, 2, 4, 8)),
        (3, 4, BEST_LR),
        (3, 4, LOW_LR),
    ),
    validation=(128, 8),
)
QUICK: Final = replace(FULL, steps=150, seeds=(1,), points=((3, 4, BEST_LR),), validation=(16, 8))


def measure(plan: QualityPlan, folder: str) -> dict[str, Any]:
    """Train every point with every seed, and exact mode with every seed."""
    base = Job(
        name="quality", dir=folder, **plan.model, mode="exact", ram_bytes=1, page=PAGE, threads=1,
        steps=plan.steps, warmup_steps=plan.steps // 10,
    )  # fmt: skip
    n = base.n_parameters()
    base = replace(base, ram_bytes=int(RAM_PER_PARAMETER * n))
    calibration = _calibrate(base)
    lrs = sorted({lr for _, _, lr in plan.points})
    jobs = [
        replace(base, name=f"exact-{lr:g}-{seed}", lr=lr, seed=seed, ram_bytes=ALL_RAM_PER_PARAMETER * n)
        for lr in lrs
        for seed in plan.seeds
    ]
    ratios: list[float] = [0.0] * len(jobs)
    for ratio, bound, lr in plan.points:
        limit_mb_per_s = calibration["round_bytes"] / (ratio * calibration["compute_s"]) / 1e6
        for seed in plan.seeds:
            jobs.append(
                replace(
                    base,
                    name=f"lockfree-{ratio:g}-{bound}-{lr:g}-{seed}",
                    mode="lock-free",
                    seed=seed,
                    lr=lr,
                    max_staleness=bound,
                    exact_steps=UpdateConfig().exact_steps,
                    limit_mb_per_s=limit_mb_per_s,
                )
            )
            ratios.append(ratio)
    with ThreadPoolExecutor(WORKERS) as pool:
        runs = list(pool.map(lambda job, ratio: _train(job, ratio, plan, calibration), jobs, ratios))
    exact_s = {}
    for ratio in sorted({ratio for ratio, _, _ in plan.points}):
        limit_mb_per_s = calibration["round_bytes"] / (ratio * calibration["compute_s"]) / 1e6
        exact_s[f"{ratio:g}"] = _exact_step_s(
            replace(base, name="exact-limited", ram_bytes=EXACT_RAM_PER_PARAMETER * n, limit_mb_per_s=limit_mb_per_s)
        )
    return {"parameters": n, "calibration": calibration, "exact_step_s": exact_s, "runs": runs}


def _calibrate(base: Job) -> dict[str, float]:
    """Seconds of a step with updates off, two runs side by side, and the bytes of one round of all updates."""

    def off(number: int) -> list[float]:
        child = start(replace(base, name=f"off-{number}", mode="off"))
        child.ask("run 4")
        steps = [step["step_s"] for step in child.ask("run 40")]
        child.end()
        return steps

    with ThreadPoolExecutor(WORKERS) as pool:
        compute_s = statistics.median(s for steps in pool.map(off, range(WORKERS)) for s in steps)
    child = start(replace(base, name="round", mode="lock-free", max_staleness=0))
    child.ask("run 4")
    moved = [step["bytes_read"] + step["bytes_written"] for step in child.ask("run 8")]
    child.end()
    return {"compute_s": compute_s, "round_bytes": statistics.median(moved)}


def _exact_step_s(job: Job) -> float:
    """Median seconds of a step of exact mode with the disk's limit, alone."""
    child = start(job)
    child.ask("run 4")
    step_s = float(statistics.median(step["step_s"] for step in child.ask("run 7")))
    child.end()
    return step_s


def _train(job: Job, ratio: float, plan: QualityPlan, calibration: Mapping[str, float]) -> dict[str, Any]:
    """One whole run."""
    child = start(job)
    steps = child.ask(f"run {plan.steps}")
    bits = child.ask(f"validate {plan.validation[0]} {plan.validation[1]}")
    child.end()
    later = steps[max(plan.steps // 10, job.exact_steps) :]
    step_s = statistics.median(step["step_s"] for step in later)
    moved = statistics.mean(step["bytes_read"] + step["bytes_written"] for step in later)
    record = {
        "mode": job.mode,
        "ratio": ratio,
        "max_staleness": job.max_staleness,
        "lr": job.lr,
        "seed": job.seed,
        "limit_mb_per_s": job.limit_mb_per_s,
        "validation_bits": statistics.mean(bits),
        "validation_batches": bits,
        "step_s": step_s,
        "mean_step_s": statistics.mean(step["step_s"] for step in later),
        "steps_per_round": calibration["round_bytes"] / moved if moved else None,
        "stale_mean": statistics.mean(step["stale_mean"] for step in later),
        "stale_max": max(step["stale_max"] for step in steps),
        "wait_s": statistics.mean(step["wait_s"] for step in later),
        "load_1min": os.getloadavg()[0],
        "losses": [round(step["loss"], 4) for step in steps],
        "step_times_s": [round(step["step_s"], 3) for step in steps],
    }
    stale = f"missed {record['stale_mean']:.2f}, at most {record['stale_max']}"
    print(f"{job.name}: {record['validation_bits']:.4f} bits/byte, {step_s:.3f} s a step, {stale}", file=sys.stderr)
    return record


def against_exact(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each point's loss over that of exact mode with the same seed, by point."""
    exact = {(run["lr"], run["seed"]): run for run in runs if run["mode"] == "exact"}
    points = sorted({(-run["lr"], run["ratio"], run["max_staleness"]) for run in runs if run["mode"] != "exact"})
    found = []
    for minus_lr, ratio, bound in points:
        lr = -minus_lr
        ours = [
            run
            for run in runs
            if (run["mode"], run["ratio"], run["max_staleness"], run["lr"]) == ("lock-free", ratio, bound, lr)
        ]
        excess = [run["validation_bits"] / exact[lr, run["seed"]]["validation_bits"] - 1 for run in ours]
        found.append(
            {
                "ratio": ratio,
                "max_staleness": bound,
                "lr": lr,
                "seeds": [run["seed"] for run in ours],
                "validation_bits": statistics.mean(run["validation_bits"] for run in ours),
                "excess": excess,
                "mean_excess": statistics.mean(excess),
                "noise": statistics.mean(_noise(run, exact[lr, run["seed"]]) for run in ours),
                "stale_mean": statistics.mean(run["stale_mean"] for run in ours),
                "stale_max": max(run["stale_max"] for run in ours),
                "step_s": statistics.median(run["step_s"] for run in ours),
                "mean_step_s": statistics.mean(run["mean_step_s"] for run in ours),
                "steps_per_round": statistics.mean(run["steps_per_round"] for run in ours),
            }
        )
    return found


def csv_rows(record: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each point; the interval is the range over seeds."""
    shared = {"model": f"byte-gpt-{record['parameters'] / 1e6:.1f}m", "threads": config["threads"]}
    shared["batch"] = f"{config['model']['batch']}x{config['model']['seq']}"
    return [
        {
            "ratio_of": f"validation loss, lock-free (mean, range of seeds) / exact, disk {point['ratio']:g} x compute,"
            f" max_staleness {point['max_staleness']}, lr {point['lr']:g}",
            "ratio": 1 + point["mean_excess"], "ratio_low": 1 + min(point["excess"]),
            "ratio_high": 1 + max(point["excess"]), "pairs": len(point["seeds"]), "step_s": point["step_s"],
            "other_step_s": record["exact_step_s"][f"{point['ratio']:g}"], **shared,
        }
        for point in against_exact(record["runs"])
    ]  # fmt: skip


def _noise(ours: Mapping[str, Any], exact: Mapping[str, Any]) -> float:
    """Standard error of the difference of two runs over the same validation batches, over exact mode's loss."""
    differences = [a - b for a, b in zip(ours["validation_batches"], exact["validation_batches"], strict=True)]
    return float(statistics.stdev(differences) / len(differences) ** 0.5 / exact["validation_bits"])


def rows_of(record: Mapping[str, Any], tokens_a_step: int) -> list[tuple[str, str]]:
    """The table."""
    rows = []
    for lr in sorted({run["lr"] for run in record["runs"]}, reverse=True):
        exact = [run["validation_bits"] for run in record["runs"] if run["mode"] == "exact" and run["lr"] == lr]
        rows.append(
            (
                f"exact, lr {lr:g}, bits a byte",
                f"{statistics.mean(exact):.4f} ({min(exact):.4f}-{max(exact):.4f}), mean of {len(exact)}",
            )
        )
    for ratio, step_s in record["exact_step_s"].items():
        ram = f"{EXACT_RAM_PER_PARAMETER} bytes of RAM a parameter"
        rows.append(
            (f"disk {ratio} x compute, exact, {ram}", f"{step_s:.3f} s a step, {tokens_a_step / step_s:,.0f} tokens/s")
        )
    for point in against_exact(record["runs"]):
        seeds = ", ".join(f"{share * 100:+.2f}" for share in point["excess"])
        stale = f"missed {point['stale_mean']:.2f}, at most {point['stale_max']}"
        speed = f"{point['mean_step_s']:.3f} s a step, {tokens_a_step / point['mean_step_s']:,.0f} tokens/s"
        value = f"{point['validation_bits']:.4f}, {point['mean_excess'] * 100:+.2f} % ({seeds}); {stale}; {speed}"
        rows.append(
            (f"disk {point['ratio']:g} x compute, max_staleness {point['max_staleness']}, lr {point['lr']:g}", value)
        )
    return rows
