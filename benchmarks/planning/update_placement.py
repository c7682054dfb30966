"""When to make updates: each as soon as its gradients are complete, or some of them later, right before their
parameters are next used.

    python -m benchmarks.planning.update_placement --size 27m --ram-share 0.25

Updates of the units whose gradients are complete first, a share of the model, are put off into the next forward pass,
where the disk may be idle. Their gradients are kept in pages until then. Each step is planned and its bounds are
checked; nothing is trained and no disk is used. Ops are those of the engine's rehearsal, kernels take what the rates
say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from benchmarks import common
from benchmarks.common import GPT, SIZES
from offload.config_loading import load_config
from offload.forecast.kernels import CostMode, RatedKernels
from offload.forecast.rates import Rates
from offload.forecast.rehearsal import rehearsed
from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.lookahead.planner import cost_s, make_plan
from scheduler.planning.bounds import check_bounds
from scheduler.planning.machine import TierSpec
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace

SHARES: Final = (0.0, 0.25, 0.5, 0.75)
MB_PER_S: Final = (2000, 700, 400, 250, 150)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning.update_placement", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--size", choices=SIZES, default="27m")
    parser.add_argument(
        "--ram-share", type=float, default=0.25, help="memory.ram over 12 bytes a parameter (default: 0.25)"
    )
    parser.add_argument("--flops", type=float, default=1e11, help="of the kernels (default: 1e11)")
    parser.add_argument(
        "--ram-speed", type=float, default=20_000, metavar="MB_PER_S", help="of kernels without flops (default: 20000)"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    common.common_arguments(parser)
    return parser.parse_args()


def put_off(
    trace: Trace, n_bytes: Mapping[TensorId, int], share: float, ram_bytes_per_s: float
) -> tuple[Trace, dict[TensorId, int]]:
    """The step with the first updates put off, as many as are not more than a share of all parameters, and sizes of its
    tensors."""
    updates: dict[Any, list[int]] = {}
    for index, op in enumerate(trace.ops):
        if op.kind is OpKind.UPDATE:
            updates.setdefault(op.accesses[0].tensor, []).append(index)
    sizes, left_bytes = dict(n_bytes), share * sum(n_bytes[parameters] for parameters in updates)
    gradients: dict[TensorId, TensorId] = {}
    for parameters in updates:
        if n_bytes[parameters] > left_bytes:
            break
        left_bytes -= n_bytes[parameters]
        gradients[parameters] = TensorId(max(sizes) + 1)
        sizes[gradients[parameters]] = n_bytes[parameters]
    made: list[Op] = []
    used: set[TensorId] = set()
    for index, op in enumerate(trace.ops):
        for parameters in [a.tensor for a in op.accesses if a.tensor in gradients and a.tensor not in used]:
            used.add(parameters)
            for number in updates[parameters]:
                mode = AccessMode.CONSUME if number == updates[parameters][-1] else AccessMode.READ
                made.append(
                    replace(
                        trace.ops[number], accesses=(*trace.ops[number].accesses, Access(gradients[parameters], mode))
                    )
                )
        parameters = op.accesses[0].tensor
        if op.kind is not OpKind.UPDATE or parameters not in gradients:
            made.append(op)
        elif index == updates[parameters][0]:
            kept = gradients[parameters]
            made.append(
                Op(
                    (OpKind.GRADIENT, kept),
                    f"gradients of {op.name}",
                    (Access(kept, AccessMode.CREATE),),
                    2 * sizes[kept] / ram_bytes_per_s,
                )
            )
    return Trace(tuple(replace(op, until=index) for index, op in enumerate(made))), sizes


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Plan every step; returns the record."""
    n_parameters = common.n_parameters(*SIZES[a.size], a.seq)
    config = load_config({"memory": {"ram": int(a.ram_share * 12 * n_parameters)}, "ssd": {"paths": ["rehearsed"]}})
    cost = CostMode(RatedKernels(a.flops, a.ram_speed * 1e6))
    with rehearsed(lambda: GPT(*SIZES[a.size], a.seq, False), config, cost, Rates(1e9, 1e9, 1e9, 1e9, 1e9)) as engine:
        engine.rehearse(a.batch, a.seq)
        trace = engine.driver.follower.trace
        work = engine.driver.planner.work(trace)
        n_bytes, machine = work.n_bytes, work.machine
    found = []
    for mb_per_s in MB_PER_S:
        disk = TierSpec(machine.n_frames[Tier.HOST], machine.page_bytes, mb_per_s * 1e6, mb_per_s * 1e6)
        for share in SHARES:
            step, sizes = put_off(trace, n_bytes, share, a.ram_speed * 1e6)
            try:
                plan = make_plan(step, sizes, disk)
            except BudgetError as error:
                print(f"{mb_per_s} MB/s, {share:g} put off: {error}", file=sys.stderr)
                continue
            check_bounds(plan, step, sizes, disk)
            moved = plan.moved_bytes / n_parameters
            found.append(
                {
                    "mb_per_s": mb_per_s,
                    "share": share,
                    "step_s": plan.step_s,
                    "cost_s": cost_s(plan),
                    "moved_bytes_per_parameter": moved,
                }
            )
            print(
                f"{mb_per_s} MB/s, {share:g} put off: {plan.step_s:.3f} s, {moved:.1f} bytes a parameter",
                file=sys.stderr,
            )
    return {
        "benchmark": "update_placement",
        "config": common.config_of(a),
        "surroundings": common.surroundings(),
        "compute_s": trace.compute_s,
        "plans": found,
    }


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each share that is put off, at each speed of the disk."""
    config = record["config"]
    at_once = {plan["mb_per_s"]: plan["step_s"] for plan in record["plans"] if plan["share"] == 0}
    return [
        {
            "ratio_of": f"planned step, {p['share']:g} of updates put off / none, {p['mb_per_s']} MB/s",
            "ratio": p["step_s"] / at_once[p["mb_per_s"]], "model": config["size"], "step_s": p["step_s"],
            "batch": f"{config['batch']}x{config['seq']}", "ram_share": config["ram_share"],
            "other_step_s": at_once[p["mb_per_s"]],
        }
        for p in record["plans"]
        if p["share"] and p["mb_per_s"] in at_once
    ]  # fmt: skip


def main() -> None:
    """Plan and print."""
    a = arguments()
    record = measure(a)
    common.save(a, record, csv_rows(record))
    rows = [("compute", f"{record['compute_s']:.3f} s")]
    for mb_per_s in MB_PER_S:
        steps = [
            f"{p['step_s']:.3f} s ({p['moved_bytes_per_parameter']:.1f})"
            for p in record["plans"]
            if p["mb_per_s"] == mb_per_s
        ]
        rows.append((f"disk {mb_per_s} MB/s each way", ", ".join(steps)))
    title = (
        f"{a.size}, RAM for states {a.ram_share:g} of them: seconds a step (bytes moved a parameter), "
        f"{', '.join(f'{s:g}' for s in SHARES)} of the updates put off"
    )
    common.show(title, rows, record, as_json=a.json)


if __name__ == "__main__":
    main()
