"""The pure arithmetic under the page files: striping frames over paths, and cutting transfers into requests."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemem.files.requests import MAX_BUFFERS, plan_requests, tabulate
from pagemem.files.striping import MAX_PATHS, Striping
from pagemem.frames.page import Extent, FrameId
from pagemem.units import BLOCK_BYTES, KiB, MiB

PAGE_BYTES = 64 * KiB


def located(striping: Striping, n_frames: int) -> list[tuple[int, int]]:
    paths, file_frames = striping.locate(np.arange(n_frames))
    return list(zip(paths.tolist(), file_frames.tolist()))


@given(st.integers(1, 5), st.integers(0, 300))
def test_frames_fill_each_file_once_and_without_gaps(n_paths: int, n_frames: int) -> None:
    striping = Striping(n_paths)
    expected = {(path, frame) for path, n in enumerate(striping.file_frames(n_frames)) for frame in range(n)}
    found = located(striping, n_frames)
    assert len(found) == n_frames
    assert set(found) == expected


def test_frames_are_dealt_out_in_turn() -> None:
    assert located(Striping(3), 5) == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert Striping(3).file_frames(5) == [2, 2, 1]


@pytest.mark.parametrize("n_paths", [0, MAX_PATHS + 1])
def test_the_number_of_paths_is_limited(n_paths: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 64 paths are supported, not {n_paths}"):
        Striping(n_paths)


@st.composite
def transfers(draw: st.DrawFn) -> tuple[list[Extent], int]:
    """Extents of one tensor, as an allocator would place them but in any order, and a page size."""
    page_bytes = PAGE_BYTES << draw(st.integers(0, 3))
    runs = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=5))
    frames = list(dict.fromkeys(f for first, n in runs for f in range(first, first + n)))
    extents = [Extent(FrameId(frame), 0, page_bytes) for frame in frames]
    cut_blocks = draw(st.integers(0, page_bytes // BLOCK_BYTES - 1))
    if cut_blocks:  # the last page is shared: this tensor has its end or its beginning
        offset = draw(st.sampled_from([0, cut_blocks * BLOCK_BYTES]))
        extents[-1] = Extent(extents[-1].frame, offset, page_bytes - cut_blocks * BLOCK_BYTES)
    return extents, page_bytes


@given(transfers(), st.integers(1, 3), st.sampled_from([4096, 20480, PAGE_BYTES, 3 * PAGE_BYTES, MiB]))
def test_requests_move_every_byte_once_to_its_place(
    transfer: tuple[list[Extent], int], n_paths: int, max_request_bytes: int
) -> None:
    extents, page_bytes = transfer
    striping = Striping(n_paths)
    table = tabulate(extents, striping, page_bytes, 60)
    requests = plan_requests(table, n_paths, page_bytes, max_request_bytes)
    known_by = list(zip(table.keys.places.tolist(), table.keys.spans.tolist()))
    assert known_by == [(2 * e.frame + int(e.offset_bytes > 0), e.offset_bytes << 32 | e.length_bytes) for e in extents]

    moved: dict[tuple[int, int], int] = {}  # (path, block of the file) -> block of the buffer
    for request in requests:
        assert request.n_bytes == sum(end - start for start, end in request.spans) <= max_request_bytes
        blocks = [b for start, end in request.spans for b in range(start // BLOCK_BYTES, end // BLOCK_BYTES)]
        for i, block in enumerate(blocks):
            key = request.path, request.position_bytes // BLOCK_BYTES + i
            assert key not in moved
            moved[key] = block

    expected: dict[tuple[int, int], int] = {}
    block = 0
    for extent in extents:
        (path,), (file_frame,) = striping.locate(np.array([extent.frame]))
        first = (int(file_frame) * page_bytes + extent.offset_bytes) // BLOCK_BYTES
        for i in range(extent.length_bytes // BLOCK_BYTES):
            expected[int(path), first + i] = block
            block += 1
    assert moved == expected
    led = sorted(int(row) for request in requests if request.leads for row in request.rows)
    assert led == list(range(len(extents))), "each extent's checksum has one request that computes it"


def test_adjacent_pages_become_few_long_requests() -> None:
    extents = [Extent(FrameId(frame), 0, PAGE_BYTES) for frame in range(256)]
    for n_paths in (1, 2, 4):
        table = tabulate(extents, Striping(n_paths), PAGE_BYTES, 256)
        requests = plan_requests(table, n_paths, PAGE_BYTES, 4 * MiB)
        assert [request.n_bytes for request in requests] == [4 * MiB] * 4
        # One path: memory is adjacent too. Several: each page is a buffer of its own.
        assert {len(request.spans) for request in requests} == {1 if n_paths == 1 else 64}


def test_vectors_stay_within_what_the_system_accepts() -> None:
    n_frames = 2 * MAX_BUFFERS + 2
    extents = [Extent(FrameId(frame), 0, PAGE_BYTES) for frame in range(n_frames)]
    table = tabulate(extents, Striping(2), PAGE_BYTES, n_frames)
    requests = plan_requests(table, 2, PAGE_BYTES, 1 << 40)
    assert sorted(len(request.spans) for request in requests) == [1, 1, MAX_BUFFERS, MAX_BUFFERS]


def test_a_page_above_the_limit_is_cut_into_equal_parts() -> None:
    table = tabulate([Extent(FrameId(0), 0, 10 * MiB)], Striping(1), 16 * MiB, 1)
    requests = plan_requests(table, 1, 16 * MiB, 4 * MiB)
    assert len(requests) == 3
    assert max(request.n_bytes for request in requests) - min(request.n_bytes for request in requests) < 4 * BLOCK_BYTES
    assert [request.leads for request in requests] == [True, False, False]
    assert [request.n_parts for request in requests] == [3, 3, 3]


@pytest.mark.parametrize(
    "extent",
    [
        Extent(FrameId(-1), 0, PAGE_BYTES),
        Extent(FrameId(4), 0, PAGE_BYTES),
        Extent(FrameId(0), 100, BLOCK_BYTES),
        Extent(FrameId(0), -BLOCK_BYTES, BLOCK_BYTES),
        Extent(FrameId(0), 0, 100),
        Extent(FrameId(0), 0, 0),
        Extent(FrameId(0), BLOCK_BYTES, PAGE_BYTES),
    ],
)
def test_an_extent_outside_its_page_or_off_the_grid_is_refused(extent: Extent) -> None:
    with pytest.raises(ValueError, match="whole 4096-byte blocks") as caught:
        tabulate([Extent(FrameId(1), 0, PAGE_BYTES), extent], Striping(1), PAGE_BYTES, 4)
    assert repr(extent) in str(caught.value)


def test_a_table_has_extents() -> None:
    with pytest.raises(ValueError, match="no extents"):
        tabulate([], Striping(1), PAGE_BYTES, 4)
