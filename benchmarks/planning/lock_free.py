"""What lock-free updates cost or gain beside exact ones with the same RAM, at one speed of the disk.

    python -m benchmarks.planning.lock_free --size 112m --batch 1 --seq 64 --bytes-each 10.8
    python -m benchmarks.planning.lock_free --size 27m --bytes-each 10 --disk-ratio 3 --kinds off lock-free auto

Engines take turns of steps, each in a process of its own; the first step of a turn is not timed, see
`benchmarks.turns`. ``off`` is lock-free mode whose gradients are dropped: the same step without updates. With
``--disk-ratio`` the disk is slowed until reading and writing all optimizer states once takes so many times what a step
without updates takes.
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
from benchmarks.common import SIZES, Spread
from benchmarks.subjects import ENGINE, WARM_UP, Process
from benchmarks.turns import Turns

STATE_BYTES: Final = 16
OPTIONS: Final[dict[str, list[object]]] = {
    "exact": ["--mode", "exact"],
    "lock-free": ["--mode", "lock-free", "--exact-steps", 0],
    "lock-free, on time": ["--mode", "lock-free", "--exact-steps", 0, "--on-time", "auto"],
    "off": ["--mode", "lock-free", "--exact-steps", 0, "--updates-off"],
    "auto": ["--mode", "auto", "--exact-steps", 0],
}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning.lock_free", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--size", choices=SIZES, default="112m")
    parser.add_argument("--bytes-each", type=float, default=10.8, help="memory.ram, bytes a parameter")
    parser.add_argument("--kinds", nargs="+", choices=OPTIONS, default=["exact", "lock-free"])
    parser.add_argument("--over", choices=OPTIONS, help="what ratios are over (default: the first kind)")
    parser.add_argument("--disk-ratio", type=float, help="seconds of the disk for all states over those of a step")
    parser.add_argument("--max-staleness", type=int, default=4)
    common.batch_arguments(parser)
    turns.add_arguments(parser, 6)
    common.common_arguments(parser)
    a = parser.parse_args(given)
    turns.check_arguments(parser, a)
    a.over = a.over or a.kinds[0]
    return a


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Ratios and seconds a step of each kind."""
    n = common.n_parameters(*SIZES[a.size], a.seq)
    shared: list[object] = ["--size", a.size, "--ram-share", a.bytes_each / 12, "--batch", a.batch, "--seq", a.seq]
    shared += ["--threads", a.threads, "--max-staleness", a.max_staleness]
    limit_mb_per_s = None
    if a.disk_ratio is not None:
        limit_mb_per_s = STATE_BYTES * n / (a.disk_ratio * _step_without_updates_s(a, shared)) / 1e6
        shared += ["--ssd-limit", limit_mb_per_s]
    processes = {}
    for kind in a.kinds:  # One after the other: what one times when it is built, the others would disturb.
        processes[kind] = _process(a, kind, shared)
        for _ in range(WARM_UP):
            processes[kind].step()
    made = turns.take(processes, a.turns, a.turn)
    summaries = {kind: process.end() for kind, process in processes.items()}
    _clean(a)
    return {"parameters": n, "limit_mb_per_s": limit_mb_per_s} | {
        kind: _found(a, made, kind, n) | {key: summaries[kind][key] for key in ("peak_rss_bytes", "updates")}
        for kind in a.kinds
    }


def _process(a: argparse.Namespace, kind: str, shared: Sequence[object]) -> Process:
    folder = f"{a.dir}/{kind.replace(', ', '-').replace(' ', '-')}"
    shutil.rmtree(f"{folder}/pages", ignore_errors=True)
    return Process(ENGINE, [*shared, *OPTIONS[kind], "--dir", folder])


def _clean(a: argparse.Namespace) -> None:
    for kind in OPTIONS:
        shutil.rmtree(f"{a.dir}/{kind.replace(', ', '-').replace(' ', '-')}/pages", ignore_errors=True)


def _step_without_updates_s(a: argparse.Namespace, shared: Sequence[object]) -> float:
    process = _process(a, "off", shared)
    steps: list[float] = [process.step()["step_s"] for _ in range(WARM_UP + turns.LEAST)][WARM_UP:]
    process.end()
    return statistics.median(steps)


def _found(a: argparse.Namespace, made: Turns, kind: str, n: int) -> dict[str, Any]:
    timed = made.timed(kind)

    def mean(key: str) -> float:
        return statistics.mean(float(step[key]) for step in timed)

    return {
        "ratio": dataclasses.asdict(Spread.bootstrap(made.ratios(kind, a.over))),
        "step_s": statistics.median(step["step_s"] for step in timed),
        "cpu_s": statistics.median(step["cpu_s"] for step in timed),
        "thread_s": statistics.median(step["thread_s"] for step in timed),
        "wait_s": mean("wait_s"), "update_s": mean("update_s"),
        "read_bytes_each": mean("bytes_read") / n, "written_bytes_each": mean("bytes_written") / n,
    }  # fmt: skip


def csv_rows(a: argparse.Namespace, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a kind."""
    disk = "" if a.disk_ratio is None else f", disk {a.disk_ratio:g} x compute"
    return [
        common.ratio_row(
            f"step, {kind} / {a.over}, {a.bytes_each:g} B of RAM a parameter{disk}", Spread(**found[kind]["ratio"]),
            model=a.size, batch=f"{a.batch}x{a.seq}", ram_share=a.bytes_each / 12, threads=a.threads, pairs=a.turns,
            steps_per_turn=a.turn, step_s=found[kind]["step_s"], other_step_s=found[a.over]["step_s"],
            peak_rss_bytes=found[kind]["peak_rss_bytes"], other_peak_rss_bytes=found[a.over]["peak_rss_bytes"],
        )
        for kind in a.kinds if kind != a.over
    ]  # fmt: skip


def table(a: argparse.Namespace, found: dict[str, Any]) -> list[tuple[str, str]]:
    """The result for people."""
    rows = []
    if found["limit_mb_per_s"] is not None:
        rows.append(("disk, MB/s", f"{found['limit_mb_per_s']:.0f}"))
    for kind in a.kinds:
        one = found[kind]
        seconds = ", ".join(f"{one[key]:.3f}" for key in ("step_s", "cpu_s", "thread_s")) + " s"
        if kind != a.over:
            rows.append((f"{kind} over {a.over}, 95 %", str(Spread(**one["ratio"]))))
        rows += [
            (f"  {kind}: step, processor, training thread", seconds),
            ("    mode of updates", one["updates"]),
            ("    waits, updates", f"{one['wait_s']:.3f}, {one['update_s']:.3f} s"),
            ("    read, written, bytes a parameter", f"{one['read_bytes_each']:.2f}, {one['written_bytes_each']:.2f}"),
        ]  # fmt: skip
    return rows


def main() -> None:
    """Measure and print."""
    a = arguments()
    torch.set_num_threads(a.threads)
    found = measure(a)
    record = {
        "benchmark": "lock_free", "config": common.config_of(a), "surroundings": common.surroundings(), "found": found,
    }  # fmt: skip
    common.save(a, record, csv_rows(a, found))
    common.show("lock-free beside exact updates", table(a, found), record, as_json=a.json)


if __name__ == "__main__":
    main()
