"""What a recording says: peaks against budget and plan, lanes, waits, bytes by module, and the recorder's own cost.

Everything here is worked out once the recording is over, from pure data. `summarize` makes the one mapping that
``summary.json``, the report and the terminal show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

from offload.profiling.bottleneck import bottleneck
from offload.profiling.stats import TierUse
from pagemem.process.wait_lock import LockUse
from pagemem.telemetry.events import Event, EventKind
from pagemem.telemetry.intervals import Interval, clipped, total_s, without
from pagemem.telemetry.recorder import Recording, WaitSpan
from pagemem.tier import Tier
from pagemem.units import format_bytes

FORMAT: Final = "offload profile 1"
#: What does not belong to a unit of the model.
ACTIVATIONS: Final = "saved activations"
OTHER: Final = "other"
#: The events of each lane besides compute and waits; the last one moves no bytes.
LANES: Final = {
    "read": EventKind.READ, "write": EventKind.WRITE, "h2d": EventKind.UPLOAD, "update": EventKind.UPDATE,
}  # fmt: skip
_MODULE_FIELDS: Final = (
    "parameter_bytes", "master_bytes", "moment_bytes", "read_bytes", "written_bytes", "compute_s", "wait_s",
)  # fmt: skip
_TOP_WAITS: Final = 5


@dataclass(frozen=True, slots=True)
class ModuleBytes:
    """What a unit of the model holds, wherever that is now: bytes by field of its row, and its tensors' names."""

    name: str
    held: Mapping[str, int]
    tensors: Sequence[str]


@dataclass(frozen=True, slots=True)
class Context:
    """What the engine knows beside the recording.

    Attributes:
        title, model: of the report: which run this is, and what it trains.
        planned: seconds and bytes of a step by the plan; None without one. In lock-free mode the bytes that the
            updater moves are not among them.
        ssd_limit_mb_per_s: the configured limit, or None.
        locks: how each lock was used, by its name.
    """

    title: str
    model: str
    mode: str
    page_bytes: int = 0
    tiers: Mapping[str, TierUse] = field(default_factory=dict)
    planned: Mapping[str, float | None] | None = None
    modules: Sequence[ModuleBytes] = ()
    activations: frozenset[str] = frozenset()
    planned_steps: int = 0
    deviations: int = 0
    ssd_limit_mb_per_s: float | None = None
    locks: Mapping[str, LockUse] = field(default_factory=dict)


def span(event: Event) -> Interval:
    """When an event was under way."""
    return event.start_s, event.start_s + event.duration_s


def lane_intervals(recording: Recording) -> dict[str, list[Interval]]:
    """When each lane was busy, and when the training thread waited ("waits"); within the recording.

    Copies to the device ("h2d") are left out where there were none.
    """
    waits = [(wait.start_s, wait.end_s) for wait in recording.waits if wait.training]
    moves = {lane: [span(event) for event in recording.of(kind)] for lane, kind in LANES.items()}
    if not moves["h2d"]:
        del moves["h2d"]
    compute = without([(op.start_s, op.end_s) for op in recording.ops], waits)
    found = {"compute": compute, **moves, "waits": waits}
    return {lane: clipped(intervals, recording.begin_s, recording.end_s) for lane, intervals in found.items()}


