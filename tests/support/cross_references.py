"""Checks of every cross reference in the books of pages and frames: what must hold between any two calls."""

from __future__ import annotations

from pagemem.frames.allocator import PageAllocator
from pagemem.frames.free_runs import FreeRuns, SharedPages, _overlap
from pagemem.frames.page import Placement, TensorId
from pagemem.residency.host_mover import HostMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import IN_FLIGHT, Residency
from pagemem.units import BLOCK_BYTES, ceil_div


def check_mover(mover: Mover) -> None:
    """Raise AssertionError where the records of a mover and its allocators differ."""
    with mover.changed:
        check_frames(mover.host)
        if isinstance(mover, HostMover):
            check_frames(mover.ssd)
        for tensor in mover.tensors.values():
            placed = mover.host.placements.get(tensor.id)
            if (placed is None) != (tensor.frame is None):
                raise AssertionError(f"{tensor.name}: frame {tensor.frame} but host placement {placed}")
            in_host = tensor.readable or tensor.state in IN_FLIGHT
            if in_host != (tensor.frame is not None):
                raise AssertionError(f"{tensor.name}: {tensor.state.value} with frame {tensor.frame}")
            if tensor.state is Residency.STORED and not tensor.ssd_valid:
                raise AssertionError(f"{tensor.name}: stored, but the tier below does not hold it")
            if tensor.origin is not None and (tensor.copy is not None or not tensor.ssd_valid):
                raise AssertionError(
                    f"{tensor.name}: {tensor.state.value} with an origin and a copy, or a stale origin"
                )


def check_frames(book: PageAllocator) -> None:
    """Raise AssertionError where an invariant of an allocator does not hold; the message names the frame or tensor."""
    _check_free(book.free)
    _check_shared(book.shared)
    end = 0
    for start, length in sorted([*book.free.by_start.items(), *((start, length) for start, length, _ in book.taken())]):
        if start != end or length <= 0:
            raise AssertionError(f"frames {min(start, end)}..{max(start, end)} have two owners or none")
        end = start + length
    if end != book.n_frames:
        raise AssertionError(f"{end} frames are accounted for, there are {book.n_frames}")
    for tensor, placed in book.placements.items():
        _check_placement(book, tensor, placed)
    n_tails = sum(len(tails) for tails in book.shared.tails.values())
    if sum(len(placed.runs) for placed in book.placements.values()) != len(book._runs):
        raise AssertionError("a run belongs to a tensor that does not know it")
    if sum(placed.tail is not None for placed in book.placements.values()) != n_tails:
        raise AssertionError("a tail belongs to a tensor that does not know it")
    if book.peak_frames < book.used_frames:
        raise AssertionError(f"{book.used_frames} frames are used, more than the peak of {book.peak_frames}")


def _check_placement(book: PageAllocator, tensor: TensorId, placed: Placement) -> None:
    if placed.tensor != tensor or placed.tier is not book.tier:
        raise AssertionError(f"tensor {tensor} of the {book.tier.value} tier is recorded with {placed}")
    for run in placed.runs:
        if book._runs.get(run.first) != (run.n_frames, tensor):
            raise AssertionError(f"tensor {tensor}: {run} is not in the index of runs")
    if placed.tail is not None and (placed.tail, tensor) not in book.shared.tails.get(placed.tail.frame, ()):
        raise AssertionError(f"tensor {tensor}: {placed.tail} is not in the index of shared pages")
    tail_bytes = placed.tail.length_bytes if placed.tail is not None else 0
    n_whole = sum(run.n_frames for run in placed.runs)
    if n_whole != ceil_div(placed.n_bytes - tail_bytes, book.page_bytes):
        raise AssertionError(f"tensor {tensor}: {placed} does not hold {placed.n_bytes} bytes")


def _check_free(runs: FreeRuns) -> None:
    if sorted((length, start) for start, length in runs.by_start.items()) != list(runs._by_length):
        raise AssertionError("free runs: the index by length is not that by place")
    if sum(runs.by_start.values()) != runs.n_frames:
        raise AssertionError(f"free runs: {runs.n_frames} frames counted, {sum(runs.by_start.values())} listed")
    end = -1
    for start, length in runs.by_start.items():
        if start <= end or length <= 0:
            raise AssertionError(f"free runs: ({start}, {length}) touches the run before it or is empty")
        end = start + length


def _check_shared(pages: SharedPages) -> None:
    for frame, there in pages.tails.items():
        if not 1 <= len(there) <= 2 or (len(there) == 2 and _overlap(there[0][0], there[1][0])):
            raise AssertionError(f"frame {frame} cannot hold {there}")
        for tail, tensor in there:
            inside = tail.offset_bytes >= 0 and tail.offset_bytes + tail.length_bytes <= pages._page_bytes
            if len(there) == 2 and all(other.offset_bytes for other, _ in there):
                raise AssertionError(f"neither of {there} begins at the start of frame {frame}")
            if tail.frame != frame or not inside or tail.length_bytes <= 0 or tail.offset_bytes % BLOCK_BYTES:
                raise AssertionError(f"{tail} of tensor {tensor} is not a block-aligned part of frame {frame}")
    room = sorted((pages._gap(frame)[1], frame) for frame, there in pages.tails.items() if len(there) == 1)
    if room != list(pages._room):
        raise AssertionError("the index of room in shared frames is not that of their tails")
