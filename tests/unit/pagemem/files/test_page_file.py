"""Page files keep what they are given: one suite, run for the backend the disk allows and for aiofiles."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from opened_files import PAGE_BYTES, Buffer, Opener, Outcome, pages, read, write

from pagemem.errors import StorageError
from pagemem.files.direct import accepts_direct
from pagemem.files.page_file import PAGE_FILE_NAME, SLAB_BYTES
from pagemem.frames.page import Extent, FrameId
from pagemem.telemetry.intervals import union
from pagemem.units import BLOCK_BYTES, KiB, MiB


@pytest.fixture(params=[None, False], ids=["probed", "aiofiles"])
def opened(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Opener]:
    """An opener for each backend; afterwards no thread and no descriptor is left."""
    threads, descriptors = set(threading.enumerate()), os.listdir("/proc/self/fd")
    opener = Opener(tmp_path, request.param)
    with opener.stack:
        yield opener
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_the_probe_decides_the_backend(opened: Opener, tmp_path: Path) -> None:
    direct = opened.direct is None and accepts_direct(tmp_path)
    assert opened().backend_name == ("direct" if direct else "aiofiles")
    assert {entry.name for entry in (tmp_path / "ssd0").iterdir()} == {PAGE_FILE_NAME, "pagemem.json", "pagemem.lock"}


@pytest.mark.parametrize("page_bytes", [64 * KiB, MiB, 4 * MiB])
@pytest.mark.parametrize(("checksums", "finishing_threads"), [(True, None), (True, 0), (False, None), (False, 0)])
def test_scattered_pages_come_back_in_order(
    opened: Opener, page_bytes: int, checksums: bool, finishing_threads: int | None
) -> None:
    files = opened(
        page_bytes=page_bytes,
        n_frames=16,
        checksums=checksums,
        finishing_threads=finishing_threads,
        max_request_bytes=MiB,
    )
    first, second = pages(3, 4, 5, 9, 1, page_bytes=page_bytes), pages(0, 2, 15, 6, page_bytes=page_bytes)
    a, b = Buffer(5 * page_bytes), Buffer(4 * page_bytes)
    write(files, first, a.view)
    write(files, second, b.view)
    assert read(files, first) == a.view
    assert read(files, second) == b.view
    assert read(files, first[3:4]) == a.view[3 * page_bytes : 4 * page_bytes]


def test_two_tensors_share_a_page(opened: Opener) -> None:
    files = opened()
    half = PAGE_BYTES // 2
    front, back = Extent(FrameId(7), 0, half - BLOCK_BYTES), Extent(FrameId(7), half, half)
    a, b, c = Buffer(PAGE_BYTES + front.length_bytes), Buffer(half), Buffer(half)
    write(files, [*pages(6), front], a.view)
    write(files, [back], b.view)
    assert read(files, [*pages(6), front]) == a.view
    write(files, [back], c.view)
    assert read(files, [front]) == a.view[PAGE_BYTES:]
    assert read(files, [back]) == c.view


def test_a_frame_that_changed_hands_forgets_its_old_extents(opened: Opener) -> None:
    files = opened()
    whole, front = Extent(FrameId(0), 0, PAGE_BYTES), Extent(FrameId(0), 0, BLOCK_BYTES)
    back = Extent(FrameId(0), BLOCK_BYTES, BLOCK_BYTES)
    for latest, gone in (
        (whole, []),
        (back, [whole]),
        (front, [whole]),
        (whole, [front, back]),
        (front, [whole, back]),
    ):
        source = Buffer(latest.length_bytes)
        write(files, [latest], source.view)
        assert read(files, [latest]) == source.view
        for extent in gone:
            with pytest.raises(StorageError, match="no such extent was written"):
                read(files, [extent])


@pytest.mark.parametrize("n_paths", [1, 2, 3])
def test_frames_are_striped_over_paths(opened: Opener, n_paths: int) -> None:
    files = opened(n_paths, n_frames=64, max_request_bytes=4 * PAGE_BYTES)
    extents = pages(*range(5, 45))
    source = Buffer(40 * PAGE_BYTES)
    write(files, extents, source.view)
    assert read(files, extents) == source.view
    sizes = [os.stat(path).st_size // PAGE_BYTES for path in files.paths]
    assert sizes == {1: [64], 2: [32, 32], 3: [22, 21, 21]}[n_paths]
    # The bytes really lie where the striping says: no frame is stored twice or elsewhere.
    stored = sorted(chunk for path in files.paths for chunk in _chunks(Path(path).read_bytes()) if any(chunk))
    assert stored == sorted(_chunks(bytes(source.view)))


def _chunks(content: bytes) -> list[bytes]:
    return [content[i : i + PAGE_BYTES] for i in range(0, len(content), PAGE_BYTES)]


def test_growing_adds_whole_slabs_and_keeps_what_is_there(opened: Opener) -> None:
    files = opened(2, n_frames=0)
    assert files.n_frames == 0
    files.grow(1)
    assert files.n_frames == MiB // PAGE_BYTES
    source = Buffer(16 * PAGE_BYTES)
    write(files, pages(*range(16)), source.view)
    files.grow(16)
    assert files.n_frames == 16
    files.grow(17)
    assert files.n_frames == 32
    assert sum(os.stat(path).st_size for path in files.paths) == 2 * MiB
    assert all(os.stat(path).st_blocks * 512 >= MiB for path in files.paths), "reserved, not sparse"
    assert read(files, pages(*range(16))) == source.view
    write(files, pages(*range(16, 32)), source.view)
    assert read(files, pages(*range(16, 32))) == source.view


def test_the_default_slab(opened: Opener) -> None:
    assert opened(n_frames=1, slab_bytes=SLAB_BYTES).n_frames == 64 * MiB // PAGE_BYTES


def test_adjacent_pages_are_coalesced_and_counted(opened: Opener) -> None:
    files = opened(n_frames=64, max_request_bytes=MiB)
    source = Buffer(4 * MiB)
    write(files, pages(*range(64)), source.view)
    read(files, pages(*range(8), *range(32, 40)))
    assert (files.writes.n_bytes, files.reads.n_bytes) == (4 * MiB, 16 * PAGE_BYTES)
    assert files.writes.busy_s > 0 and files.reads.busy_s > 0
    assert [len(files.route(pages(*frames)).requests) for frames in (range(64), [*range(8), *range(32, 40)])] == [4, 2]


def test_an_extent_never_written_cannot_be_read(opened: Opener) -> None:
    files = opened()
    write(files, pages(1), Buffer(PAGE_BYTES).view)
    with pytest.raises(StorageError, match=rf"{PAGE_FILE_NAME}: frame 2, offset 0, 65536 bytes: no such extent"):
        read(files, pages(1, 2))


def test_an_earlier_runs_file_is_reused_but_not_believed(opened: Opener) -> None:
    files = opened(n_frames=32)
    source = Buffer(PAGE_BYTES)
    write(files, pages(3), source.view)
    files.sync()
    opened.stack.close()
    again = opened(n_frames=16)
    with pytest.raises(StorageError, match="no such extent"):
        read(again, pages(3))
    write(again, pages(3), source.view)
    assert read(again, pages(3)) == source.view


@pytest.mark.parametrize("kind", ["write", "read", "failing read"])
def test_done_comes_once_from_an_io_thread_with_the_buffer_free(opened: Opener, kind: str) -> None:
    files = opened(max_request_bytes=PAGE_BYTES)
    buffer, outcome = Buffer(8 * PAGE_BYTES), Outcome()
    errors: list[BaseException | None] = []

    def unmap(error: BaseException | None) -> None:
        errors.append(error)
        buffer.close()  # raises if anybody still holds it
        outcome(None)

    if kind == "read":
        write(files, pages(*range(8)), buffer.view)
    begin = files.write if kind == "write" else files.read
    begin(pages(*range(8)), buffer.view, unmap)
    outcome.wait()
    files.close()
    assert outcome.calls.empty() and files.failure is None
    # Whichever job ends last: a request's own thread, or one that finishes what others have moved.
    assert outcome.thread_name.startswith(
        ("pagemem-write-0-" if kind == "write" else "pagemem-read-0-", "pagemem-finish-")
    )
    assert [type(error) for error in errors] == [StorageError if kind == "failing read" else type(None)]


@pytest.mark.parametrize("finishing_threads", [None, 0])
@pytest.mark.parametrize("max_request_bytes", [BLOCK_BYTES * 5, PAGE_BYTES, 4 * PAGE_BYTES])
@pytest.mark.parametrize("checksums", [True, False])
def test_a_read_tells_of_bytes_as_they_come(
    opened: Opener, checksums: bool, max_request_bytes: int, finishing_threads: int | None
) -> None:
    files = opened(
        2,
        max_request_bytes=max_request_bytes,
        checksums=checksums,
        finishing_threads=finishing_threads,
        threads_per_path=2,
    )
    source, into, outcome = Buffer(9 * PAGE_BYTES), Buffer(9 * PAGE_BYTES, random=False), Outcome()
    told: list[tuple[int, int]] = []

    def part(spans: Sequence[tuple[int, int]]) -> None:
        for start, end in spans:
            assert into.view[start:end] == source.view[start:end] and outcome.calls.empty()
            told.append((start, end))

    write(files, pages(5, 3, 4, 7, 9, 20, 21, 22, 23), source.view)
    files.read(pages(5, 3, 4, 7, 9, 20, 21, 22, 23), into.view, outcome, part=part)
    outcome.wait()
    assert (
        len(told) > 1
        and union(told) == [(0, 9 * PAGE_BYTES)]
        and sum(end - start for start, end in told) == 9 * PAGE_BYTES
    )


def test_done_may_begin_the_next_transfer(opened: Opener) -> None:
    files = opened()
    source, into, outcome = Buffer(PAGE_BYTES), Buffer(PAGE_BYTES), Outcome()

    def read_back(error: BaseException | None) -> None:
        assert error is None
        files.read(pages(5), into.view, outcome)

    files.write(pages(5), source.view, read_back)
    outcome.wait()
    assert into.view == source.view


def test_a_callback_that_raises_is_reported_and_harms_nobody(opened: Opener) -> None:
    files = opened(threads_per_path=1)
    source = Buffer(PAGE_BYTES)
    oops = RuntimeError("a callback's bug")

    def raising(error: BaseException | None) -> None:
        raise oops

    files.write(pages(0), source.view, raising)
    write(files, pages(1), source.view)  # the one thread lives on
    assert files.failure is oops
    with pytest.raises(RuntimeError, match="a callback's bug"):
        files.close()
    files.close()


def test_closing_is_final(opened: Opener) -> None:
    files = opened()
    source = Buffer(PAGE_BYTES)
    files.close()
    files.close()
    for begin in (files.read, files.write):
        with pytest.raises(StorageError, match="closed"):
            begin(pages(0), source.view, Outcome())


def test_reads_and_writes_share_the_limit(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("pagemem.files.rate_limit.TokenBucket.take", lambda bucket, n_bytes: taken.append(n_bytes))
    files = opened(limit_mb_per_s=1e6)
    write(files, pages(*range(8)), Buffer(8 * PAGE_BYTES).view)
    read(files, pages(*range(3)))
    assert sum(taken) == 11 * PAGE_BYTES


def test_the_stack_size_setting_is_put_back(opened: Opener) -> None:
    before = threading.stack_size()
    opened()
    assert threading.stack_size() == before


def test_a_buffer_must_be_aligned_writable_and_contiguous(opened: Opener) -> None:
    files = opened()
    outcome, buffer = Outcome(), Buffer(4 * PAGE_BYTES)
    with pytest.raises(ValueError, match="address .* is not a multiple of 4096"):
        files.write(pages(0), buffer.view[16 : 16 + PAGE_BYTES], outcome)
    with pytest.raises(ValueError, match="read-only"):
        files.read(pages(0), memoryview(bytes(PAGE_BYTES)), outcome)
    with pytest.raises(ValueError, match="not contiguous"):
        files.read(pages(0), buffer.view[: 2 * PAGE_BYTES : 2], outcome)
    with pytest.raises(ValueError, match="the buffer 262144"):
        files.write(pages(0), buffer.view, outcome)
    with pytest.raises(ValueError, match="among 64 frames"):
        files.write(pages(64), buffer.view[:PAGE_BYTES], outcome)
    assert outcome.calls.empty()


def test_buffers_of_other_formats_are_taken_as_bytes(opened: Opener) -> None:
    files = opened()
    source = Buffer(PAGE_BYTES)
    write(files, pages(0), np.frombuffer(source.view, dtype=np.float32).reshape(2, -1).data)
    assert read(files, pages(0)) == source.view