def summarize(recording: Recording, context: Context, plain: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything but the course over time, ready for JSON. Bytes are bytes, times seconds, shares 0 to 1.

    Args:
        plain: what is known of training without the engine, see `offload.profiling.plain`.
    """
    elapsed_s = recording.end_s - recording.begin_s
    # A whole step goes up to its optimizer step, from the one before or the beginning.
    begins_s = [recording.begin_s, *recording.step_ends_s]
    steps_s = [end_s - begin_s for begin_s, end_s in zip(begins_s, recording.step_ends_s, strict=False)]
    summary = {
        "format": FORMAT,
        "title": context.title,
        "model": context.model,
        "made_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "mode": context.mode,
        "page_bytes": context.page_bytes,
        "ssd_limit_mb_per_s": context.ssd_limit_mb_per_s,
        "elapsed_s": elapsed_s,
        "steps": len(steps_s),
        "planned_steps": context.planned_steps,
        "deviations": context.deviations,
        "step_times_s": steps_s,
        "tiers": {tier.value: _tier(recording, tier, context) for tier in recording.timeline.tiers},
        "plan": _plan(recording, context.planned or {}, steps_s),
        "lanes": _lanes(recording, elapsed_s),
        "locks": {name: asdict(use) for name, use in context.locks.items()},
        "wait_causes": _by_cause((wait for wait in recording.waits if wait.training), named=False),
        "waits": _by_cause(recording.waits, named=True),
        "modules": _by_module(recording, context),
        "overhead": {
            "calls": recording.n_calls,
            "spent_s": recording.spent_s,
            "training_spent_s": recording.training_spent_s,
            "training_share": recording.training_spent_s / elapsed_s if elapsed_s else 0.0,
        },
        **({} if plain is None else {"plain": plain}),
    }
    return {**summary, "bottleneck": bottleneck(summary)}


def _bytes(events: Iterable[Event]) -> int:
    return sum(event.n_bytes for event in events)


def _plan(
    recording: Recording, planned: Mapping[str, float | None], steps_s: Sequence[float]
) -> dict[str, dict[str, float | None]]:
    """What the plan says of one step, and the mean of those measured."""
    sums = {
        "step_s": sum(steps_s),
        "read_bytes": _bytes(recording.of(EventKind.READ)),
        "written_bytes": _bytes(recording.of(EventKind.WRITE)),
    }
    return {
        what: {"planned": planned.get(what), "measured": total / len(steps_s) if steps_s else None}
        for what, total in sums.items()
    }


def _tier(recording: Recording, tier: Tier, context: Context) -> dict[str, Any]:
    timeline, use = recording.timeline, context.tiers.get(tier.value)
    peak = timeline.peak(tier)
    return {
        "budget_bytes": use and use.budget_bytes,
        "peak_bytes": peak.total_bytes,
        "peak_at_s": peak.time_s - timeline.begin_s,
        "peak_by_tag": {tag.value: n_bytes for tag, n_bytes in peak.by_tag.items()},
        "tag_peaks": {tag.value: n_bytes for tag, n_bytes in timeline.tag_peaks(tier).items()},
        "mean_bytes": timeline.mean_bytes(tier),
        "pages_touched": use.peak_pages if use else 0,
        "planned_pages": use and use.planned_peak_pages,
        "planned_at_most": use is not None and use.planned_with_commits,
    }


def _lanes(recording: Recording, elapsed_s: float) -> dict[str, Any]:
    events = {lane: recording.of(kind) for lane, kind in LANES.items()}
    counts = {"compute": len(recording.ops), "waits": sum(wait.training for wait in recording.waits)}
    found = {}
    for lane, intervals in lane_intervals(recording).items():
        busy_s = total_s(intervals)
        n_bytes = _bytes(events[lane]) if lane in events and lane != "update" else None
        found[lane] = {
            "busy_s": busy_s,
            "share": busy_s / elapsed_s if elapsed_s else 0.0,
            "count": counts[lane] if lane in counts else len(events[lane]),
            "bytes": n_bytes,
            "bytes_per_s": n_bytes / busy_s if n_bytes is not None and busy_s else None,
        }
    return found


def _by_cause(waits: Iterable[WaitSpan], *, named: bool) -> list[dict[str, Any]]:
    """Waits of the same cause as one row, also of the same tensor and thread if ``named``; most seconds first."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for wait in waits:
        cause = wait.cause
        said = {"lane": cause.lane, "reason": cause.reason}
        if named:
            thread = "training" if wait.training else "background"
            said = {"name": wait.name, **said, "blocker": cause.blocker, "thread": thread}
        row = rows.setdefault(tuple(said.values()), {**said, "count": 0, "total_s": 0.0, "longest_s": 0.0})
        row["count"] += 1
        row["total_s"] += wait.end_s - wait.start_s
        row["longest_s"] = max(row["longest_s"], wait.end_s - wait.start_s)
    return [rows[key] for key in sorted(rows, key=lambda key: (-rows[key]["total_s"], key))]


def _by_module(recording: Recording, context: Context) -> list[dict[str, Any]]:
    """What each unit holds, moved and computed, and how long it was waited for; most bytes moved first.

    Names decide: tensors that the model's units do not name are saved activations, or other.
    """
    owner = {tensor: module.name for module in context.modules for tensor in module.tensors}
    owner |= dict.fromkeys(context.activations, ACTIVATIONS)
    rows: defaultdict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(_MODULE_FIELDS, 0))
    for module in context.modules:
        for what, n_bytes in module.held.items():
            rows[module.name][what] += n_bytes

    def add(tensor: str, what: str, amount: float) -> None:
        rows[owner.get(tensor, OTHER)][what] += amount

    for event in recording.of(EventKind.READ):
        add(event.name, "read_bytes", event.n_bytes)
    for event in recording.of(EventKind.WRITE):
        add(event.name, "written_bytes", event.n_bytes)
    for op in recording.ops:
        add(op.tensor, "compute_s", op.end_s - op.start_s)
    for wait in recording.waits:
        if wait.training:
            tensor = wait.name.removeprefix("commit of ").removeprefix("update of ")
            add(tensor, "wait_s", wait.end_s - wait.start_s)
    by_moved = sorted(rows.items(), key=lambda item: (-item[1]["read_bytes"] - item[1]["written_bytes"], item[0]))
    return [{"name": name, **row} for name, row in by_moved]


