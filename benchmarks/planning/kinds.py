"""Steps that are not all alike: how much of what they move is planned, what they wait for, and steps over plain
PyTorch's.

    python -m benchmarks.planning.kinds --save

- ``experts``: a mixture of experts of 112 million parameters (8 layers of 16 experts, two a token, batch 4 x 256), with
  RAM for 30 % of parameters and states. The model names the experts that its gate has chosen (`offload.announce`); an
  expert without tokens is not used, and gets neither gradient nor update, as in plain PyTorch. With a thousand tokens
  nearly all of them are used; ``--batch 1 --seq 16`` has steps that differ.
- ``gan``: two networks of 15 million parameters together, trained in turns, with RAM for 30 %.

The engine as a user gets it and plain PyTorch with its heap set as the engine's take turns of five steps, see
`benchmarks.turns`. *Begun early* is the share of the bytes read whose loads were begun before the op that uses them: by
the plan, or because they were announced. Losses of all steps and the weights in the end are compared bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import common, turns
from benchmarks.common import Spread
from benchmarks.planning.kinds_process import GAN, MIXTURE, KindsProcess
from benchmarks.results_csv import OVER_SAME_HEAP
from benchmarks.subjects import ENGINE, SAME_HEAP
from benchmarks.turns import Turns
from offload.machine.bench_ssd import check_target, measure
from offload.machine.facts import PROBE
from pagemem.units import format_bytes

#: Two kinds of steps are traced and planned after one another, and once more with better times.
WARM_UP: Final = 16
#: Rows and tokens; of the networks, rows.
BATCHES: Final = {MIXTURE: (4, 256), GAN: (256, 1)}
MODELS: Final = {MIXTURE: "experts, 112m", GAN: "gan, 15m"}
EARLY: Final = "bytes read begun before their op / bytes read"
STALLED: Final = "waits for experts / step"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning.kinds", description=" ".join((__doc__ or "").split("\n\n")[0].split())
    )
    parser.add_argument("--cases", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--ram-share", type=float, default=0.3, help="memory.ram over 12 bytes a parameter")
    parser.add_argument("--batch", type=int, help="rows; default: 4, and 256 of the networks")
    parser.add_argument("--seq", type=int, help="tokens of a row (default: 256)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--silent", action="store_true", help="the experts are not announced")
    turns.add_arguments(parser, 10)
    common.common_arguments(parser)
    a = parser.parse_args(given)
    turns.check_arguments(parser, a)
    return a


def measure_case(a: argparse.Namespace, case: str, disk: tuple[float, float]) -> dict[str, Any]:
    """One case: the ratio over turns, the floor, shares, and whether both sides have the same bits.

    Args:
        disk: bytes read and written a second.
    """
    rows, seq = a.batch or BATCHES[case][0], a.seq or BATCHES[case][1]
    options = ["--ram-share", a.ram_share, "--batch", rows, "--seq", seq, "--threads", a.threads, "--dir", a.dir]
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    processes = {
        SAME_HEAP: KindsProcess(SAME_HEAP, case, options),
        ENGINE: KindsProcess(ENGINE, case, [*options, *(["--silent"] if a.silent else [])]),
    }
    warm_up = {kind: [process.step() for _ in range(WARM_UP)] for kind, process in processes.items()}
    made = turns.take(processes, a.turns, a.turn, f"{case}, ")
    ended = {kind: process.end() for kind, process in processes.items()}
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    losses = {kind: [step["loss"] for step in [*warm_up[kind], *made.all(kind)]] for kind in processes}
    per_step = {
        name: statistics.mean(step[name] for step in made.timed(ENGINE))
        for name in ("bytes_read", "bytes_written", "wait_s", "conditional_wait_s", "step_s")
    }
    plain_s = statistics.median(step["step_s"] for step in made.timed(SAME_HEAP))
    moved_s = per_step["bytes_read"] / disk[0] + per_step["bytes_written"] / disk[1]
    return {
        "batch": f"{rows}x{seq}",
        "ratio": dataclasses.asdict(Spread.bootstrap(made.ratios(ENGINE, SAME_HEAP))),
        "floor": max(1.0, moved_s / plain_s), "disk_s": moved_s,
        "step_s": {kind: statistics.median(step["step_s"] for step in made.timed(kind)) for kind in processes},
        "early": _early(made), "stalled": per_step["conditional_wait_s"] / per_step["step_s"],
        "waits": per_step["wait_s"] / per_step["step_s"],
        "bytes_read": per_step["bytes_read"], "bytes_written": per_step["bytes_written"],
        "deviations": sum(step["deviations"] for step in made.all(ENGINE)), "steps": len(made.all(ENGINE)),
        "planned": sum(step["planned_steps"] for step in made.all(ENGINE)),
        "equal": losses[ENGINE] == losses[SAME_HEAP] and ended[ENGINE]["digest"] == ended[SAME_HEAP]["digest"],
        "peak_rss_bytes": {kind: summary["peak_rss_bytes"] for kind, summary in ended.items()},
    }  # fmt: skip


def _early(made: Turns) -> float:
    """The lead steps count here, too: what is late is late in each."""
    read = sum(step["bytes_read"] for step in made.all(ENGINE))
    return 1 - sum(step["on_demand_bytes"] for step in made.all(ENGINE)) / read if read else 1.0


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each ratio of a case."""
    config, rows = record["config"], []
    for case, found in record["cases"].items():
        shared: dict[str, Any] = {
            "model": MODELS[case], "batch": found["batch"], "ram_share": config["ram_share"],
            "threads": config["threads"], "pairs": config["turns"], "steps_per_turn": config["turn"],
        }  # fmt: skip
        rows.append(
            common.ratio_row(
                OVER_SAME_HEAP, Spread(**found["ratio"]), **shared, step_s=found["step_s"][ENGINE],
                other_step_s=found["step_s"][SAME_HEAP], peak_rss_bytes=found["peak_rss_bytes"][ENGINE],
                other_peak_rss_bytes=found["peak_rss_bytes"][SAME_HEAP],
                read_bytes_per_step=round(found["bytes_read"]), written_bytes_per_step=round(found["bytes_written"]),
            )
        )  # fmt: skip
        rows.append({"ratio_of": EARLY, "ratio": found["early"], **shared})
        if case == MIXTURE:
            rows.append({"ratio_of": STALLED, "ratio": found["stalled"], **shared})
    return rows


