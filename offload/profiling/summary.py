"""What a recording says: peaks against budget and plan, lanes, waits, bytes by module, and the recorder's own cost.

Everything here is worked out once the recording is over, from pure data. `summarize` makes the one mapping that
``summary.json``, the report and the terminal show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pagemem.telemetry.events import Event, EventKind
from pagemem.telemetry.intervals import Interval, clipped, total_s, without
from pagemem.telemetry.recorder import Recording, Wait
from pagemem.tier import Tier

FORMAT: Final = "offload profile 1"
#: Shown for what belongs to no unit of the model.
ACTIVATIONS: Final = "saved activations"
OTHER: Final = "other"
#: The lane of copies to the device.
H2D: Final = "h2d"


@dataclass(frozen=True, slots=True)
class TierLimits:
    """What a tier is measured against; None where there is no such bound.

    Attributes:
        pages_touched: distinct pages in use since the plan took over.
        planned_at_most: ``planned_pages`` is the most that may be needed, because commits keep pages.
    """

    budget_bytes: int | None
    planned_pages: int | None
    pages_touched: int
    planned_at_most: bool = False


@dataclass(frozen=True, slots=True)
class Planned:
    """What the plan predicts of a step; None without a plan.

    Attributes:
        step_s: of which ``compute_s`` without any wait.
        read_bytes, written_bytes: moved by the plan itself; what the updater of lock-free mode moves is not part of it.
    """

    step_s: float
    compute_s: float
    read_bytes: float
    written_bytes: float


@dataclass(frozen=True, slots=True)
class ModuleBytes:
    """What a unit of the model holds, wherever that is now. ``tensors``: names of its paged tensors."""

    name: str
    parameter_bytes: int
    master_bytes: int
    moment_bytes: int
    tensors: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Context:
    """What the engine knows beside the recording."""

    mode: str
    page_bytes: int
    tiers: Mapping[str, TierLimits]
    planned: Planned | None
    modules: Sequence[ModuleBytes]
    activations: frozenset[str] = frozenset()
    planned_steps: int = 0
    deviations: int = 0


def span(event: Event) -> Interval:
    """When it was under way."""
    return event.start_s, event.start_s + event.duration_s


def lane_intervals(recording: Recording) -> dict[str, list[Interval]]:
    """When each lane was busy, and when the training thread waited ("waits"); within the recording."""
    waits = [(wait.start_s, wait.end_s) for wait in recording.waits if wait.training]
    found = {
        "compute": without([(op.start_s, op.end_s) for op in recording.ops], waits),
        "read": [span(event) for event in recording.of(EventKind.READ)],
        "write": [span(event) for event in recording.of(EventKind.WRITE)],
        **({H2D: [span(event) for event in uploads]} if (uploads := recording.of(EventKind.UPLOAD)) else {}),
        "update": [span(event) for event in recording.of(EventKind.UPDATE)],
        "waits": waits,
    }
    return {lane: clipped(intervals, recording.begin_s, recording.end_s) for lane, intervals in found.items()}


def step_times_s(recording: Recording) -> list[float]:
    """Seconds of each whole step: up to its optimizer step, from the one before or the beginning."""
    begins = [recording.begin_s, *recording.step_ends_s]
    return [end - begin for begin, end in zip(begins, recording.step_ends_s, strict=False)]


def summarize(recording: Recording, context: Context) -> dict[str, Any]:
    """Everything but the course over time, ready for JSON. Bytes are bytes, times seconds, shares 0 to 1."""
    elapsed_s = recording.end_s - recording.begin_s
    steps = step_times_s(recording)
    return {
        "format": FORMAT,
        "mode": context.mode,
        "page_bytes": context.page_bytes,
        "elapsed_s": elapsed_s,
        "steps": len(steps),
        "planned_steps": context.planned_steps,
        "deviations": context.deviations,
        "step_times_s": steps,
        "tiers": {tier.value: _tier(recording, tier, context) for tier in recording.timeline.tiers},
        "plan": _plan(recording, context.planned, steps),
        "lanes": _lanes(recording, elapsed_s),
        "wait_causes": wait_causes(recording.waits),
        "waits": top_waits(recording.waits),
        "modules": by_module(recording, context),
        "overhead": {
            "calls": recording.n_calls,
            "spent_s": recording.spent_s,
            "training_spent_s": recording.training_spent_s,
            "training_share": recording.training_spent_s / elapsed_s if elapsed_s else 0.0,
        },
    }


def _moved(recording: Recording, kind: EventKind) -> int:
    return sum(event.n_bytes for event in recording.of(kind))


def _plan(recording: Recording, planned: Planned | None, steps: Sequence[float]) -> dict[str, dict[str, float | None]]:
    """What the plan says of one step, and the mean of those measured."""
    sums = {
        "step_s": sum(steps),
        "read_bytes": _moved(recording, EventKind.READ),
        "written_bytes": _moved(recording, EventKind.WRITE),
    }
    return {
        what: {
            "planned": getattr(planned, what) if planned is not None else None,
            "measured": total / len(steps) if steps else None,
        }
        for what, total in sums.items()
    }


def _tier(recording: Recording, tier: Tier, context: Context) -> dict[str, Any]:
    timeline, limits = recording.timeline, context.tiers.get(tier.value, TierLimits(None, None, 0))
    peak = timeline.peak(tier)
    return {
        "budget_bytes": limits.budget_bytes,
        "peak_bytes": peak.total_bytes,
        "peak_at_s": peak.time_s - timeline.begin_s,
        "peak_by_tag": {tag.value: n_bytes for tag, n_bytes in peak.by_tag.items()},
        "tag_peaks": {tag.value: n_bytes for tag, n_bytes in timeline.tag_peaks(tier).items()},
        "mean_bytes": timeline.mean_bytes(tier),
        "pages_touched": limits.pages_touched,
        "planned_pages": limits.planned_pages,
        "planned_at_most": limits.planned_at_most,
    }


def _lanes(recording: Recording, elapsed_s: float) -> dict[str, Any]:
    n_events = {
        "compute": len(recording.ops),
        "read": len(recording.of(EventKind.READ)),
        "write": len(recording.of(EventKind.WRITE)),
        H2D: len(recording.of(EventKind.UPLOAD)),
        "update": len(recording.of(EventKind.UPDATE)),
        "waits": sum(wait.training for wait in recording.waits),
    }
    kinds = {"read": EventKind.READ, "write": EventKind.WRITE, H2D: EventKind.UPLOAD}
    n_bytes = {lane: _moved(recording, kind) for lane, kind in kinds.items()}
    found = {}
    for lane, intervals in lane_intervals(recording).items():
        busy_s = total_s(intervals)
        found[lane] = {
            "busy_s": busy_s,
            "share": busy_s / elapsed_s if elapsed_s else 0.0,
            "count": n_events[lane],
            "bytes": n_bytes.get(lane),
            "bytes_per_s": n_bytes[lane] / busy_s if lane in n_bytes and busy_s else None,
        }
    return found


def top_waits(waits: Sequence[Wait]) -> list[dict[str, Any]]:
    """Waits for the same tensor of the same cause as one, those that took longest first."""
    found: dict[tuple[object, ...], dict[str, Any]] = {}
    for wait in waits:
        key = (wait.name, wait.cause, wait.training)
        row = found.setdefault(
            key,
            {
                "name": wait.name, "lane": wait.cause.lane, "reason": wait.cause.reason, "blocker": wait.cause.blocker,
                "thread": "training" if wait.training else "background", "count": 0, "total_s": 0.0, "longest_s": 0.0,
            },
        )  # fmt: skip
        row["count"] += 1
        row["total_s"] += wait.end_s - wait.start_s
        row["longest_s"] = max(row["longest_s"], wait.end_s - wait.start_s)
    return sorted(found.values(), key=lambda row: (-row["total_s"], row["name"]))


def wait_causes(waits: Sequence[Wait]) -> list[dict[str, Any]]:
    """The training thread's waits by what they waited for, whichever the tensor; those that took longest first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for wait in waits:
        if wait.training:
            cause = wait.cause
            row = found.setdefault(
                (cause.lane, cause.reason), {"lane": cause.lane, "reason": cause.reason, "count": 0, "total_s": 0.0}
            )
            row["count"] += 1
            row["total_s"] += wait.end_s - wait.start_s
    return sorted(found.values(), key=lambda row: (-row["total_s"], row["reason"]))


