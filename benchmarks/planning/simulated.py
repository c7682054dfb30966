"""A plan as it is simulated against the same plan executed: seconds of a step, with sleeps as compute.

    python -m benchmarks.planning.simulated --save

- ``all lanes``: training over a device, host memory and page files, with gathers, reductions, copies up and down and
  updates beside compute. Its plan is executed in real time, each lane a thread that sleeps as long as its bytes take.
- ``shared rate``: the same, where reads and writes of page files share a rate.
- ``engine``: the engine's driver over real page files under ``limit_mb_per_s``, which is one rate for both directions.

Nothing computes, so the result is the same beside another program as long as that leaves a core now and then.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch

from benchmarks import common
from benchmarks.planning.real_lanes import RealLanes, sleep_until
from pagemem.devices.arena import HostArena
from pagemem.files.page_file import PageFiles
from pagemem.folders.run_directory import RunDirectory
from pagemem.frames.page import TensorId
from pagemem.residency.host_mover import HostMover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.telemetry.events import NullSink
from pagemem.tier import Tag, Tier
from pagemem.units import KiB
from scheduler.execution.driver import Driver
from scheduler.lookahead.planner import plan_work
from scheduler.planning.bounds import Replay
from scheduler.planning.machine import Machine, SharedRate
from scheduler.planning.sources import TensorSource
from scheduler.planning.task import Lane, TaskKind
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace
from scheduler.planning.work import Work
from scheduler.simulation.lanes import SimulatedLanes
from scheduler.simulation.simulator import simulate_work

CASES: Final = ("all lanes", "shared rate", "engine")
RATIO: Final = "simulated / executed step"
#: What a simulation may be off by.
BAR: Final = 0.05
PAGE: Final = 256 * KiB
READ, MODIFY, CREATE, CONSUME = AccessMode.READ, AccessMode.MODIFY, AccessMode.CREATE, AccessMode.CONSUME
_DISK: Final = frozenset((Lane.SSD_READ, Lane.SSD_WRITE))
#: Cycles before those that are timed.
_LEAD: Final = 2


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning.simulated", description=" ".join((__doc__ or "").split("\n\n")[0].split())
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each case, about (default: 20)")
    parser.add_argument("--mb-per-s", type=float, default=400.0, help="of the disk (default: 400)")
    common.common_arguments(parser)
    return parser.parse_args(given)


def work_of_all_lanes(n_units: int, disk: float, *, shared: bool) -> Work:
    """A step over units whose parameters are gathered and copied up, and whose updates are made by a worker."""
    ops: list[Op] = []
    pages: dict[TensorId, int] = {}
    sources: dict[TensorId, TensorSource] = {}

    def op(kind: OpKind, seconds: float, *accesses: Access, lane: Lane = Lane.COMPUTE) -> None:
        ops.append(Op((kind, len(ops)), f"op {len(ops)}", accesses, seconds, len(ops), lane))

    def tensor(unit: int, part: int, n_pages: int) -> TensorId:
        found = TensorId(10 * unit + part)
        pages[found] = n_pages
        return found

    for unit in range(n_units):
        parameter, copy = tensor(unit, 0, 8), tensor(unit, 1, 8)
        sources[copy] = TensorSource(TaskKind.UPLOAD, parameter, 8 * PAGE)
        sources[parameter] = TensorSource(TaskKind.GATHER, tensor(unit, 4, 4), 8 * PAGE)
        op(OpKind.FORWARD, 0.006, Access(copy, READ, Tier.DEVICE))
        op(OpKind.FORWARD, 0.001, Access(tensor(unit, 5, 4), CREATE, Tier.HOST, TaskKind.DOWNLOAD))
    for unit in reversed(range(n_units)):
        copy, shard, states = TensorId(10 * unit + 1), TensorId(10 * unit + 4), tensor(unit, 2, 8)
        whole, gradient = tensor(unit, 7, 8), tensor(unit, 3, 4)
        op(OpKind.BACKWARD, 0.001, Access(TensorId(10 * unit + 5), CONSUME, Tier.HOST, TaskKind.UPLOAD))
        op(OpKind.BACKWARD, 0.010, Access(copy, READ, Tier.DEVICE))
        op(OpKind.BACKWARD, 0.001, Access(whole, CREATE))
        reduced = Access(gradient, CREATE, Tier.HOST, TaskKind.REDUCE_SCATTER)
        op(OpKind.GRADIENT, 0.001, Access(whole, CONSUME), reduced)
        update = (Access(shard, MODIFY), Access(states, MODIFY), Access(gradient, CONSUME))
        op(OpKind.UPDATE, 0.004, *update, lane=Lane.UPDATE)
    rates = {
        Lane.SSD_READ: disk, Lane.SSD_WRITE: disk, Lane.H2D: 800e6, Lane.D2H: 800e6, Lane.COMM: 600e6,
    }  # fmt: skip
    limits = (SharedRate(_DISK, disk),) if shared else ()
    machine = Machine(PAGE, {Tier.HOST: 8 * n_units + 24, Tier.DEVICE: 24}, rates, limits)
    return Work.of(Trace(tuple(ops)), {t: n * PAGE for t, n in pages.items()}, machine, None, sources)


def all_lanes(a: argparse.Namespace, *, shared: bool) -> dict[str, Any]:
    """Simulated and executed seconds of a step over all lanes."""
    work = work_of_all_lanes(a.units, a.mb_per_s * 1e6, shared=shared)
    plan = plan_work(work)
    simulated = simulate_work(plan, work)
    n_cycles = max(3, round(a.seconds / (simulated.step_s * plan.n_steps)))
    lanes, executed = RealLanes(work.machine), list[float]()
    try:
        replay = Replay(work, plan, cast(SimulatedLanes, lanes))
        for _ in range(_LEAD + n_cycles):
            began_s = time.perf_counter()
            replay.cycle()
            executed.append((time.perf_counter() - began_s) / plan.n_steps)
    finally:
        lanes.close()
    kinds = sorted({task.kind.value for task in plan.tasks})
    return _found(simulated.step_s, executed[_LEAD:], work.trace.compute_s, kinds)


def _found(simulated_s: float, executed_s: Sequence[float], compute_s: float, kinds: Sequence[str]) -> dict[str, Any]:
    mean_s = statistics.mean(executed_s)
    return {
        "simulated_s": simulated_s, "executed_s": mean_s, "ratio": simulated_s / mean_s, "compute_s": compute_s,
        "spread_s": (min(executed_s), max(executed_s)), "n": len(executed_s), "kinds": list(kinds),
    }  # fmt: skip


# ---- the engine's driver --------------------------------------------------------------------------------------------


class Sleeper:
    """A training thread whose ops sleep, over tensors in real page files."""

    def __init__(self, a: argparse.Namespace, directory: RunDirectory) -> None:
        self.files = PageFiles([directory], page_bytes=PAGE, limit_mb_per_s=a.mb_per_s, max_request_bytes=PAGE)
        self.limit = a.mb_per_s * 1e6
        n_frames = 14 * a.units // 3
        self.mover = HostMover(HostArena(n_frames, PAGE), self.files, NullSink())
        self.driver = Driver(self.mover, NullSink(), lambda: (self.limit / 2, self.limit / 2))
        self.units = [
            (self._tensor(f"{unit}", Tag.PARAM, 4), self._tensor(f"{unit} states", Tag.MOMENT, 8))
            for unit in range(a.units)
        ]

    def _tensor(self, name: str, tag: Tag, n_pages: int) -> PagedTensor:
        return self.mover.create(name, tag, n_pages * PAGE)

    def op(self, kind: OpKind, name: str, seconds: float, *uses: tuple[PagedTensor, AccessMode]) -> None:
        """An op that lasts so long once its tensors are there."""
        with self.driver.op((kind, name), name, [Access(tensor.id, mode) for tensor, mode in uses]):
            sleep_until(time.perf_counter() + seconds)

    def step(self) -> None:
        """Forward, backward, and an update of each unit as soon as it may be."""
        for number, (parameter, _) in enumerate(self.units):
            self.op(OpKind.FORWARD, str(number), 0.012, (parameter, READ))
        for number, (parameter, states) in reversed(list(enumerate(self.units))):
            self.op(OpKind.BACKWARD, str(number), 0.020, (parameter, READ))
            self.op(OpKind.UPDATE, str(number), 0.006, (parameter, MODIFY), (states, MODIFY))
        self.driver.end_step(repeatable=True)

    def close(self) -> None:
        """End all threads."""
        self.driver.quiesce()
        self.mover.close()
        self.files.close()
        self.mover.arena.close()


def engine(a: argparse.Namespace) -> dict[str, Any]:
    """Simulated and executed seconds of the driver's own plan."""
    folder = Path(a.dir) / "simulated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with RunDirectory(folder) as directory:
        sleeper = Sleeper(a, directory)
        try:
            return _driven(a, sleeper)
        finally:
            sleeper.close()
            shutil.rmtree(folder, ignore_errors=True)


