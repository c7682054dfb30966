"""The tasks of a planned step, one by one: what starts each, who needs it, and when it begins and ends as predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from offload.forecast.planned import Planned
from offload.profiling.perfetto import DOWNLOADS, NETWORK, TrackPiece
from pagemem.frames.page import TensorId
from pagemem.telemetry.events import Event, EventKind
from pagemem.telemetry.recorder import OpSpan, Recording, WaitCause, WaitSpan
from pagemem.telemetry.timeline import Timeline
from pagemem.units import format_bytes
from scheduler.planning.task import NO_OP, Lane, TaskKind
from scheduler.planning.trace import Op
from scheduler.simulation.simulator import PlannedCycle, TimedTask, planned_cycle

#: What a profile records of each kind of task.
_EVENTS: Final = {
    TaskKind.LOAD: EventKind.READ, TaskKind.STORE: EventKind.WRITE, TaskKind.UPLOAD: EventKind.UPLOAD,
    TaskKind.UPDATE: EventKind.UPDATE,
}  # fmt: skip
#: Tracks of kinds of tasks that no profile records.
_TRACKS: Final = {
    TaskKind.DOWNLOAD: DOWNLOADS, TaskKind.GATHER: NETWORK, TaskKind.REDUCE_SCATTER: NETWORK, TaskKind.FILL: NETWORK,
}  # fmt: skip
#: The profiler's names of lanes, in causes of waits.
_LANE_NAMES: Final = {Lane.SSD_READ: "read", Lane.SSD_WRITE: "write"}
HEADINGS: Final = (
    "starts", "ends", "task", "tensor", "to", "bytes", "triggered by", "needed by", "kept by", "op waits"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExplainedTask:
    """A task of a plan.

    Attributes:
        kind, lane, tier: as in a plan's file. moves: whether there is anything to do.
        trigger: index of the op that lets it start; needed_by: of the one that needs it, counted on beyond the last op
            of the cycle; None: no op does.
        begin_s, end_s: predicted, since the cycle's beginning.
        kept_by: the lane that kept it from starting when its op did; None: nothing did.
        waits_s: that the op which needs it waits for it.
        beside: its ops are those of the round of updates beside the steps.
    """

    kind: str
    tensor: str
    lane: str
    tier: str
    n_bytes: int
    moves: bool
    restores: bool
    trigger: int
    needed_by: int | None
    begin_s: float
    end_s: float
    kept_by: str | None
    waits_s: float
    beside: bool


@dataclass(frozen=True, slots=True)
class Explained:
    """A cycle of a plan.

    Attributes:
        n_steps: of the cycle. end_s: its length.
        ops: kind and name of each op of the cycle. update_ops: names of those of the round of updates beside it.
        recording: the cycle as a profile would have recorded it. others: what moves and no profile records.
    """

    n_steps: int
    end_s: float
    ops: tuple[str, ...]
    update_ops: tuple[str, ...]
    tasks: tuple[ExplainedTask, ...]
    recording: Recording
    others: Mapping[str, Sequence[TrackPiece]]


def explain(planned: Planned) -> Explained:
    """A plan, simulated."""
    cycle = planned_cycle(planned.plan, planned.work)
    trace = planned.work.trace
    ops = tuple(map(_label, trace.ops)) * cycle.n_steps
    waited = {(op.wait.tensor, op.begin_s): op.waits_s for op in cycle.ops if op.wait is not None}
    tasks = tuple(_explained(task, planned, waited) for task in cycle.tasks)
    updates = planned.work.updates
    update_ops = () if updates is None else tuple(op.name for op in updates.trace.ops)
    return Explained(
        cycle.n_steps, cycle.end_s, ops, update_ops, tasks, _recording(cycle, planned), _others(cycle, planned)
    )


def _label(op: Op) -> str:
    kind = op.kind.value
    return op.name if op.name.startswith(kind) else f"{kind} {op.name}"


def _name(planned: Planned, task: TimedTask) -> str:
    return planned.names.get(task.task.tensor, "room")


def _explained(timed: TimedTask, planned: Planned, waited: Mapping[tuple[TensorId, float], float]) -> ExplainedTask:
    """``waited``: seconds of waits by the tensor and the time at which it was there."""
    task = timed.task
    return ExplainedTask(
        kind=task.kind.value,
        tensor=_name(planned, timed),
        lane=task.lane.value,
        tier=task.tier.value,
        n_bytes=task.n_bytes,
        moves=timed.moves,
        restores=timed.restores,
        trigger=task.trigger,
        needed_by=None if task.needed_at == NO_OP else task.needed_at,
        begin_s=timed.begin_s,
        end_s=timed.end_s,
        kept_by=None if timed.behind is None else timed.behind.value,
        waits_s=waited.get((task.tensor, timed.end_s), 0.0) if timed.moves else 0.0,
        beside=timed.beside,
    )


# ---- as a table and as a trace --------------------------------------------------------------------------------------


def explained_rows(found: Explained) -> list[tuple[str, ...]]:
    """A row for each task, in the order in which they begin; see `HEADINGS`. Times are milliseconds."""
    n_ops = len(found.ops)

    def op(task: ExplainedTask, index: int | None) -> str:
        if index is None:
            return "-"
        if task.beside:
            return f"beside: {index} {found.update_ops[index]}"
        return f"{index} {found.ops[index % n_ops]}" + (", next cycle" if index >= n_ops else "")

    return [
        (
            f"{task.begin_s * 1e3:.2f}", f"{task.end_s * 1e3:.2f}", task.kind, task.tensor, task.tier,
            format_bytes(task.n_bytes) if task.moves else "-", "restoring" if task.restores else op(task, task.trigger),
            op(task, task.needed_by), task.kept_by or "-", f"{task.waits_s * 1e3:.2f}" if task.waits_s else "-",
        )
        for task in sorted(found.tasks, key=lambda task: task.begin_s)
    ]  # fmt: skip


def title_of(found: Explained) -> str:
    """What the rows are of."""
    steps = "a step" if found.n_steps == 1 else f"a cycle of {found.n_steps} steps"
    end = f"{found.end_s * 1e3:.2f} ms"
    return f"plan: {steps}, {len(found.ops)} ops, {len(found.tasks)} tasks, ends at {end}"


def _others(cycle: PlannedCycle, planned: Planned) -> dict[str, list[TrackPiece]]:
    """Tasks of kinds that no profile records, by their track."""
    found: dict[str, list[TrackPiece]] = {}
    for task in cycle.tasks:
        kind = task.task.kind
        if task.moves and kind in _TRACKS:
            piece = TrackPiece(
                _name(planned, task), kind.value, (task.begin_s, task.end_s), {"bytes": task.task.n_bytes}
            )
            found.setdefault(_TRACKS[kind], []).append(piece)
    return found


def _recording(cycle: PlannedCycle, planned: Planned) -> Recording:
    """What a profile of the cycle would have: ops, waits, steps, and what moves; nothing of bytes held."""
    trace, sizes = planned.work.trace, planned.work.n_bytes
    ops: list[OpSpan] = []
    waits: list[WaitSpan] = []
    for timed in cycle.ops:
        op = trace.ops[timed.op % len(trace.ops)]
        used = [access.tensor for access in op.accesses]
        first = planned.names.get(used[0], "") if used else ""
        n_bytes = sum(sizes[tensor] for tensor in used)
        ops.append(OpSpan(op.kind.value, op.name, first, n_bytes, timed.begin_s, timed.end_s))
        if timed.wait is not None:
            lane = timed.wait.lane
            cause = WaitCause(_LANE_NAMES.get(lane, lane.value), "predicted")
            tensor, begin_s = timed.wait.tensor, timed.begin_s - timed.wait.seconds
            name = planned.names.get(tensor, "room")
            waits.append(WaitSpan(name, sizes.get(tensor, 0), begin_s, timed.begin_s, cause, True))
    steps = [op.end_s for op in cycle.ops if (op.op + 1) % len(trace.ops) == 0]
    events = [
        Event(kind, _name(planned, task), task.task.n_bytes, task.begin_s, task.end_s - task.begin_s)
        for task in cycle.tasks
        if task.moves and (kind := _EVENTS.get(task.task.kind)) is not None
    ]
    end_s = max([cycle.end_s, *(event.start_s + event.duration_s for event in events)])
    return Recording(0.0, end_s, Timeline(0.0, end_s, {}, []), ops, events, waits, steps, 0.0, 0.0, 0)


def as_dict(found: Explained) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "steps": found.n_steps, "end_s": found.end_s, "ops": list(found.ops), "update_ops": list(found.update_ops),
        "tasks": [{name: getattr(task, name) for name in ExplainedTask.__slots__} for task in found.tasks],
    }  # fmt: skip
