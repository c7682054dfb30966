"""Saved activations in pages against recomputing them: `memory.activations` and `torch.utils.checkpoint`, in turns.

    python -m benchmarks.activations --size 112m --seq 1024 --batch 1

Four engines with the same budget for states: one as it is, two with a limit on saved activations, of which the first
keeps to pages and the second chooses by cost between pages and computing blocks again, and one whose model computes all
blocks again in the backward pass. The choice is made after six steps and looked at again after twelve; all that is
warm-up. ``--ssd-limit`` models a slower disk. Tensors are those that a step makes outside of the pages and that are
alive at once, whatever for: what is saved, gradients on their way, the loss's own. Turns are those of
`benchmarks.turns`; ratios have a bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from typing import Any, Final

from benchmarks import common, turns
from benchmarks.common import SIZES, Spread
from benchmarks.subjects import ENGINE, Process, options_of

AS_IT_IS, IN_PAGES, CHOSEN, RECOMPUTED = "as it is", "in pages", "chosen by cost", "recomputed"
#: Steps until the choice is made and has been looked at again, where the first traced step was like the later ones.
WARM_UP: Final = 13
TENSORS_BAR: Final = 0.35
STEP_BAR: Final = 1.10


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=SIZES, default="112m")
    parser.add_argument(
        "--ram-share", type=float, default=0.25, help="memory.ram over 12 bytes a parameter (default: 0.25)"
    )
    parser.add_argument("--activations", default="160MiB", metavar="SIZE", help="memory.activations (default: 160MiB)")
    parser.add_argument(
        "--ssd-limit", type=float, metavar="MB_PER_S", help="ssd.limit_mb_per_s, to model a slower disk"
    )
    common.batch_arguments(parser, batch=1, seq=1024)
    turns.add_arguments(parser, 5)
    common.common_arguments(parser)
    a = parser.parse_args()
    turns.check_arguments(parser, a)
    return a


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Four processes in turns; returns the record."""
    limited = ["--activations", a.activations]
    names = {AS_IT_IS: [], IN_PAGES: [*limited, "--blocks", "never"], CHOSEN: limited, RECOMPUTED: ["--recompute"]}
    shared = options_of(a, ("size", "ram_share", "batch", "seq", "threads", "ssd_limit"))
    shared += ["--count-tensors", WARM_UP - 1]
    folders = {name: f"{a.dir}/{number}" for number, name in enumerate(names)}
    for folder in folders.values():
        shutil.rmtree(f"{folder}/pages", ignore_errors=True)
    processes = {
        # As `offload launch` starts itself where memory.activations is set.
        name: Process(ENGINE, [*shared, *options, "--dir", folders[name]], tcache_disabled=name in (IN_PAGES, CHOSEN))
        for name, options in names.items()
    }
    warm_up = {name: [process.step() for _ in range(WARM_UP)] for name, process in processes.items()}
    made = turns.take(processes, a.turns, a.turn)
    ends = {name: process.end() for name, process in processes.items()}
    for folder in folders.values():
        shutil.rmtree(f"{folder}/pages", ignore_errors=True)
    timed = {name: made.timed(name) for name in names}
    losses = {tuple(step["loss"] for step in [*warm_up[name], *made.all(name)]) for name in names}

    def over(name: str, other: str) -> dict[str, float]:
        return dataclasses.asdict(Spread.bootstrap(made.ratios(name, other)))

    return {
        "benchmark": "activations",
        "config": common.config_of(a),
        "surroundings": common.surroundings(),
        "step_s": {
            name: dataclasses.asdict(Spread.of([step["step_s"] for step in values])) for name, values in timed.items()
        },
        "in_pages_over_recomputed": over(IN_PAGES, RECOMPUTED),
        "in_pages_over_as_it_is": over(IN_PAGES, AS_IT_IS),
        "chosen_over_in_pages": over(CHOSEN, IN_PAGES),
        "chosen_over_recomputed": over(CHOSEN, RECOMPUTED),
        "recomputed_blocks": timed[CHOSEN][-1]["recomputed_blocks"],
        "tensor_bytes": {name: end["tensor_peak_bytes"] for name, end in ends.items()},
        "rss_bytes": {name: end["peak_rss_bytes"] for name, end in ends.items()},
        "moved_bytes": {
            name: sum(s["bytes_read"] + s["bytes_written"] for s in values) / len(values)
            for name, values in timed.items()
        },
        "losses_equal": len(losses) == 1,
        "all_turns": made.steps,
    }


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each ratio."""
    config, seconds, peaks = record["config"], record["step_s"], record["rss_bytes"]
    pairs = {
        "in_pages_over_recomputed": (IN_PAGES, RECOMPUTED), "in_pages_over_as_it_is": (IN_PAGES, AS_IT_IS),
        "chosen_over_in_pages": (CHOSEN, IN_PAGES), "chosen_over_recomputed": (CHOSEN, RECOMPUTED),
    }  # fmt: skip
    return [
        common.ratio_row(
            f"step, activations {ours} / {other}", Spread(**record[key]), model=config["size"],
            batch=f"{config['batch']}x{config['seq']}", ram_share=config["ram_share"], threads=config["threads"],
            pairs=config["turns"], steps_per_turn=config["turn"], step_s=seconds[ours]["median"],
            other_step_s=seconds[other]["median"], peak_rss_bytes=peaks[ours], other_peak_rss_bytes=peaks[other],
        )
        for key, (ours, other) in pairs.items()
    ]  # fmt: skip


def rows_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The table."""
    tensors = record["tensor_bytes"]
    rows = [
        ("step in pages over recomputed", f"{Spread(**record['in_pages_over_recomputed'])}, bar {STEP_BAR}"),
        ("step in pages over as it is", str(Spread(**record["in_pages_over_as_it_is"]))),
        ("step chosen by cost over in pages", str(Spread(**record["chosen_over_in_pages"]))),
        ("step chosen by cost over recomputed", f"{Spread(**record['chosen_over_recomputed'])}, bar {STEP_BAR}"),
        ("blocks that it computes again", str(record["recomputed_blocks"])),
        ("tensors in pages over as it is", f"{tensors[IN_PAGES] / tensors[AS_IT_IS]:.3f}, bar {TENSORS_BAR}"),
        ("tensors chosen by cost over as it is", f"{tensors[CHOSEN] / tensors[AS_IT_IS]:.3f}, bar {TENSORS_BAR}"),
        ("tensors recomputed over as it is", f"{tensors[RECOMPUTED] / tensors[AS_IT_IS]:.3f}"),
    ]
    for name in tensors:
        memory = f"tensors {tensors[name] / 1e6:,.0f} MB, VmHWM {record['rss_bytes'][name] / 1e6:,.0f} MB"
        moved = f"{record['moved_bytes'][name] / 1e6:,.0f} MB moved a step"
        rows += [(name, f"{Spread(**record['step_s'][name])} s a step, {memory}, {moved}")]
    rows.append(("losses equal, bit for bit", str(record["losses_equal"])))
    return rows


def main() -> None:
    """Measure and print."""
    a = arguments()
    record = measure(a)
    common.save(a, record, csv_rows(record))
    title = (
        f"{a.size}, batch {a.batch} x {a.seq}, RAM for states {a.ram_share:g} of them, {a.activations} of activations"
    )
    common.show(title, rows_of(record), {k: v for k, v in record.items() if k != "all_turns"}, as_json=a.json)


if __name__ == "__main__":
    main()
