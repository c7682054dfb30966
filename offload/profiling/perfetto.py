"""A recording as a trace-event file, which ui.perfetto.dev and chrome://tracing open.

One process, or the *planned* one, of a step as `offload plan` predicts it, with tracks of the same names. Its tracks,
in this order: steps, ops and waits of the training thread, updates, waits of other threads, and as many tracks for
reads, writes and copies as were under way at a time. Counters: bytes of each tier by tag, of what is recorded. Times
are microseconds from the beginning of the recording.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from offload.profiling.summary import LANES, span
from pagemem.folders.own_file import replace_file
from pagemem.telemetry.events import EventKind
from pagemem.telemetry.intervals import Interval, tracks
from pagemem.telemetry.recorder import Recording

#: Names of the process: what was recorded, and what is predicted. Files of both can be joined.
RECORDED: Final = "offload"
PLANNED: Final = "offload, planned"
_PIDS: Final = {RECORDED: 1, PLANNED: 2}
#: Room for that many tracks with one title, where several moves may be under way at a time.
_ROOM: Final = 100
#: Tracks of what is planned and not recorded.
DOWNLOADS: Final = "copies from the device"
NETWORK: Final = "network"
#: In the order in which they are shown.
_TITLES: Final = (
    "steps", "compute", "waits", "updates", "waits of other threads", "copies to the device", "SSD reads", "SSD writes",
    "bytes held", DOWNLOADS, NETWORK,
)  # fmt: skip
_TITLE_OF_LANE: Final = {"update": "updates", "h2d": "copies to the device", "read": "SSD reads", "write": "SSD writes"}
#: Names of chrome://tracing's palette: grey computes, red waits, as in the report. Perfetto colours by name instead.
_COLOURS: Final = {"forward": "grey", "backward": "generic_work", "update": "generic_work", "wait": "terrible"}


class TrackPiece(NamedTuple):
    """A piece of a track: a span of time with a name."""

    name: str
    category: str
    interval: Interval
    args: dict[str, Any]


def trace_events(
    recording: Recording, *, process: str = RECORDED, more: Mapping[str, Sequence[TrackPiece]] | None = None
) -> list[dict[str, Any]]:
    """Every event of the file; each has ph, ts, pid, tid and name.

    Args:
        process: `RECORDED` or `PLANNED`. more: pieces of further tracks, by title.
    """
    events = [
        _event(recording, tid + track, piece)
        for title, pieces in {**_slices(recording), **(more or {})}.items()
        for tid in [_TITLES.index(title) * _ROOM + 1]
        for piece, track in zip(pieces, tracks([piece.interval for piece in pieces]), strict=True)
    ]
    points = [*_deviations(recording), *_counters(recording)]
    used = sorted({event["tid"] for event in (*events, *points)})
    named = [_metadata("process_name", 0, process), *(m for tid in used for m in _track(tid))]
    return [{**event, "pid": _PIDS[process]} for event in (*named, *events, *points)]


def write_trace(
    path: Path, recording: Recording, *, process: str = RECORDED, more: Mapping[str, Sequence[TrackPiece]] | None = None
) -> None:
    """Write the file, one event a line; see `trace_events`."""
    events = trace_events(recording, process=process, more=more)
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    replace_file(path, f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n'.encode())


def _slices(recording: Recording) -> dict[str, list[TrackPiece]]:
    begins = [recording.begin_s, *recording.step_ends_s]
    steps = enumerate(zip(begins, recording.step_ends_s, strict=False), start=1)
    found: dict[str, list[TrackPiece]] = {
        "steps": [TrackPiece(f"step {number}", "step", interval, {}) for number, interval in steps],
        "compute": [
            TrackPiece(op.name, op.phase, (op.start_s, op.end_s), {"phase": op.phase, "bytes": op.n_bytes})
            for op in recording.ops
        ],
        "waits": [],
        "waits of other threads": [],
    }
    for wait in recording.waits:
        why = {
            "bytes": wait.n_bytes,
            "lane": wait.cause.lane,
            "reason": wait.cause.reason,
            "blocker": wait.cause.blocker,
        }
        title = "waits" if wait.training else "waits of other threads"
        found[title].append(TrackPiece(wait.name, "wait", (wait.start_s, wait.end_s), why))
    for lane, kind in LANES.items():
        found[_TITLE_OF_LANE[lane]] = [
            TrackPiece(event.name, kind.value, span(event), {"bytes": event.n_bytes}) for event in recording.of(kind)
        ]
    return found


def _event(recording: Recording, tid: int, piece: TrackPiece) -> dict[str, Any]:
    begin_s, end_s = piece.interval
    ts = _us(recording, max(begin_s, recording.begin_s))  # What was under way before is cut.
    colour = {"cname": _COLOURS[piece.category]} if piece.category in _COLOURS else {}
    return {
        "name": piece.name, "cat": piece.category, "ph": "X", "ts": ts, "dur": round(_us(recording, end_s) - ts, 3),
        "tid": tid, "args": piece.args, **colour,
    }  # fmt: skip


def _deviations(recording: Recording) -> Iterator[dict[str, Any]]:
    tid = _TITLES.index("compute") * _ROOM + 1
    for event in recording.of(EventKind.DEVIATION):
        ts = _us(recording, event.start_s)
        yield {"name": event.name, "cat": "deviation", "ph": "i", "s": "t", "ts": ts, "tid": tid}


def _counters(recording: Recording) -> Iterable[dict[str, Any]]:
    tid = _TITLES.index("bytes held") * _ROOM + 1
    for tier in recording.timeline.tiers:
        tags = list(recording.timeline.tag_peaks(tier))
        for sample in recording.timeline.samples(tier):
            values = {tag.value: sample.by_tag.get(tag, 0) for tag in tags}
            ts = _us(recording, sample.time_s)
            yield {"name": f"{tier.value} bytes", "ph": "C", "ts": ts, "tid": tid, "args": values}


def _us(recording: Recording, time_s: float) -> float:
    return round((time_s - recording.begin_s) * 1e6, 3)


def _metadata(name: str, tid: int, value: str | int) -> dict[str, Any]:
    kind = "name" if isinstance(value, str) else "sort_index"
    return {"name": name, "ph": "M", "ts": 0, "tid": tid, "args": {kind: value}}


def _track(tid: int) -> list[dict[str, Any]]:
    title, number = _TITLES[tid // _ROOM], tid % _ROOM
    name = title if number == 1 else f"{title} {number}"
    return [_metadata("thread_name", tid, name), _metadata("thread_sort_index", tid, tid)]