@dataclass(slots=True)
class _Moved:
    read_bytes: int = 0
    written_bytes: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0


def by_module(recording: Recording, context: Context) -> list[dict[str, Any]]:
    """What each unit holds, moved, computed and was waited for; most bytes moved first.

    Names decide: tensors that the model's units do not name are saved activations, or other.
    """
    owner = {tensor: module.name for module in context.modules for tensor in module.tensors}
    owner |= dict.fromkeys(context.activations, ACTIVATIONS)
    moved: dict[str, _Moved] = {module.name: _Moved() for module in context.modules}

    def of(tensor: str) -> _Moved:
        return moved.setdefault(owner.get(tensor, OTHER), _Moved())

    for event in recording.of(EventKind.READ):
        of(event.name).read_bytes += event.n_bytes
    for event in recording.of(EventKind.WRITE):
        of(event.name).written_bytes += event.n_bytes
    for op in recording.ops:
        of(op.tensor).compute_s += op.end_s - op.start_s
    for wait in recording.waits:
        if wait.training:
            of(wait.name.removeprefix("commit of ").removeprefix("update of ")).wait_s += wait.end_s - wait.start_s
    held: dict[str, list[int]] = {}
    for module in context.modules:
        sums = held.setdefault(module.name, [0, 0, 0])
        for place, n_bytes in enumerate((module.parameter_bytes, module.master_bytes, module.moment_bytes)):
            sums[place] += n_bytes
    rows = []
    for name, row in moved.items():
        parameter_bytes, master_bytes, moment_bytes = held.get(name, (0, 0, 0))
        rows.append(
            {
                "name": name,
                "parameter_bytes": parameter_bytes,
                "master_bytes": master_bytes,
                "moment_bytes": moment_bytes,
                "read_bytes": row.read_bytes,
                "written_bytes": row.written_bytes,
                "compute_s": row.compute_s,
                "wait_s": row.wait_s,
            }
        )
    return sorted(rows, key=lambda row: (-row["read_bytes"] - row["written_bytes"], row["name"]))
