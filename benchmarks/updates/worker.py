"""Step time with exact updates made by a worker beside compute, over that with updates on the training thread.

    python -m benchmarks.updates.worker --size 27m --ram-share 0.25 --threads 2

Two processes of the engine on the CPU take turns (`benchmarks.turns`), one with `update.worker` and one without. Losses
must be equal, bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Sequence
from typing import Any, Final

from benchmarks import common, turns
from benchmarks.common import Spread
from benchmarks.subjects import ENGINE, OPTIONS, WARM_UP, Process, model_arguments, options_of

WORKER, ALONE = "worker", "training thread"
RATIO_OF: Final = "step with a worker for updates / on the training thread"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.updates.worker", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    model_arguments(parser)
    common.batch_arguments(parser)
    turns.add_arguments(parser, 10)
    common.common_arguments(parser)
    a = parser.parse_args(given)
    turns.check_arguments(parser, a)
    return a


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Both processes in turns; returns the record."""
    shutil.rmtree(a.dir, ignore_errors=True)
    processes = {}
    for name, worker in ((WORKER, "true"), (ALONE, "false")):
        own = argparse.Namespace(**{**vars(a), "worker": worker, "dir": f"{a.dir}/{worker}"})
        processes[name] = Process(ENGINE, options_of(own, OPTIONS))
    warm_up = {name: [process.step() for _ in range(WARM_UP)] for name, process in processes.items()}
    made = turns.take(processes, a.turns, a.turn)
    summaries = {name: process.end() for name, process in processes.items()}
    shutil.rmtree(a.dir, ignore_errors=True)
    losses = [[step["loss"] for step in [*warm_up[name], *made.all(name)]] for name in processes]
    return {
        "benchmark": "update_worker",
        "config": common.config_of(a),
        "surroundings": common.surroundings(),
        "pairs": a.turns,
        "ratio": dataclasses.asdict(Spread.bootstrap(made.ratios(WORKER, ALONE))),
        "step_s": {
            name: dataclasses.asdict(Spread.of([step["step_s"] for step in made.timed(name)])) for name in processes
        },
        "planned_step_s": {name: summary["planned_step_s"] for name, summary in summaries.items()},
        "losses_equal": losses[0] == losses[1],
    }


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row."""
    config, seconds = record["config"], record["step_s"]
    return [
        common.ratio_row(
            RATIO_OF, Spread(**record["ratio"]), model=config["size"], batch=f"{config['batch']}x{config['seq']}",
            ram_share=config["ram_share"], threads=config["threads"], pairs=record["pairs"],
            steps_per_turn=config["turn"], step_s=seconds[WORKER]["median"], other_step_s=seconds[ALONE]["median"],
        )
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    a = arguments()
    record = measure(a)
    common.save(a, record, csv_rows(record))
    rows = [(RATIO_OF, str(Spread(**record["ratio"])))]
    rows += [(f"{name}, s a step", str(Spread(**spread))) for name, spread in record["step_s"].items()]
    rows += [(f"{name}, as the plan forecast it", f"{s or 0:.3f}") for name, s in record["planned_step_s"].items()]
    rows.append(("losses equal, bit for bit", str(record["losses_equal"])))
    common.show(f"{a.size}, {a.threads} threads, RAM {a.ram_share:g}", rows, record, as_json=a.json)


if __name__ == "__main__":
    main()
