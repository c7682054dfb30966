"""A recording as a trace-event file, which ui.perfetto.dev and chrome://tracing open.

One process. Its tracks: steps, ops of the training thread, its waits, updates, waits of other threads, and as many
tracks for reads and writes as were under way at a time. Counters: bytes of each tier by tag. Times are microseconds
from the beginning of the recording.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from offload.profiling.summary import span
from pagemem.folders.own_file import replace_file
from pagemem.telemetry.events import Event, EventKind
from pagemem.telemetry.intervals import tracks
from pagemem.telemetry.recorder import Recording, Wait

_PID: Final = 1
_STEPS, _COMPUTE, _WAITS, _UPDATES, _OTHER_WAITS, _UPLOADS, _READS, _WRITES, _COUNTERS = (
    1,
    2,
    3,
    100,
    200,
    250,
    300,
    400,
    500,
)
#: Name and, where several may be under way at a time, room for that many tracks.
_TITLES: Final = {
    _STEPS: "steps", _COMPUTE: "compute", _WAITS: "waits", _UPDATES: "updates", _OTHER_WAITS: "waits of other threads",
    _UPLOADS: "copies to the device", _READS: "read lane", _WRITES: "write lane", _COUNTERS: "bytes held",
}  # fmt: skip


def trace_events(recording: Recording) -> list[dict[str, Any]]:
    """Every event of the file; each has ph, ts, pid, tid and name."""
    events = list(_slices(recording))
    used = sorted({event["tid"] for event in events} | {_COUNTERS})
    return [
        _metadata("process_name", 0, "offload"),
        *(_thread_name(tid) for tid in used),
        *events,
        *_counters(recording),
    ]


def write_trace(path: Path, recording: Recording) -> None:
    """Write the file, one event a line."""
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in trace_events(recording))
    replace_file(path, f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n'.encode())


def _slices(recording: Recording) -> Iterator[dict[str, Any]]:
    begins = [recording.begin_s, *recording.step_ends_s]
    for number, (begin, end) in enumerate(zip(begins, recording.step_ends_s, strict=False), start=1):
        yield _slice(recording, _STEPS, f"step {number}", "step", begin, end, {})
    for op in recording.ops:
        yield _slice(
            recording, _COMPUTE, op.name, op.phase, op.start_s, op.end_s, {"phase": op.phase, "bytes": op.n_bytes}
        )
    yield from _wait_slices(recording, _WAITS, [wait for wait in recording.waits if wait.training])
    yield from _wait_slices(recording, _OTHER_WAITS, [wait for wait in recording.waits if not wait.training])
    kinds = (
        (_UPDATES, EventKind.UPDATE),
        (_UPLOADS, EventKind.UPLOAD),
        (_READS, EventKind.READ),
        (_WRITES, EventKind.WRITE),
    )
    for first, kind in kinds:
        yield from _event_slices(recording, first, recording.of(kind))
    for event in recording.of(EventKind.DEVIATION):
        ts = _us(recording, event.start_s)
        yield {"name": event.name, "cat": "deviation", "ph": "i", "s": "t", "ts": ts, "pid": _PID, "tid": _COMPUTE}


def _event_slices(recording: Recording, first: int, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    for event, track in zip(events, tracks([span(event) for event in events]), strict=True):
        begin, end = span(event)
        yield _slice(recording, first + track, event.name, event.kind.value, begin, end, {"bytes": event.n_bytes})


def _wait_slices(recording: Recording, first: int, waits: Sequence[Wait]) -> Iterator[dict[str, Any]]:
    for wait, track in zip(waits, tracks([(wait.start_s, wait.end_s) for wait in waits]), strict=True):
        why = {
            "bytes": wait.n_bytes,
            "lane": wait.cause.lane,
            "reason": wait.cause.reason,
            "blocker": wait.cause.blocker,
        }
        yield _slice(recording, first + track, wait.name, "wait", wait.start_s, wait.end_s, why)


def _slice(
    recording: Recording, tid: int, name: str, category: str, begin_s: float, end_s: float, args: dict[str, Any]
) -> dict[str, Any]:
    begin_s = max(begin_s, recording.begin_s)  # What was under way before is cut.
    ts, end = _us(recording, begin_s), _us(recording, end_s)
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": ts,
        "dur": round(end - ts, 3),
        "pid": _PID,
        "tid": tid,
        "args": args,
    }


def _counters(recording: Recording) -> Iterable[dict[str, Any]]:
    for tier in recording.timeline.tiers:
        tags = list(recording.timeline.tag_peaks(tier))
        for sample in recording.timeline.samples(tier):
            values = {tag.value: sample.by_tag.get(tag, 0) for tag in tags}
            ts = _us(recording, sample.time_s)
            yield {"name": f"{tier.value} bytes", "ph": "C", "ts": ts, "pid": _PID, "tid": _COUNTERS, "args": values}


def _us(recording: Recording, time_s: float) -> float:
    return round((time_s - recording.begin_s) * 1e6, 3)


def _metadata(name: str, tid: int, value: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "ts": 0, "pid": _PID, "tid": tid, "args": {"name": value}}


def _thread_name(tid: int) -> dict[str, Any]:
    first = max(start for start in _TITLES if start <= tid)
    title = _TITLES[first] if first == tid else f"{_TITLES[first]} {tid - first + 1}"
    return _metadata("thread_name", tid, title)
