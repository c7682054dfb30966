"""The report of a profile: one HTML file that needs no network, and the short summary for a terminal.

The page is `html_report.html` with the profile's data put in; its script draws everything from them. The picture's data
are cut into a fixed number of parts of equal time, so the file stays small however long the profile is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from offload.console.tables import print_rows
from offload.profiling.summary import H2D, lane_intervals
from pagemem.folders.own_file import replace_file
from pagemem.telemetry.intervals import Interval, shares, without
from pagemem.telemetry.recorder import Recording
from pagemem.tier import Tag, Tier
from pagemem.units import format_bytes
from scheduler.planning.trace import OpKind

N_BUCKETS: Final = 1000
_PLACE: Final = "{{DATA}}"
_TOP_WAITS: Final = 5


def report_data(recording: Recording, summary: dict[str, Any], n_buckets: int = N_BUCKETS) -> dict[str, Any]:
    """What the page draws: the summary, and the course of bytes and lanes in ``n_buckets`` parts of the time."""
    ends = [end - recording.begin_s for end in recording.step_ends_s]
    return {
        "summary": summary,
        "n_buckets": n_buckets,
        "step_ends_s": ends,
        "tiers": [_tier(recording, tier, n_buckets) for tier in recording.timeline.tiers],
        "lanes": _lanes(recording, n_buckets)[: 1 if "plain" in summary else None],  # No page moves in plain PyTorch.
    }


def _tier(recording: Recording, tier: Tier, n_buckets: int) -> dict[str, Any]:
    buckets = recording.timeline.buckets(tier, n_buckets)
    peaks = recording.timeline.tag_peaks(tier)
    tags = [tag for tag in Tag if tag in peaks]
    return {"name": tier.value, "tags": {tag.value: [bucket.get(tag, 0) for bucket in buckets] for tag in tags}}


def _lanes(recording: Recording, n_buckets: int) -> list[dict[str, Any]]:
    waits = [(wait.start_s, wait.end_s) for wait in recording.waits if wait.training]

    def course(intervals: Iterable[Interval]) -> list[float]:
        return [round(share, 3) for share in shares(intervals, recording.begin_s, recording.end_s, n_buckets)]

    seen = {op.phase for op in recording.ops}
    phases = [kind.value for kind in OpKind if kind.value in seen]
    compute = {
        phase: course(without([(op.start_s, op.end_s) for op in recording.ops if op.phase == phase], waits))
        for phase in phases
    }
    lanes = lane_intervals(recording)
    others = [
        {"name": lane, "parts": {lane: course(lanes[lane])}}
        for lane in ("waits", "read", "write", H2D, "update")
        if lane in lanes
    ]
    return [{"name": "compute", "parts": compute}, *others]


def write_report(path: Path, recording: Recording, summary: dict[str, Any]) -> None:
    """Write the page."""
    page = files("offload.profiling").joinpath("html_report.html").read_text(encoding="utf-8")
    # "<" could end the script element that holds the data.
    data = json.dumps(report_data(recording, summary), separators=(",", ":")).replace("<", "\\u003c")
    replace_file(path, page.replace(_PLACE, data).encode())


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as (what, value) pairs, for the terminal."""
    steps, plan, overhead = summary["steps"], summary["plan"], summary["overhead"]
    rows = [
        (
            "steps",
            (
                f"{steps} ({summary['planned_steps']} by plan, {summary['deviations']} deviations), "
                f"{summary['elapsed_s']:.3f} s"
            ),
        )
    ]
    for what, key, form in (
        ("step, mean against planned", "step_s", lambda value: f"{value:.3f} s"),
        ("read a step, against planned", "read_bytes", format_bytes),
        ("written a step, against planned", "written_bytes", format_bytes),
    ):
        measured, planned = (plan[key][side] for side in ("measured", "planned"))
        rows.append(
            (
                what,
                (
                    f"{'no whole step' if measured is None else form(measured)}, "
                    f"{'no plan' if planned is None else form(planned)}"
                ),
            )
        )
    for name, tier in summary["tiers"].items():
        budget = "no limit" if tier["budget_bytes"] is None else format_bytes(tier["budget_bytes"])
        by_tag = ", ".join(
            f"{tag} {format_bytes(n)}" for tag, n in sorted(tier["peak_by_tag"].items(), key=lambda row: -row[1])
        )
        rows.append((f"{name} peak of budget", f"{format_bytes(tier['peak_bytes'])} of {budget}: {by_tag}"))
    if summary["mode"] == "lock-free":
        rows.append(("of what is moved", "the plan has the training thread's part, not the updater's"))
    lanes = summary["lanes"]
    rows.append(("busy", ", ".join(f"{lane} {lanes[lane]['share']:.0%}" for lane in lanes if lane != "waits")))
    rows.append(("waiting for pages", f"{lanes['waits']['share']:.1%} of the time"))
    causes = ", ".join(f"{cause['reason']} {cause['total_s']:.3f} s" for cause in summary["wait_causes"])
    rows.append(("waits by cause", causes or "none"))
    for number, wait in enumerate(
        [wait for wait in summary["waits"] if wait["thread"] == "training"][:_TOP_WAITS], start=1
    ):
        rows.append(
            (f"wait {number}", f"{wait['total_s']:.3f} s in {wait['count']} for {wait['name']}: {describe_cause(wait)}")
        )
    rows.append(
        ("the recorder itself", f"{overhead['training_share']:.2%} of the time, in {overhead['calls']:,} calls")
    )
    return rows


def describe_cause(wait: dict[str, Any]) -> str:
    """Why a wait of the summary came about, in words."""
    blocker = f" ({wait['blocker']})" if wait["blocker"] else ""
    return f"{wait['reason']}{blocker}"


def print_profile(summary: dict[str, Any], console: Console) -> None:
    """The summary: framed on a terminal, aligned plain text in a pipe."""
    print_rows("Profile", summary_rows(summary), console)
