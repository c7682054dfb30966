"""The worked example of docs/schedule.md is what the planner makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from pagemem.units import MiB
from scheduler.lookahead.planner import plan_work
from scheduler.planning.bounds import check_work
from scheduler.planning.machine import Machine
from scheduler.planning.plan import Plan
from scheduler.planning.sources import TensorSource
from scheduler.planning.task import NO_FRAME, NO_OP, Lane, TaskKind
from scheduler.planning.trace import Access, AccessMode, Conditional, Op, OpKind, Trace
from scheduler.planning.work import Work
from scheduler.simulation.simulator import planned_cycle

PAGE: Final = Path(__file__).parents[2] / "docs" / "schedule.md"
NAMES: Final = ("A", "B", "SA", "SB", "GA", "GB", "X", "E", "F", "a", "b", "s")
NUMBER: Final = {name: TensorId(number) for number, name in enumerate(NAMES)}
MODES: Final = {mode.value: mode for mode in AccessMode}


def op(index: int, kind: OpKind, name: str, *uses: str, lane: Lane = Lane.COMPUTE, one_of: tuple[str, ...] = ()) -> Op:
    """An op of 2 ms; a use is ``"read a"``, or ``"create X via download"``. Small letters are tensors of the device."""
    accesses = []
    for use in uses:
        mode, tensor, *via = use.split()
        tier = Tier.DEVICE if tensor.islower() else Tier.HOST
        accesses.append(Access(NUMBER[tensor], MODES[mode], tier, TaskKind(via[1]) if via else None))
    some = Conditional(tuple(NUMBER[tensor] for tensor in one_of), 1) if one_of else None
    return Op((kind, index), name, tuple(accesses), 2e-3, index, lane, some)


OPS: Final = (
    op(0, OpKind.FORWARD, "forward a", "read a"),
    op(1, OpKind.FORWARD, "forward b", "read b", "create X via download"),
    op(2, OpKind.FORWARD, "expert e or f", one_of=("E", "F")),
    op(3, OpKind.BACKWARD, "backward b", "read b", "consume X via upload", "create GB via download"),
    op(4, OpKind.UPDATE, "update B", "modify B", "modify SB", "consume GB", lane=Lane.UPDATE),
    op(5, OpKind.BACKWARD, "backward a", "read a", "create GA via reduce_scatter"),
    op(6, OpKind.UPDATE, "update A", "modify A", "modify SA", "consume GA", lane=Lane.UPDATE),
    op(7, OpKind.UPDATE, "fill B", "modify B via fill"),
)


def example() -> tuple[Plan, Work]:
    """Two layers and two experts over an SSD, 6 pages of host memory, 2 of a device, and other ranks."""
    n_bytes = {number: (2 if name in ("SA", "SB") else 1) * MiB for name, number in NUMBER.items()}
    sources = {
        NUMBER["b"]: TensorSource(TaskKind.UPLOAD, NUMBER["B"], MiB),
        NUMBER["s"]: TensorSource(TaskKind.UPLOAD, NUMBER["A"], MiB),
        NUMBER["a"]: TensorSource(TaskKind.GATHER, NUMBER["s"], 4 * MiB),
    }
    rates = {Lane.SSD_READ: 1e9, Lane.SSD_WRITE: 1e9, Lane.H2D: 4e9, Lane.D2H: 4e9, Lane.COMM: 4e9}
    work = Work.of(Trace(OPS), n_bytes, Machine(MiB, {Tier.HOST: 6, Tier.DEVICE: 2}, rates), {}, sources)
    plan = plan_work(work)
    check_work(plan, work)
    return plan, work


def rows() -> list[str]:
    """A row of the table for each task."""
    plan, work = example()
    names = {number: name for name, number in NUMBER.items()}
    found = []
    timed_of = {id(timed.task): timed for timed in planned_cycle(plan, work).tasks}
    for place, task in enumerate(plan.tasks):
        timed = timed_of[id(task)]
        frame = "-" if task.frame == NO_FRAME else f"{task.tier.value} {task.frame}"
        begins = f"{'behind ' if task.behind else ''}{task.trigger}"
        needed = "-" if task.needed_at == NO_OP else str(task.needed_at)
        after = " ".join(map(str, task.after)) or "-"
        what = f"{task.kind.value}{' (frames alone)' if task.fresh and task.kind is not TaskKind.DROP else ''}"
        times = f"{timed.begin_s * 1e3:.2f}-{timed.end_s * 1e3:.2f}"
        found.append(
            f"| {place} | {what} | {names.get(task.tensor, 'room')} | {task.lane.value} | {frame} | {begins} | {after} "
            f"| {needed} | {times} |"
        )
    return found


def test_the_table_is_the_plan() -> None:
    said = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and line.count("|") == 10][1:]
    assert said == rows()


def test_it_has_every_kind_of_task() -> None:
    plan, _ = example()
    assert {task.kind for task in plan.tasks} == set(TaskKind) and plan.closed
