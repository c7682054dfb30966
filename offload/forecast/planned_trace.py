"""The planned step as a trace-event file, with the tracks of a profile's ``trace.json``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from offload.forecast.explained import Explained
from offload.profiling.perfetto import DOWNLOADS, NETWORK, PLANNED, write_trace
from pagemem.errors import StorageError
from pagemem.folders.own_file import draft_of, naming
from pagemem.folders.small_file import open_regular

#: How each file of `offload.profiling.perfetto` begins.
_BEGINNING: Final = b'{"displayTimeUnit":"ms","traceEvents":['


def check_trace_file(path: Path) -> None:
    """Raise StorageError unless a trace can be written there without a loss: nothing is there, or a trace is, and the
    folder exists."""
    if not path.parent.is_dir():
        raise StorageError(f"{path}: there is no folder {path.parent}; make it, or name a file elsewhere")
    for place in (path, draft_of(path)):
        if os.path.lexists(place) and not (place == path and _is_trace(path)):
            raise StorageError(f"{place} is there and is no trace; it is not replaced: remove it, or name another file")


def _is_trace(path: Path) -> bool:
    with naming("reading", path):
        try:
            fd, _ = open_regular(path, 1 << 40)
        except OSError:
            return False
        try:
            return os.read(fd, len(_BEGINNING)) == _BEGINNING
        finally:
            os.close(fd)


def write_planned_trace(path: Path, found: Explained) -> None:
    """A trace-event file of a cycle, with the tracks of a profile's.

    Raises:
        StorageError: it cannot be written, see `check_trace_file`.
    """
    check_trace_file(path)
    others = {track: found.others.get(track, ()) for track in (DOWNLOADS, NETWORK)}
    write_trace(path, found.recording, process=PLANNED, more=others)
