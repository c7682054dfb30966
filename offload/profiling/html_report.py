"""The report of a profile: one HTML file that needs no network.

The page is `html_report.html` with `html_report.js` and the profile's data put in; the script draws everything from
them. The picture's data are cut into a fixed number of parts of equal time, so the file stays small however long the
profile is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from offload.profiling.summary import LANES, lane_intervals, span
from pagemem.folders.own_file import replace_file
from pagemem.telemetry.events import Event
from pagemem.telemetry.intervals import Interval, shares, without
from pagemem.telemetry.recorder import Recording
from pagemem.tier import Tag, Tier
from scheduler.planning.trace import OpKind

N_BUCKETS: Final = 1000
#: Of them, those that share one value of a bandwidth: a single move says little of it.
_PER_RATE: Final = 8


def report_data(recording: Recording, summary: dict[str, Any], n_buckets: int = N_BUCKETS) -> dict[str, Any]:
    """What the page draws: the summary, and the course of bytes, bandwidths and lanes over ``n_buckets`` parts of the
    time.

    Bytes stored on SSD are left out of the course, as they hardly change; what moves there is shown instead.
    """
    ends = [end - recording.begin_s for end in recording.step_ends_s]
    return {
        "summary": summary,
        "n_buckets": n_buckets,
        "step_ends_s": ends,
        "tiers": [_tier(recording, tier, n_buckets) for tier in recording.timeline.tiers if tier is not Tier.SSD],
        "lanes": _lanes(recording, n_buckets),
        "rates": {
            lane: _bandwidth(events, recording, max(1, n_buckets // _PER_RATE))
            for lane, kind in LANES.items()
            if lane != "update" and (events := recording.of(kind))
        },
    }


def _tier(recording: Recording, tier: Tier, n_buckets: int) -> dict[str, Any]:
    buckets = recording.timeline.buckets(tier, n_buckets)
    peaks = recording.timeline.tag_peaks(tier)
    tags = [tag for tag in Tag if tag in peaks]
    return {"name": tier.value, "tags": {tag.value: [bucket.get(tag, 0) for bucket in buckets] for tag in tags}}


def _lanes(recording: Recording, n_buckets: int) -> list[dict[str, Any]]:
    """What the training thread did, and the update kernels where there were any."""

    def course(intervals: Iterable[Interval]) -> list[float]:
        return [round(share, 3) for share in shares(intervals, recording.begin_s, recording.end_s, n_buckets)]

    lanes = lane_intervals(recording)
    ops = {kind.value: [(op.start_s, op.end_s) for op in recording.ops if op.phase == kind.value] for kind in OpKind}
    training = {phase: course(without(spans, lanes["waits"])) for phase, spans in ops.items() if spans}
    if lanes["waits"]:
        training["waiting"] = course(lanes["waits"])
    updates = [{"name": "updates", "parts": {"update": course(lanes["update"])}}] if lanes["update"] else []
    return [{"name": "training", "parts": training}, *updates]


def _bandwidth(events: Iterable[Event], recording: Recording, n_buckets: int) -> list[int]:
    """Bytes a second in each part of the time; a move's bytes are spread evenly over its duration."""
    width_s = (recording.end_s - recording.begin_s) / n_buckets
    found = [0.0] * n_buckets
    for event in events:
        begin, end = ((time_s - recording.begin_s) / width_s for time_s in span(event))
        end = max(end, begin + 1e-6)
        for bucket in range(max(0, int(begin)), min(n_buckets - 1, int(end)) + 1):
            inside = max(0.0, min(end, bucket + 1) - max(begin, bucket))
            found[bucket] += event.n_bytes * inside / (end - begin) / width_s
    return [round(rate) for rate in found]


def write_report(path: Path, recording: Recording, summary: dict[str, Any]) -> None:
    """Write the page."""
    folder = files("offload.profiling")
    page, script = (folder.joinpath(f"html_report.{kind}").read_text(encoding="utf-8") for kind in ("html", "js"))
    # "<" could end the script element that holds the data.
    data = json.dumps(report_data(recording, summary), separators=(",", ":")).replace("<", "\\u003c")
    replace_file(path, page.replace("{{SCRIPT}}", script).replace("{{DATA}}", data).encode())
