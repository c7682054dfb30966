"""The engine on several ranks of this machine, beside FSDP2 in the same run, and beside itself on one rank.

    python -m benchmarks.ranks --turns 30
    python -m benchmarks.ranks --ram-share 0.25 --turns 30
    python -m benchmarks.ranks --kinds "engine, one rank" engine
    python -m benchmarks.ranks --link-mbit 650 --batch 8

All kinds' processes are there at once, and only one kind steps at a time. A step's time is that of its slowest rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import common, turns
from benchmarks.common import SIZES, Spread
from benchmarks.ranks.slow_link import SlowLink, slow_link
from benchmarks.ranks.subjects import ALONE, ENGINE, FSDP2, FSDP2_KEPT, KINDS, RankGroup
from benchmarks.subjects import WARM_UP
from benchmarks.turns import Turns


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--size", choices=SIZES, default="27m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ram-share", type=float, default=1.6, help="memory.ram of a rank over 12 bytes a parameter")
    parser.add_argument("--degree", default="all", help="parallel.degree")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[ENGINE, FSDP2, FSDP2_KEPT])
    parser.add_argument(
        "--link-mbit", type=float, metavar="MBIT_PER_S", help="of a slow link between two ranks; needs root"
    )
    common.batch_arguments(parser)
    parser.set_defaults(threads=1)
    turns.add_arguments(parser, 10)
    common.common_arguments(parser)
    a = parser.parse_args(given)
    turns.check_arguments(parser, a)
    if a.link_mbit is not None and a.ranks != 2:
        parser.error(f"--ranks is {a.ranks}; a slow link has 2")
    return a


def measure(a: argparse.Namespace, link: SlowLink | None = None) -> dict[str, Any]:
    """Seconds a step of each kind, and the engine's over those of the others."""
    options: list[object] = []
    for name in ("size", "ram_share", "degree", "batch", "seq", "threads", "dir"):
        options += [f"--{name.replace('_', '-')}", getattr(a, name)]
    groups = {kind: RankGroup(kind, 1 if kind == ALONE else a.ranks, options, link) for kind in a.kinds}
    for group in groups.values():
        for _ in range(WARM_UP):
            group.step()
    made = turns.take(groups, a.turns, a.turn)
    ends = {kind: group.end() for kind, group in groups.items()}
    for kind in a.kinds:
        shutil.rmtree(f"{a.dir}/{kind}", ignore_errors=True)
    found: dict[str, Any] = {kind: {**_found(made, kind), **ends[kind]} for kind in a.kinds}
    for kind in a.kinds:
        if ENGINE in a.kinds and kind != ENGINE:
            found[kind]["engine_over"] = dataclasses.asdict(Spread.bootstrap(made.ratios(ENGINE, kind)))
    return found


def _found(made: Turns, kind: str) -> dict[str, Any]:
    steps = made.timed(kind)
    keys = ("cpu_s", "wait_s", "sent_bytes", "comm_s", "bytes_read", "bytes_written")
    means = {key: statistics.mean(step[key] for step in steps) for key in keys if key in steps[0]}
    return {"step_s": statistics.median(made.mean_s(kind)), "loss": steps[-1]["loss"], **means}


def csv_rows(a: argparse.Namespace, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a kind that the engine is measured against."""
    return [
        common.ratio_row(
            f'step, {a.ranks} ranks, degree "{a.degree}" / {kind}', Spread(**found[kind]["engine_over"]), model=a.size,
            batch=f"{a.batch}x{a.seq}", ram_share=a.ram_share, threads=a.threads, pairs=a.turns,
            steps_per_turn=a.turn, step_s=found[ENGINE]["step_s"], other_step_s=found[kind]["step_s"],
            peak_rss_bytes=found[ENGINE]["peak_rss_bytes"], other_peak_rss_bytes=found[kind]["peak_rss_bytes"],
            read_bytes_per_step=found[ENGINE]["bytes_read"], written_bytes_per_step=found[ENGINE]["bytes_written"],
        )
        for kind in a.kinds if "engine_over" in found[kind]
    ]  # fmt: skip


def table(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What is printed."""
    rows = []
    for kind, of in found.items():
        if "engine_over" in of:
            rows.append((f"engine over {kind}, 95 %", str(Spread(**of["engine_over"]))))
        rows.append((f"  {kind}: step, processors of all ranks", f"{of['step_s']:.3f}, {of['cpu_s']:.3f} s"))
        rows.append(("    peak RSS of a rank, last loss", f"{of['peak_rss_bytes'] / 1e6:,.0f} MB, {of['loss']:.5f}"))
        if "sent_bytes" in of:
            moved = f"{of['wait_s']:.3f} s, {of['sent_bytes'] / 1e6:,.0f} MB, {of['comm_s']:.3f} s"
            rows.append(("    waits, sent by all ranks, collectives of all", moved))
    return rows


def main() -> None:
    """Measure and print."""
    a = arguments()
    with ExitStack() as stack:
        link = None
        if a.link_mbit is not None:
            try:
                link = stack.enter_context(slow_link(a.link_mbit))
            except OSError as error:
                print(f"skipped: {error}")
                return
        load = os.getloadavg()[0]
        found = measure(a, link)
    record = {
        "benchmark": "ranks", "config": common.config_of(a), "surroundings": common.surroundings(), "found": found,
        "load": [load, os.getloadavg()[0]],
    }  # fmt: skip
    common.save(a, record, csv_rows(a, found))
    title = f"{a.size}, {a.ranks} ranks, batch {a.batch} x {a.seq} of each, {a.threads} threads"
    title += "" if a.link_mbit is None else f", link of {a.link_mbit:g} Mbit/s"
    common.show(
        title,
        [*table(found), ("load, before and after", "{:.2f}, {:.2f}".format(*record["load"]))],
        record,
        as_json=a.json,
    )


if __name__ == "__main__":
    main()