def table(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The result for people."""
    config = record["config"]
    rate = " and ".join(f"{bytes_per_s / 1e9:.2f}" for bytes_per_s in record["disk_bytes_per_s"])
    rows = [("disk, read and write", f"{rate} GB/s; {config['threads']} threads")]
    for case, found in record["cases"].items():
        ours, plain = found["step_s"][ENGINE], found["step_s"][SAME_HEAP]
        moved = f"{format_bytes(found['bytes_read'])} read, {format_bytes(found['bytes_written'])} written"
        rows += [
            (f"{MODELS[case]}, batch {found['batch']}, RAM {config['ram_share']:.0%} of parameters and states", ""),
            ("  step over plain PyTorch, 95 %", f"{Spread(**found['ratio'])}: {ours:.3f} s, {plain:.3f} s"),
            ("  bytes of a step", moved),
            ("  floor of these bytes", f"{found['floor']:.3f} ({found['disk_s']:.3f} s, one after the other)"),
            ("  bytes read begun before their op", f"{found['early']:.1%}"),
            ("  waits, and those for experts, of a step", f"{found['waits']:.1%}, {found['stalled']:.1%}"),
            ("  steps planned, that differed", f"{found['planned']} of {found['steps']}, {found['deviations']}"),
            ("  losses and weights equal", str(found["equal"])),
        ]
    return rows


def main() -> None:
    """Measure and print."""
    a = arguments()
    torch.set_num_threads(a.threads)
    Path(a.dir).mkdir(parents=True, exist_ok=True)
    [point] = measure(check_target(Path(a.dir), PROBE.file_bytes), PROBE).points
    disk = point.read_gb_per_s * 1e9, point.write_gb_per_s * 1e9
    record = {
        "benchmark": "kinds", "config": common.config_of(a), "surroundings": common.surroundings(),
        "disk_bytes_per_s": disk, "cases": {case: measure_case(a, case, disk) for case in a.cases},
    }  # fmt: skip
    common.save(a, record, csv_rows(record))
    common.show("steps that are not all alike", table(record), record, as_json=a.json)


if __name__ == "__main__":
    main()
