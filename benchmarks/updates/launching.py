"""Updates of a large model on the thread that launches kernels, or on a worker.

    python -m benchmarks.updates.launching

A model of Llama's shape with 6.7 billion parameters in bf16, rehearsed on meta for a GPU, with all states in RAM or on
the device. Two clocks are followed beside the device's: that of the thread that launches what the device computes, and
that of the worker. An op of the device begins once it is launched and the one before is over, and, behind an update of
what it uses, once that is copied up. An update begins when its gradient is down, as far behind its op as the rehearsal
has it; on the launching thread nothing is launched meanwhile. What the engine's own simulation of its plan says, which
has updates beside compute and every copy, is given, too. Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from benchmarks import common
from benchmarks.planning.llama import Llama
from offload.config_loading import load_config
from offload.forecast.kernels import CostMode
from offload.forecast.rates import Rates, kernels_of
from offload.forecast.rehearsal import rehearsed
from offload.forecast.step_times import StepTimes
from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.planning.sources import TensorSource
from scheduler.planning.task import Lane
from scheduler.planning.trace import Op, Trace

#: Tokens of a step, and GiB of device pages.
TOKENS: Final = (8192, 32768)
DEVICE_GIB: Final = (60, 16)
COLUMNS: Final = (
    ("launching thread", "thread_s"), ("worker", "worker_s"), ("device busy", "device_s"),
    ("updates", "update_s"), ("the plan", "planned_s"),
)  # fmt: skip
#: Steps followed; the last one counts.
STEPS: Final = 4


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.updates.launching", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--flops", type=float, default=4e14, help="of the device (default: 4e14)")
    parser.add_argument("--device-ram-speed", type=float, default=2.0e6, metavar="MB_PER_S")
    parser.add_argument("--h2d", type=float, default=24_000, metavar="MB_PER_S", help="each way")
    parser.add_argument("--ram-speed", type=float, default=100_000, metavar="MB_PER_S", help="of updates in RAM")
    common.common_arguments(parser)
    return parser.parse_args()


@dataclass(slots=True)
class Clocks:
    """Seconds at which each is free."""

    thread_s: float = 0.0
    device_s: float = 0.0
    worker_s: float = 0.0


class Launched:
    """A step over and over, as a device is given it.

    Args:
        sources: what copies of the device are made of. copy_s: seconds of a copy of each tensor, up or down.
        worker: whether there is one.
    """

    def __init__(
        self, trace: Trace, sources: Mapping[TensorId, TensorSource], copy_s: Mapping[TensorId, float], *, worker: bool
    ) -> None:
        self._ops, self._copy_s, self._worker = trace.ops, copy_s, worker
        self._below = {copy: source.tensor for copy, source in sources.items()}
        self._clocks = Clocks()
        self._last_use_s: dict[TensorId, float] = {}  # of what is below
        self._updated_s: dict[TensorId, float] = {}
        self.update_s = self.device_s = 0.0

    def step_s(self) -> float:
        """Seconds from the end of one step's launching to that of the next, once they repeat."""
        ends = []
        for _ in range(STEPS):
            for op in self._ops:
                if any(access.tier is Tier.DEVICE for access in op.accesses):
                    self._compute(op)
                else:
                    self._in_ram(op)
            ends.append(max(self._clocks.device_s, self._clocks.thread_s))
        return ends[-1] - ends[-2]

    def _compute(self, op: Op) -> None:
        clocks, begins_s = self._clocks, 0.0
        below = [self._below[access.tensor] for access in op.accesses if access.tensor in self._below]
        for tensor in below:
            made_s = self._updated_s.pop(tensor, None)
            if made_s is not None:
                clocks.thread_s = max(clocks.thread_s, made_s)  # the copy is enqueued once there is something to copy
                begins_s = max(begins_s, made_s + self._copy_s[tensor])
        clocks.device_s = max(clocks.device_s, clocks.thread_s, begins_s) + op.duration_s
        for tensor in below:
            self._last_use_s[tensor] = clocks.device_s
        self.device_s += op.duration_s

    def _in_ram(self, op: Op) -> None:
        clocks, parameters = self._clocks, op.accesses[0].tensor
        down_s = self._last_use_s.get(parameters, 0.0) + self._copy_s[parameters]
        clocks.thread_s = max(clocks.thread_s, down_s)  # whoever takes a gradient waits for its copy
        if self._worker and op.lane is Lane.UPDATE:
            clocks.worker_s = end_s = max(clocks.worker_s, clocks.thread_s) + op.duration_s
        else:
            clocks.thread_s = end_s = clocks.thread_s + op.duration_s
        self._updated_s[parameters] = end_s
        self.update_s += op.duration_s


def planned(a: argparse.Namespace, tokens: int, device_gib: int) -> dict[str, Any]:
    """One configuration, both ways."""
    config = load_config(
        {
            "device": "cuda",
            "memory": {"ram": "200GiB", "device": f"{device_gib}GiB"},
            "ssd": {"paths": ["rehearsed"]},
            "model": {"dtype": "bf16"},
        }
    )
    rates = Rates(a.flops, a.ram_speed * 1e6, 1e10, 1e10, a.h2d * 1e6, a.device_ram_speed * 1e6)
    cost = CostMode(kernels_of(rates))
    with rehearsed(lambda: Llama(32_000, 4096, a.layers, 32, 32, 11_008), config, cost, rates) as engine:
        engine.rehearse(tokens // 4096, 4096)
        driver = engine.driver
        trace = driver.follower.trace
        sources = driver.planner.sources(trace.tensors())
        tiers = driver.planner.tiers()
        copy_s = {tensor: driver.planner.tensor(tensor).n_bytes / (a.h2d * 1e6) for tensor in tiers}
        found: dict[str, Any] = {"tokens": tokens, "device_gib": device_gib}
        for name, worker in (("thread_s", False), ("worker_s", True)):
            launched = Launched(trace, sources, copy_s, worker=worker)
            found[name] = launched.step_s()
        found |= {"device_s": launched.device_s / STEPS, "update_s": launched.update_s / STEPS}
        times = StepTimes.of(engine)
        found |= {"planned_s": times.step_s, "busy": dict(times.busy)}
        units = engine.store.index.units
        found |= {"units": len(units), "device_units": sum(unit.device_resident for unit in units)}
    print(found, file=sys.stderr, flush=True)
    return found


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each configuration."""
    return [
        {
            "ratio_of": f"simulated step, updates on a worker / launching thread, device of {p['device_gib']} GiB",
            "ratio": p["worker_s"] / p["thread_s"], "model": f"llama-{record['config']['layers']}-layers",
            "batch": f"{p['tokens']} tokens", "step_s": p["worker_s"], "other_step_s": p["thread_s"],
        }
        for p in record["plans"]
    ]  # fmt: skip


def main() -> None:
    """Simulate and print."""
    a = arguments()
    plans = [planned(a, tokens, device_gib) for device_gib in DEVICE_GIB for tokens in TOKENS]
    record = {
        "benchmark": "launching",
        "config": common.config_of(a),
        "surroundings": common.surroundings(),
        "plans": plans,
    }
    common.save(a, record, csv_rows(record))
    rows = [
        (
            f"{p['device_gib']} GiB, {p['tokens']:,} tokens, {p['device_units']} of {p['units']} units on the device",
            ", ".join(f"{what} {p[key]:.2f}" for what, key in COLUMNS),
        )
        for p in plans
    ]
    common.show("updates of 6.7 billion parameters, seconds a step", rows, record, as_json=a.json)


if __name__ == "__main__":
    main()