# ---- on a terminal -----------------------------------------------------------------------------------------------


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as (what, value) pairs."""
    lanes, overhead = summary["lanes"], summary["overhead"]
    how = f"({summary['planned_steps']} by plan, {summary['deviations']} deviations)"
    causes = ", ".join(f"{cause['reason']} {cause['total_s']:.3f} s" for cause in summary["wait_causes"])
    rows = [("steps", f"{summary['steps']} {how}, {summary['elapsed_s']:.3f} s"), *_plan_rows(summary["plan"])]
    rows += [(f"{name} peak of budget", _peak(tier)) for name, tier in summary["tiers"].items()]
    if summary["mode"] == "lock-free":
        rows.append(("bytes planned", "those of the training thread; what the updater moves is not in the plan"))
    rows += [
        ("busy", ", ".join(f"{lane} {lanes[lane]['share']:.0%}" for lane in lanes if lane != "waits")),
        ("waiting for pages", f"{lanes['waits']['share']:.1%} of the time"),
        ("waits by cause", causes or "none"),
    ]
    waits = [wait for wait in summary["waits"] if wait["thread"] == "training"]
    for number, wait in enumerate(waits[:_TOP_WAITS], start=1):
        why = wait["reason"] + (f" ({wait['blocker']})" if wait["blocker"] else "")
        rows.append((f"wait {number}", f"{wait['total_s']:.3f} s in {wait['count']} for {wait['name']}: {why}"))
    for name, use in summary.get("locks", {}).items():
        taken, longest_ms = use["acquisitions"] / max(1, summary["steps"]), use["longest_hold_s"] * 1e3
        rows.append((f"lock of {name}", f"taken {taken:.0f} times a step, held {longest_ms:.2f} ms at most"))
    cost = f"{overhead['training_share']:.2%} of the time, in {overhead['calls']:,} calls"
    return [*rows, ("the recorder itself", cost), ("bottleneck", summary["bottleneck"])]


def _plan_rows(plan: Mapping[str, Mapping[str, float | None]]) -> list[tuple[str, str]]:
    rows = []
    for what, key, form in (
        ("step, mean against planned", "step_s", lambda value: f"{value:.3f} s"),
        ("read a step, against planned", "read_bytes", format_bytes),
        ("written a step, against planned", "written_bytes", format_bytes),
    ):
        measured, planned = plan[key]["measured"], plan[key]["planned"]
        said = "no whole step" if measured is None else form(measured)
        rows.append((what, f"{said}, {'no plan' if planned is None else form(planned)}"))
    return rows


def _peak(tier: Mapping[str, Any]) -> str:
    budget = "no limit" if tier["budget_bytes"] is None else format_bytes(tier["budget_bytes"])
    tags = ", ".join(f"{tag} {format_bytes(n)}" for tag, n in sorted(tier["peak_by_tag"].items(), key=lambda t: -t[1]))
    return f"{format_bytes(tier['peak_bytes'])} of {budget}: {tags}"
