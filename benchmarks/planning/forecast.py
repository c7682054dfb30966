"""What `offload plan` says against what a run does: peaks of each tier, memory of the process, step time.

    python -m benchmarks.planning.forecast --sizes 27m 112m 357m
    python -m benchmarks.planning.forecast --sizes 27m --mode lock-free --ram-shares 0.833 1.2 --ssd-limit 200

For each size and share of RAM: the disk is measured as `offload doctor` measures it, the plan is made by the command in
a process of its own, then the same configuration is trained, and the plan is made once more: where both plans differ,
the machine has changed meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks import common
from benchmarks.common import HYPER, SIZES
from benchmarks.subjects import ENGINE, WARM_UP, Process
from offload.machine.bench_ssd import check_target, measure
from offload.machine.facts import PROBE

#: What a forecast may be off by: pages, memory of the process, step time.
BARS: Final = {"host": 0.02, "ssd": 0.02, "process": 0.10, "step": 0.10}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["27m", "112m", "357m"])
    parser.add_argument(
        "--ram-shares",
        nargs="+",
        type=float,
        default=[0.25],
        help="memory.ram over 12 bytes a parameter (default: 0.25)",
    )
    parser.add_argument(
        "--activations",
        metavar="SIZE",
        help="memory.activations, on both sides; the run's heap is then one that joins free blocks",
    )
    parser.add_argument("--mode", choices=["exact", "lock-free"], default="exact", help="update.mode of both")
    parser.add_argument("--max-staleness", type=int, default=4, help="update.max_staleness of both")
    parser.add_argument("--ssd-limit", type=float, metavar="MB_PER_S", help="ssd.limit_mb_per_s of both")
    return common.step_arguments(parser, steps=9)


def update_of(a: argparse.Namespace) -> dict[str, Any]:
    """The section of both sides; in lock-free mode no step is exact."""
    if a.mode == "exact":
        return {"mode": "exact"}
    return {"mode": a.mode, "exact_steps": 0, "max_staleness": a.max_staleness}


def plan_of(a: argparse.Namespace, size: str, share: float, disk: tuple[float, float]) -> dict[str, Any]:
    """What the command says."""
    d_model, n_layer = SIZES[size]
    config = {
        "memory": {"ram": int(share * 12 * common.n_parameters(d_model, n_layer, a.seq)), "activations": a.activations},
        "ssd": {"paths": [f"{a.dir}/pages"], "limit_mb_per_s": a.ssd_limit},
        "update": update_of(a),
        "model": {
            "factory": "benchmarks.common:GPT",
            "arguments": {"d_model": d_model, "n_layer": n_layer, "seq": a.seq},
        },
        "optimizer": {
            "name": "adamw",
            "lr": HYPER["lr"],
            "betas": HYPER["betas"],
            "weight_decay": HYPER["weight_decay"],
        },
        "train": {"steps": 1, "batch": a.batch, "seq": a.seq, "threads": a.threads},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        file.write_text(json.dumps(config))
        command = [sys.executable, "-m", "offload.cli", "plan", str(file), "--json"]
        rates = ["--ssd-read", str(disk[0] / 1e6), "--ssd-write", str(disk[1] / 1e6)]
        done = subprocess.run([*command, *rates], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_of(a: argparse.Namespace, size: str, share: float) -> dict[str, Any]:
    """What a run does."""
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    options = [
        "--size",
        size,
        "--ram-share",
        share,
        "--batch",
        a.batch,
        "--seq",
        a.seq,
        "--threads",
        a.threads,
        "--dir",
        a.dir,
    ]
    if a.activations is not None:
        options += ["--activations", a.activations]
    for name, value in {**update_of(a), "ssd_limit": a.ssd_limit}.items():
        options += [] if value is None else [f"--{name.replace('_', '-')}", value]
    process = Process(ENGINE, options, tcache_disabled=a.activations is not None)
    steps = []
    for number in range(WARM_UP + a.steps):
        steps.append(process.step())
        print(f"{size}, step {number + 1}/{WARM_UP + a.steps}: {steps[-1]['step_s']:.3f} s", file=sys.stderr)
    summary = process.end()
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    timed = steps[WARM_UP:]
    return {
        **summary,
        "step_s": statistics.median(step["step_s"] for step in timed),
        "all_step_s": [step["step_s"] for step in steps],
        "read_bytes": sum(step["bytes_read"] for step in timed) / len(timed),
        "written_bytes": sum(step["bytes_written"] for step in timed) / len(timed),
    }


def compare(a: argparse.Namespace, size: str, share: float) -> dict[str, Any]:
    """One size with one share of RAM."""
    Path(a.dir).mkdir(parents=True, exist_ok=True)
    (point,) = measure(check_target(Path(a.dir), PROBE.file_bytes), PROBE).points
    disk = point.read_gb_per_s * 1e9, point.write_gb_per_s * 1e9
    before = plan_of(a, size, share, disk)
    run = run_of(a, size, share)
    after = plan_of(a, size, share, disk)
    tiers = run["memory"]["tiers"]
    pairs = {
        "host": (before["step"]["host_pages"], tiers["host"]["peak_pages"]),
        "ssd": (before["step"]["ssd_pages"], tiers["ssd"]["peak_pages"]),
        "process": (before["process_bytes"], run["peak_rss_bytes"]),
        "step": (before["step_s"], run["step_s"]),
        "read": (before["read_bytes"], run["read_bytes"]),
        "written": (before["written_bytes"], run["written_bytes"]),
    }
    return {
        "size": size,
        "ram_share": share,
        "disk_bytes_per_s": disk,
        "plan": before,
        "plan_after": after,
        "run": run,
        "forecast_over_measured": {
            what: forecast / measured if measured else None for what, (forecast, measured) in pairs.items()
        },
        "step_s_planned_after": after["step_s"],
    }


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each thing forecast, of each size."""
    config = record["config"]
    return [
        {
            "ratio_of": f"forecast / measured, {what}", "ratio": ratio, "model": found["size"],
            "batch": f"{config['batch']}x{config['seq']}", "ram_share": found["ram_share"],
            "threads": config["threads"], "step_s": found["plan"]["step_s"], "other_step_s": found["run"]["step_s"],
            "peak_rss_bytes": found["plan"]["process_bytes"], "other_peak_rss_bytes": found["run"]["peak_rss_bytes"],
            "read_bytes_per_step": round(found["run"]["read_bytes"]),
            "written_bytes_per_step": round(found["run"]["written_bytes"]),
        }
        for found in record["found"]
        for what, ratio in found["forecast_over_measured"].items()
        if ratio is not None
    ]  # fmt: skip


