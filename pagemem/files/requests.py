"""How the extents of one transfer become requests to the operating system. Pure arithmetic over arrays.

Extents that lie side by side in a page file are coalesced, up to a limit, whatever their places in memory; an extent
above the limit is cut. What a request does when its turn comes is `pagemem.files.page_file`'s business.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from pagemem.files.checksums import ExtentKeys
from pagemem.files.striping import IntArray, Striping
from pagemem.frames.page import Extent
from pagemem.units import BLOCK_BYTES, ceil_div, round_up

#: Linux refuses longer vectors (IOV_MAX).
MAX_BUFFERS: Final = 1024


@dataclass(frozen=True, slots=True)
class ExtentTable:
    """One transfer's extents, a column each, in the order of their bytes in the buffer."""

    frames: IntArray
    offsets: IntArray
    lengths: IntArray
    starts: IntArray
    """Where in the buffer each extent begins."""
    paths: IntArray
    positions: IntArray
    """Where in the path's file each extent begins."""
    keys: ExtentKeys

    def __len__(self) -> int:
        return len(self.frames)


def tabulate(extents: Sequence[Extent], striping: Striping, page_bytes: int, n_frames: int) -> ExtentTable:
    """Check extents and find their places.

    Raises:
        ValueError: an extent is empty, not aligned, or outside its page or the frames there are.
    """
    if not extents:
        raise ValueError("no extents given; a transfer has at least one")
    columns: IntArray = np.array([(e.frame, e.offset_bytes, e.length_bytes) for e in extents], dtype=np.int64)
    frames, offsets, lengths = columns.T
    bad = (frames < 0) | (frames >= n_frames) | (offsets < 0) | (lengths <= 0) | (offsets + lengths > page_bytes)
    bad |= (offsets | lengths) % BLOCK_BYTES != 0
    if bad.any():
        raise ValueError(
            f"{extents[int(np.flatnonzero(bad)[0])]} is not a run of whole {BLOCK_BYTES}-byte blocks of one page of "
            f"{page_bytes} bytes among {n_frames} frames"
        )
    ends = np.cumsum(lengths)
    paths, file_frames = striping.locate(frames)
    positions = file_frames * page_bytes + offsets
    keys = ExtentKeys.of(frames, offsets, lengths)
    return ExtentTable(frames, offsets, lengths, ends - lengths, paths, positions, keys)


@dataclass(frozen=True, slots=True)
class Request:
    """Adjacent bytes of one file, to be moved in one call if the system does not cut it short.

    Attributes:
        path: index of the file.
        position_bytes: where in the file it begins.
        n_bytes: its length, at most the limit.
        spans: [start, end) in the buffer, in the file's order; joined where memory is adjacent too.
        rows: the table's rows it covers; a part of a cut extent names that one row.
        leads: whether it is the first part; always so for an extent that is not cut.
        n_parts: into how many requests its only extent is cut; 1 where nothing is cut.
    """

    path: int
    position_bytes: int
    n_bytes: int
    spans: tuple[tuple[int, int], ...]
    rows: IntArray
    leads: bool = True
    n_parts: int = 1


@dataclass(frozen=True, slots=True)
class Route:
    """Extents and the requests that move them; made once for a placement and used for every transfer of it."""

    table: ExtentTable
    requests: tuple[Request, ...]
    n_bytes: int


def plan_requests(table: ExtentTable, n_paths: int, page_bytes: int, max_request_bytes: int) -> list[Request]:
    """Requests that together move each extent once, none longer than ``max_request_bytes``."""
    requests: list[Request] = []
    pages_per_request = min(max(1, max_request_bytes // page_bytes), MAX_BUFFERS)
    for path in range(n_paths):
        rows = np.flatnonzero(table.paths == path)
        for group in _coalesce(table, rows, pages_per_request):
            request = _joined(table, path, group)
            requests.extend([request] if request.n_bytes <= max_request_bytes else _cut(request, max_request_bytes))
    return requests


def _coalesce(table: ExtentTable, rows: IntArray, pages_per_request: int) -> list[IntArray]:
    """Cut a file's rows where they are not adjacent in it, and every ``pages_per_request`` rows."""
    if len(rows) == 0:
        return []
    positions, order = table.positions[rows], np.arange(len(rows))
    breaks = np.ones(len(rows), dtype=np.bool_)
    breaks[1:] = positions[1:] != positions[:-1] + table.lengths[rows[:-1]]
    run_starts = np.maximum.accumulate(np.where(breaks, order, 0))
    # Inside a run all but the ends are whole pages, so rows count pages.
    breaks |= (order - run_starts) % pages_per_request == 0
    return np.split(rows, np.flatnonzero(breaks)[1:])


def _joined(table: ExtentTable, path: int, rows: IntArray) -> Request:
    starts = table.starts[rows].tolist()
    lengths = table.lengths[rows].tolist()
    spans: list[tuple[int, int]] = []
    for start, length in zip(starts, lengths):
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], start + length)
        else:
            spans.append((start, start + length))
    return Request(path, int(table.positions[rows[0]]), sum(lengths), tuple(spans), rows)


def _cut(request: Request, max_request_bytes: int) -> list[Request]:
    """Parts of a single extent's request, about equal and block-aligned."""
    ((start, end),) = request.spans
    n_parts = ceil_div(request.n_bytes, max_request_bytes)
    part_bytes = round_up(ceil_div(request.n_bytes, n_parts), BLOCK_BYTES)
    cuts = [*range(start, end, part_bytes), end]
    return [
        replace(
            request,
            position_bytes=request.position_bytes + a - start,
            n_bytes=b - a,
            spans=((a, b),),
            leads=a == start,
            n_parts=len(cuts) - 1,
        )
        for a, b in itertools.pairwise(cuts)
    ]
