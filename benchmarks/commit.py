"""What a commit in the background costs: seconds of the training thread, and bytes written beside the step's own.

    python -m benchmarks.commit --size 112m --ram-share 0.25

One engine trains; every few steps it commits, so that steps under which a commit is made and steps without one follow
each other. The cost of a commit is the time that the steps from its beginning to its end took beyond as many steps
without one, by the median of those before and after. It is held against a minute, the time between two commits, and its
bytes against what was dirty in RAM when it began plus the manifest: pages that are on the disk already are named, not
written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import offload
from benchmarks import common
from benchmarks.common import GPT, SIZES, Spread, batch, fused_adamw
from pagemem.durable.commit_folder import FOLDER_NAME
from pagemem.residency.paged_tensor import Residency
from pagemem.tier import Tag

WARM_UP = 8
BETWEEN_S = 60.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=SIZES, default="112m")
    parser.add_argument("--ram-share", type=float, default=0.25)
    parser.add_argument("--commits", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps without a commit after each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    common.common_arguments(parser)
    return parser.parse_args()


class Subject:
    """The engine that commits."""

    def __init__(self, a: argparse.Namespace) -> None:
        self._a = a
        self._folder = Path(a.dir) / "commit"
        shutil.rmtree(self._folder, ignore_errors=True)
        ram = int(a.ram_share * 12 * common.n_parameters(*SIZES[a.size], a.seq))
        config = {"memory": {"ram": ram}, "ssd": {"paths": [str(self._folder)]}, "commit": {"keep": 1}}
        with offload.deferred_init(config):
            model = GPT(*SIZES[a.size], a.seq)
        self.engine = offload.initialize(model, config, fused_adamw)
        self._number = 0

    @property
    def busy(self) -> bool:
        """Whether a commit is being written."""
        return self.engine.debug.committer.busy

    def step(self) -> dict[str, float]:
        """One step: its seconds and the bytes written meanwhile."""
        x, y = batch(self._number, self._a.batch, self._a.seq)
        self._number += 1
        before, started_s = self.engine.stats().bytes_written, time.perf_counter()
        self.engine.backward(self.engine(x, y))
        self.engine.step()
        return {"step_s": time.perf_counter() - started_s, "written": self.engine.stats().bytes_written - before}

    def commit(self) -> dict[str, float]:
        """Begin a commit: seconds of that alone, bytes written by it, and what was dirty."""
        before, started_s = self.engine.stats().bytes_written, time.perf_counter()
        self.engine.save(wait=False)
        begin_s = time.perf_counter() - started_s
        dirty = sum(
            t.n_bytes for t in self.engine.debug.mover.tensors.values() if t.snapshot_pending and t.tag is not Tag.GRAD
        )
        return {"begin_s": begin_s, "dirty_bytes": dirty, "written": self.engine.stats().bytes_written - before}

    def in_ram(self) -> int:
        """Bytes that no page file has now, gradients apart."""
        changed = (Residency.DIRTY, Residency.STORING)
        return sum(
            t.n_bytes for t in self.engine.debug.mover.tensors.values() if t.state in changed and t.tag is not Tag.GRAD
        )

    def manifest_bytes(self) -> int:
        """The newest commit's files."""
        folder = self._folder / FOLDER_NAME
        return sum((folder / name).stat().st_size for name in os.listdir(folder))

    def close(self) -> None:
        """Close and clear up."""
        self.engine.close()
        shutil.rmtree(self._folder)


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Commits and steps in turns; returns the record."""
    subject = Subject(a)
    for _ in range(WARM_UP):
        subject.step()
    without: list[list[dict[str, float]]] = []
    commits: list[dict[str, Any]] = []
    for number in range(a.commits + 1):
        without.append([subject.step() for _ in range(a.steps)])
        dirty_bytes = subject.in_ram()
        commit: dict[str, Any] = {**subject.commit(), "dirty_bytes": dirty_bytes, "steps": []}
        while subject.busy or not commit["steps"]:
            commit["steps"].append(subject.step())
        commit["manifest_bytes"] = subject.manifest_bytes()
        if number:  # The first one makes the page files grow.
            commits.append(commit)
        print(
            f"commit {number}/{a.commits}: begun in {commit['begin_s']:.3f} s, beside {len(commit['steps'])} steps of",
            *(f"{s['step_s']:.3f}" for s in commit["steps"]),
            "s; without:",
            *(f"{s['step_s']:.3f}" for s in without[-1]),
            file=sys.stderr,
        )
    without = [*without[1:], [subject.step() for _ in range(a.steps)]]
    subject.close()
    return {
        "benchmark": "commit",
        "config": common.config_of(a),
        "parameters": common.n_parameters(*SIZES[a.size], a.seq),
        **_summary(without, commits),
        "surroundings": common.surroundings(),
        "all": {"without": without, "commits": commits},
    }


def _summary(without: list[list[dict[str, float]]], commits: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [step for group in without for step in group]
    written = statistics.median(step["written"] for step in steps)
    stalls, extra = [], []
    for commit, before, after in zip(commits, without[:-1], without[1:], strict=True):
        step_s = statistics.median(step["step_s"] for step in [*before, *after])
        stalls.append(commit["begin_s"] + sum(step["step_s"] - step_s for step in commit["steps"]))
        extra.append(commit["written"] + sum(step["written"] - written for step in commit["steps"]))
    return {
        "step_s": Spread.of([step["step_s"] for step in steps]).__dict__,
        "begin_s": Spread.of([c["begin_s"] for c in commits]).__dict__,
        "stall_s": Spread.of(stalls).__dict__,
        "stall_share_of_a_minute": statistics.median(stalls) / BETWEEN_S,
        "step_written_bytes": written,
        "extra_written_bytes": Spread.of(extra).__dict__,
        "dirty_bytes": Spread.of([float(c["dirty_bytes"]) for c in commits]).__dict__,
        "manifest_bytes": commits[-1]["manifest_bytes"],
    }


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row."""
    config, stall = record["config"], record["stall_s"]
    lost = Spread(*(seconds / BETWEEN_S for seconds in (stall["median"], stall["low"], stall["high"])))
    row = common.ratio_row(
        "lost by a commit (range) / minute between two", lost, model=config["size"], threads=config["threads"],
        batch=f"{config['batch']}x{config['seq']}", ram_share=config["ram_share"], pairs=config["commits"],
        step_s=record["step_s"]["median"], written_bytes_per_step=round(record["step_written_bytes"]),
    )  # fmt: skip
    return [row]


