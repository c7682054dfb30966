"""Saved activations in pages against recomputing them: `memory.activations` and `torch.utils.checkpoint`, in turns.

    python -m benchmarks.activations --size 112m --seq 1024 --batch 1

Four engines with the same budget for states: one as it is, two with a limit on saved activations, of which the first
keeps to pages and the second chooses by cost between pages and computing blocks again, and one whose model computes all
blocks again in the backward pass. The choice is made after six steps and looked at again after twelve; all that is
warm-up. ``--ssd-limit`` models a slower disk. Tensors are those that a step makes outside of the pages and that are
alive at once, whatever for: what is saved, gradients on their way, the loss's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from typing import Any, Final

from benchmarks import common
from benchmarks.common import SIZES, Spread
from benchmarks.step import Child

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
    return common.step_arguments(parser, steps=9, batch=1, seq=1024)


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Four processes in turns; returns the record."""
    limited = ["--activations", a.activations]
    names = {AS_IT_IS: [], IN_PAGES: [*limited, "--blocks", "never"], CHOSEN: limited, RECOMPUTED: ["--recompute"]}
    shared = [
        "--size",
        a.size,
        "--ram-share",
        a.ram_share,
        "--batch",
        a.batch,
        "--seq",
        a.seq,
        "--threads",
        a.threads,
        "--count-tensors",
        WARM_UP - 1,
    ]
    shared += [] if a.ssd_limit is None else ["--ssd-limit", a.ssd_limit]
    folders = {name: f"{a.dir}/{number}" for number, name in enumerate(names)}
    for folder in folders.values():
        shutil.rmtree(f"{folder}/pages", ignore_errors=True)
    children = {
        # As `offload launch` starts itself where memory.activations is set.
        name: Child(
            "engine", [*map(str, shared), *options, "--dir", folders[name]], joining_heap=name in (IN_PAGES, CHOSEN)
        )
        for name, options in names.items()
    }
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(WARM_UP + a.steps):
        for name, process in children.items():
            steps[name].append(process.ask("step"))
        print(
            f"step {number + 1}/{WARM_UP + a.steps}",
            *(f"{n} {v[-1]['step_s']:.3f} s" for n, v in steps.items()),
            file=sys.stderr,
        )
    ends = {name: process.end() for name, process in children.items()}
    for folder in folders.values():
        shutil.rmtree(f"{folder}/pages", ignore_errors=True)
    timed = {name: values[WARM_UP:] for name, values in steps.items()}

    def over(name: str, other: str) -> dict[str, float]:
        pairs = zip(timed[name], timed[other], strict=True)
        return dataclasses.asdict(Spread.of([one["step_s"] / two["step_s"] for one, two in pairs]))

    return {
        "benchmark": "activations",
        "config": {k: v for k, v in vars(a).items() if k not in ("json", "save", "dir")},
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
        "losses_equal": len({tuple(step["loss"] for step in values) for values in steps.values()}) == 1,
        "all_steps": steps,
    }


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
        said = (
            f"{Spread(**record['step_s'][name])} s a step, tensors {tensors[name] / 1e6:,.0f} MB, "
            f"VmHWM {record['rss_bytes'][name] / 1e6:,.0f} MB, {record['moved_bytes'][name] / 1e6:,.0f} MB moved a step"
        )
        rows.append((name, said))
    rows.append(("losses equal, bit for bit", str(record["losses_equal"])))
    return rows


def main() -> None:
    """Measure and print."""
    a = arguments()
    record = measure(a)
    common.save(record, a.save)
    title = (
        f"{a.size}, batch {a.batch} x {a.seq}, RAM for states {a.ram_share:g} of them, {a.activations} of activations"
    )
    common.show(title, rows_of(record), {k: v for k, v in record.items() if k != "all_steps"}, as_json=a.json)


if __name__ == "__main__":
    main()