def rows_of(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The table of one size."""
    plan, run, ratio = found["plan"], found["run"], found["forecast_over_measured"]
    tiers = run["memory"]["tiers"]

    def row(what: str, name: str, forecast: str, measured: str) -> tuple[str, str]:
        bar = f", bar {BARS[name]:.0%}" if name in BARS else ""
        return what, f"{forecast} forecast, {measured} measured: {ratio[name]:.3f}{bar}" if ratio[
            name
        ] is not None else f"{forecast}, {measured}"

    return [
        row("host pages", "host", f"{plan['step']['host_pages']}", f"{tiers['host']['peak_pages']}"),
        row("ssd pages", "ssd", f"{plan['step']['ssd_pages']}", f"{tiers['ssd']['peak_pages']}"),
        row(
            "process (VmHWM)",
            "process",
            f"{plan['process_bytes'] / 1e6:,.0f} MB",
            f"{run['peak_rss_bytes'] / 1e6:,.0f} MB",
        ),
        row(
            "step",
            "step",
            f"{plan['step_s']:.3f} s (afterwards {found['step_s_planned_after']:.3f} s)",
            f"{run['step_s']:.3f} s",
        ),
        row("bytes read a step", "read", f"{plan['read_bytes'] / 1e6:,.0f} MB", f"{run['read_bytes'] / 1e6:,.0f} MB"),
        row(
            "bytes written a step",
            "written",
            f"{plan['written_bytes'] / 1e6:,.0f} MB",
            f"{run['written_bytes'] / 1e6:,.0f} MB",
        ),
    ]


def main() -> None:
    """Compare and print."""
    a = arguments()
    found = [compare(a, size, share) for size in a.sizes for share in a.ram_shares]
    record = {
        "benchmark": "forecast",
        "config": common.config_of(a),
        "surroundings": common.surroundings(),
        "found": found,
    }
    common.save(a, record, csv_rows(record))
    for entry in found:
        last = entry is found[-1]
        common.show(
            f"{entry['size']}, RAM for states {entry['ram_share']:g} of them",
            rows_of(entry),
            record,
            as_json=a.json and last,
        )


if __name__ == "__main__":
    main()