def rows_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The result for people."""
    mb = {
        key: Spread(*(value / 1e6 for value in record[key].values())) for key in ("extra_written_bytes", "dirty_bytes")
    }
    return [
        ("step without a commit, s", str(Spread(**record["step_s"]))),
        ("beginning a commit, s", str(Spread(**record["begin_s"]))),
        ("training thread lost by a commit, s", str(Spread(**record["stall_s"]))),
        ("  share of a minute between commits", f"{record['stall_share_of_a_minute']:.2%}"),
        ("written by a step, MB", f"{record['step_written_bytes'] / 1e6:.1f}"),
        ("written beyond that by a commit, MB", str(mb["extra_written_bytes"])),
        ("dirty in RAM when it began, MB", str(mb["dirty_bytes"])),
        ("manifest, MB", f"{record['manifest_bytes'] / 1e6:.3f}"),
    ]


def main() -> None:
    """Measure and print."""
    a = arguments()
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    record = measure(a)
    common.save(a, record, csv_rows(record))
    title = f"commits of {a.size}, batch {a.batch} x {a.seq}, RAM for states {a.ram_share:g} of them"
    common.show(title, rows_of(record), {k: v for k, v in record.items() if k != "all"}, as_json=a.json)


if __name__ == "__main__":
    main()
