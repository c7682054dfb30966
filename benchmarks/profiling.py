"""What a profile costs the steps it records: steps with and without, in turns, of one engine.

python -m benchmarks.profiling --size 27m --ram-share 0.25
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import common
from benchmarks.common import Spread, batch
from benchmarks.subjects import WARM_UP, Engine, model_arguments

BAR: Final = 0.02


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    model_arguments(parser)
    return common.step_arguments(parser, steps=21)


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Steps of one process in turns; returns the record."""
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    subject = Engine(a)
    steps_s: dict[bool, list[float]] = {False: [], True: []}
    shares: list[float] = []
    calls: list[int] = []
    for number in range(WARM_UP + 2 * a.steps):
        # Which of the two comes first changes from pair to pair.
        profiled = number >= WARM_UP and (number // 2 + number) % 2 == 1
        profile = subject.engine.profile(Path(a.dir) / "profile") if profiled else None
        x, y = batch(number, a.batch, a.seq)
        with profile or nullcontext():
            began_s = time.perf_counter()
            subject.step(x, y)
            took_s = time.perf_counter() - began_s
        if profile is not None:
            shares.append(profile.summary["overhead"]["training_spent_s"] / took_s)
            calls.append(profile.summary["overhead"]["calls"])
        if number >= WARM_UP:
            steps_s[profiled].append(took_s)
        print(
            f"step {number + 1}/{WARM_UP + 2 * a.steps}: {took_s:.3f} s{', profiled' if profiled else ''}",
            file=sys.stderr,
        )
    subject.close()
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    return {
        "benchmark": "profiling",
        "config": common.config_of(a),
        "surroundings": common.surroundings(),
        "ratio": dataclasses.asdict(
            Spread.bootstrap([one / two for one, two in zip(steps_s[True], steps_s[False], strict=True)])
        ),
        "profiled_s": dataclasses.asdict(Spread.of(steps_s[True])),
        "unprofiled_s": dataclasses.asdict(Spread.of(steps_s[False])),
        "own_share": dataclasses.asdict(Spread.of(shares)),
        "calls": dataclasses.asdict(Spread.of(calls)),
        "all_steps_s": {"profiled": steps_s[True], "unprofiled": steps_s[False]},
    }


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row."""
    config = record["config"]
    row = common.ratio_row(
        "step with a profile / without", Spread(**record["ratio"]), model=config["size"],
        batch=f"{config['batch']}x{config['seq']}", ram_share=config["ram_share"], threads=config["threads"],
        pairs=config["steps"], steps_per_turn=1, step_s=record["profiled_s"]["median"],
        other_step_s=record["unprofiled_s"]["median"],
    )  # fmt: skip
    return [row]


def main() -> None:
    """Measure and print."""
    a = arguments()
    record = measure(a)
    common.save(a, record, csv_rows(record))
    rows = [
        ("profiled step over another", f"{Spread(**record['ratio'])}, bar {1 + BAR:.2f}"),
        ("profiled, s a step", str(Spread(**record["profiled_s"]))),
        ("not profiled, s a step", str(Spread(**record["unprofiled_s"]))),
        (
            "time inside the recorder, as it says itself",
            f"{record['own_share']['median']:.2%} of a step, in {record['calls']['median']:.0f} calls",
        ),
    ]
    common.show(f"{a.size}, RAM for states {a.ram_share:g} of them", rows, record, as_json=a.json)


if __name__ == "__main__":
    main()