def _driven(a: argparse.Namespace, sleeper: Sleeper) -> dict[str, Any]:
    follower = sleeper.driver.follower
    for _ in range(8):  # traced, planned, and planned anew with times
        sleeper.step()
    plan, trace = follower.plan, follower.trace
    assert plan is not None
    machine = Machine(
        PAGE, {Tier.HOST: sleeper.mover.tenants.n_shared_frames}, dict.fromkeys(_DISK, sleeper.limit),
        (SharedRate(_DISK, sleeper.limit),),
    )  # fmt: skip
    simulated = simulate_work(plan, Work.of(trace, sleeper.driver.planner.n_bytes(trace), machine))
    n_cycles = max(2, round(a.seconds / (simulated.step_s * plan.n_steps)))
    for _ in range(plan.n_steps):
        sleeper.step()
    executed: list[float] = []
    for _ in range(n_cycles):
        began_s = time.perf_counter()
        for _ in range(plan.n_steps):
            sleeper.step()
        executed.append((time.perf_counter() - began_s) / plan.n_steps)
    if follower.deviations or follower.plan is not plan:
        print(f"engine: {follower.deviations} steps differed from the plan", file=sys.stderr)
    return _found(simulated.step_s, executed, trace.compute_s, ("load", "store"))


# ---- result ---------------------------------------------------------------------------------------------------------


