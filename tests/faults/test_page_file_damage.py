"""Page files whose bytes changed on the disk, or whose calls move less than asked: nothing wrong is ever returned."""

from __future__ import annotations

import errno
import os
import queue
import threading

import pytest
from page_file_bench import ALL, N_PAGES, PAGE_BYTES, REQUEST_PAGES, TIMEOUT_S, Bench, aligned, pages

from pagemem.errors import ChecksumError, StorageError
from pagemem.files.backend import MAX_STALLS
from pagemem.files.page_file import PAGE_FILE_NAME
from pagemem.frames.page import Extent, FrameId
from pagemem.units import BLOCK_BYTES

# ---- bytes that changed on the disk --------------------------------------------------------------------------------


@pytest.mark.parametrize("at_byte", [0, 5 * PAGE_BYTES + 1234, N_PAGES * PAGE_BYTES - 1])
@pytest.mark.parametrize("max_request_bytes", [BLOCK_BYTES * 5, 4 * PAGE_BYTES])
def test_a_flipped_byte_is_found_and_named(bench: Bench, at_byte: int, max_request_bytes: int) -> None:
    bench.open(max_request_bytes=max_request_bytes)
    source = aligned(N_PAGES * PAGE_BYTES)
    bench.write(ALL, source)
    flip(bench.files.paths[0], at_byte)
    frame = at_byte // PAGE_BYTES
    with pytest.raises(ChecksumError, match=rf"{PAGE_FILE_NAME}: frame {frame} .*xxh3 [0-9a-f]{{16}} and reads as"):
        bench.read(ALL)
    for extent in ALL:
        if extent.frame != frame:
            page = source[extent.frame * PAGE_BYTES : (extent.frame + 1) * PAGE_BYTES]
            assert bench.read([extent]) == page
    flip(bench.files.paths[0], at_byte)
    assert bench.read(ALL) == source


@pytest.mark.parametrize("max_request_bytes", [BLOCK_BYTES * 5, PAGE_BYTES])
def test_damaged_bytes_are_not_told_of(bench: Bench, max_request_bytes: int) -> None:
    bench.open(max_request_bytes=max_request_bytes)
    bench.write(ALL, aligned(N_PAGES * PAGE_BYTES))
    flip(bench.files.paths[0], 5 * PAGE_BYTES + 1234)
    told: list[tuple[int, int]] = []
    ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    bench.files.read(ALL, aligned(N_PAGES * PAGE_BYTES), ends.put, part=told.extend)
    assert isinstance(ends.get(timeout=TIMEOUT_S), ChecksumError)
    assert not any(start < 6 * PAGE_BYTES and end > 5 * PAGE_BYTES for start, end in told)


@pytest.mark.parametrize(("finishing_threads", "elsewhere"), [(None, "pagemem-finish"), (0, "pagemem-read-0")])
def test_with_a_request_waiting_another_thread_verifies(
    bench: Bench, finishing_threads: int | None, elsewhere: str
) -> None:
    """Three reads for one thread: it leaves verifying the first two to others, if there are any; a flipped byte is
    found there, too."""
    bench.open(threads_per_path=1, finishing_threads=finishing_threads)
    source = aligned(N_PAGES * PAGE_BYTES)
    bench.write(ALL, source)
    flip(bench.files.paths[0], 5 * PAGE_BYTES)
    begun = threading.Event()
    bench.backend.set_hook("read", lambda number: None if begun.wait(TIMEOUT_S) else 0)
    ends: queue.SimpleQueue[tuple[int, str, BaseException | None]] = queue.SimpleQueue()
    into = [aligned(REQUEST_PAGES * PAGE_BYTES) for _ in range(3)]
    for k in range(3):
        extents = pages(*range(k * REQUEST_PAGES, (k + 1) * REQUEST_PAGES))
        bench.files.read(extents, into[k], lambda error, k=k: ends.put((k, threading.current_thread().name, error)))  # type: ignore[misc]
    begun.set()
    found = sorted((ends.get(timeout=TIMEOUT_S) for _ in range(3)), key=lambda end: end[0])
    assert [name.rpartition("-")[0] for _, name, _ in found] == [elsewhere, elsewhere, "pagemem-read-0"]
    assert [type(error) for _, _, error in found] == [type(None), ChecksumError, type(None)]
    assert into[0] == source[: REQUEST_PAGES * PAGE_BYTES]


def flip(path: str, at_byte: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at_byte)
        (byte,) = file.read(1)
        file.seek(at_byte)
        file.write(bytes([byte ^ 0x10]))
        file.flush()
        os.fsync(file.fileno())


def test_a_flipped_byte_in_a_shared_page_blames_only_its_tensor(bench: Bench) -> None:
    bench.open()
    front, back = Extent(FrameId(2), 0, BLOCK_BYTES), Extent(FrameId(2), BLOCK_BYTES, BLOCK_BYTES)
    source = aligned(2 * BLOCK_BYTES)
    bench.write([front], source[:BLOCK_BYTES])
    bench.write([back], source[BLOCK_BYTES:])
    flip(bench.files.paths[0], 2 * PAGE_BYTES + BLOCK_BYTES)
    assert bench.read([front]) == source[:BLOCK_BYTES]
    with pytest.raises(ChecksumError, match="frame 2"):
        bench.read([back])


def test_without_checksums_nothing_is_verified(bench: Bench) -> None:
    bench.open(checksums=False)
    source = aligned(PAGE_BYTES)
    bench.write(pages(0), source)
    flip(bench.files.paths[0], 100)
    assert bench.read(pages(0)) != source


def test_a_file_cut_by_somebody_else_is_an_error(bench: Bench) -> None:
    bench.open(threads_per_path=1)
    bench.write(ALL, aligned(N_PAGES * PAGE_BYTES))
    os.truncate(bench.files.paths[0], 6 * PAGE_BYTES)
    with pytest.raises(StorageError, match=rf"reading .*{PAGE_FILE_NAME} at offset {6 * PAGE_BYTES}: 0 of .* been cut"):
        bench.read(ALL)


# ---- short calls and signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed_bytes", [BLOCK_BYTES, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 904])
@pytest.mark.parametrize("n_paths", [1, 2])
def test_short_calls_are_continued(bench: Bench, claimed_bytes: int, n_paths: int) -> None:
    bench.open(n_paths)
    bench.backend.set_hook("write", lambda call: claimed_bytes)
    bench.backend.set_hook("read", lambda call: claimed_bytes)
    source = aligned(N_PAGES * PAGE_BYTES)
    bench.write(ALL, source)
    assert bench.read(ALL) == source
    assert bench.backend.counts["read"] >= source.nbytes // claimed_bytes


def test_a_disk_that_moves_nothing_is_given_up(bench: Bench) -> None:
    bench.open()
    bench.backend.set_hook("write", lambda call: 100)
    with pytest.raises(StorageError, match="100 of .* bytes moved and no more would"):
        bench.write(pages(0), aligned(PAGE_BYTES))
    assert bench.backend.counts["write"] == MAX_STALLS + 1


def test_interrupted_calls_are_repeated(bench: Bench) -> None:
    bench.open()

    def interrupt(call: int) -> None:
        if call % 2 == 0:
            raise InterruptedError(errno.EINTR, "interrupted")

    bench.backend.set_hook("write", interrupt)
    bench.backend.set_hook("read", interrupt)
    source = aligned(N_PAGES * PAGE_BYTES)
    bench.write(ALL, source)
    assert bench.read(ALL) == source