def measure_case(a: argparse.Namespace, case: str) -> dict[str, Any]:
    """One case."""
    return engine(a) if case == "engine" else all_lanes(a, shared=case == "shared rate")


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each case."""
    return [
        {
            "ratio_of": f"{RATIO}, {case}", "ratio": found["ratio"], "step_s": found["simulated_s"],
            "other_step_s": found["executed_s"],
        }
        for case, found in record["cases"].items()
    ]  # fmt: skip


def table(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The result for people."""
    rows = []
    for case, found in record["cases"].items():
        low, high = found["spread_s"]
        said = f"{found['simulated_s'] * 1e3:.1f} simulated, {found['executed_s'] * 1e3:.1f} executed"
        rows += [
            (
                f"{case}: ms a step",
                f"{said} ({low * 1e3:.1f}-{high * 1e3:.1f}), compute {found['compute_s'] * 1e3:.1f}",
            ),
            ("  simulated over executed", f"{found['ratio']:.3f}, bar {1 - BAR:.2f} to {1 + BAR:.2f}"),
            ("  tasks", ", ".join(found["kinds"])),
        ]
    return rows


def main() -> None:
    """Measure and print."""
    a = arguments()
    torch.set_num_threads(1)
    record = {
        "benchmark": "simulated", "config": common.config_of(a), "surroundings": common.surroundings(),
        "cases": {case: measure_case(a, case) for case in a.cases},
    }  # fmt: skip
    common.save(a, record, csv_rows(record))
    common.show("a plan simulated and executed", table(record), record, as_json=a.json)


if __name__ == "__main__":
    main()
