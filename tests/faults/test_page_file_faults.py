"""Page files when the disk misbehaves: nothing wrong is ever returned, nothing hangs, nothing that was good is lost."""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pagemem.errors import ChecksumError, DiskFullError, StorageError
from pagemem.io import MAX_STALLS, RawBackend, choose_backend
from pagemem.page import Extent, FrameId
from pagemem.page_file import PAGE_FILE_NAME, PageFiles
from pagemem.run_directory import RunDirectory
from pagemem.units import BLOCK_BYTES, KiB, MiB

PAGE_BYTES = 64 * KiB
N_PAGES = 16
REQUEST_PAGES = 4
N_REQUESTS = N_PAGES // REQUEST_PAGES
TIMEOUT_S = 30.0

#: Called before each raw call with its number; may raise, wait, or return how many bytes to claim were moved.
Hook = Callable[[int], int | None]


class FaultyBackend:
    """A real backend whose calls go through hooks; each kind of call is numbered from 0."""

    def __init__(self, inner: RawBackend) -> None:
        self.inner = inner
        self.hooks: dict[str, Hook] = {}
        self.counts: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.inner.name

    def set_hook(self, kind: str, hook: Hook) -> None:
        self.hooks[kind], self.counts[kind] = hook, 0

    def _enter(self, kind: str) -> int | None:
        with self._lock:
            number = self.counts.get(kind, 0)
            self.counts[kind] = number + 1
        return self.hooks[kind](number) if kind in self.hooks else None

    def open(self, path: str) -> int:
        return self.inner.open(path)

    def allocate(self, file: int, old_bytes: int, new_bytes: int) -> None:
        self._enter("allocate")
        self.inner.allocate(file, old_bytes, new_bytes)

    def shrink(self, file: int, n_bytes: int) -> None:
        self.inner.shrink(file, n_bytes)

    def read_into(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        return self._transfer(self.inner.read_into, "read", file, offset_bytes, buffers)

    def write_from(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        return self._transfer(self.inner.write_from, "write", file, offset_bytes, buffers)

    def _transfer(
        self, call: Callable[..., int], kind: str, file: int, offset_bytes: int, buffers: Sequence[memoryview]
    ) -> int:
        claimed_bytes = self._enter(kind)
        if claimed_bytes is None:
            return call(file, offset_bytes, buffers)
        whole_bytes = min(claimed_bytes, buffers[0].nbytes)
        whole_bytes -= whole_bytes % BLOCK_BYTES
        if whole_bytes:
            assert call(file, offset_bytes, [buffers[0][:whole_bytes]]) == whole_bytes
        return min(claimed_bytes, buffers[0].nbytes)

    def sync(self, file: int) -> None:
        self._enter("sync")
        self.inner.sync(file)

    def close(self) -> None:
        self.inner.close()


def failing_at(number: int, code: int) -> Hook:
    def hook(call: int) -> int | None:
        if call == number:
            raise OSError(code, os.strerror(code))
        return None

    return hook


def aligned(n_bytes: int) -> memoryview:
    """Fresh random bytes at a page boundary."""
    view = memoryview(mmap.mmap(-1, n_bytes))
    view[:] = os.urandom(n_bytes)
    return view


class Outcome:
    """A ``done`` that can be waited for and counts its calls."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def __call__(self, error: BaseException | None) -> None:
        self.calls.put(error)

    def wait(self) -> None:
        error = self.calls.get(timeout=TIMEOUT_S)
        if error is not None:
            raise error


def pages(*frames: int) -> list[Extent]:
    return [Extent(FrameId(frame), 0, PAGE_BYTES) for frame in frames]


ALL = pages(*range(N_PAGES))


class Bench:
    """Page files of 16 frames over a faulty backend, 4 pages a request."""

    def __init__(self, folder: Path, direct: bool | None, stack: ExitStack) -> None:
        self.folder, self.direct, self.stack = folder, direct, stack

    def open(self, n_paths: int = 1, **options: Any) -> PageFiles:
        directories = [self.stack.enter_context(RunDirectory(self.folder / f"ssd{i}")) for i in range(n_paths)]
        folders = [directory.path for directory in directories]
        self.backend = FaultyBackend(choose_backend(folders, direct=self.direct, n_workers=4))
        self.files = PageFiles(
            directories,
            backend=self.backend,
            **{"page_bytes": PAGE_BYTES, "slab_bytes": MiB, "max_request_bytes": REQUEST_PAGES * PAGE_BYTES, **options},
        )
        self.stack.callback(self.files.close)
        self.files.grow(N_PAGES)
        return self.files

    def write(self, extents: Sequence[Extent], source: memoryview) -> None:
        outcome = Outcome()
        self.files.write(extents, source, outcome)
        outcome.wait()
        assert outcome.calls.empty()

    def read(self, extents: Sequence[Extent]) -> memoryview:
        outcome, into = Outcome(), aligned(sum(extent.length_bytes for extent in extents))
        self.files.read(extents, into, outcome)
        outcome.wait()
        assert outcome.calls.empty()
        return into


@pytest.fixture(params=[None, False], ids=["probed", "aiofiles"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A bench for each backend; afterwards no thread and no descriptor is left."""
    threads, descriptors = set(threading.enumerate()), os.listdir("/proc/self/fd")
    with ExitStack() as stack:
        yield Bench(tmp_path, request.param, stack)
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


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


# ---- errors of the system ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(N_REQUESTS))
def test_a_failed_read_is_reported_once_and_loses_nothing(bench: Bench, number: int) -> None:
    bench.open()
    source = aligned(N_PAGES * PAGE_BYTES)
    bench.write(ALL, source)
    bench.backend.set_hook("read", failing_at(number, errno.EIO))
    with pytest.raises(StorageError, match=rf"reading .*{PAGE_FILE_NAME} at offset \d+, 262144 bytes: .*rror") as caught:
        bench.read(ALL)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.EIO
    assert bench.backend.counts["read"] > number, "the fault was reached"
    del bench.backend.hooks["read"]
    assert bench.read(ALL) == source


@pytest.mark.parametrize("number", range(N_REQUESTS))
def test_after_a_failed_write_no_torn_page_passes_for_whole(bench: Bench, number: int) -> None:
    bench.open()
    old, new = aligned(N_PAGES * PAGE_BYTES), aligned(N_PAGES * PAGE_BYTES)
    bench.write(ALL, old)
    bench.backend.set_hook("write", failing_at(number, errno.EIO))
    with pytest.raises(StorageError, match="writing"):
        bench.write(ALL, new)
    n_refused = 0
    for extent in ALL:
        page = slice(extent.frame * PAGE_BYTES, (extent.frame + 1) * PAGE_BYTES)
        try:
            assert bench.read([extent]) == old[page]
        except ChecksumError:
            n_refused += 1
    assert n_refused <= N_PAGES - REQUEST_PAGES, "the pages of the failed request are still the old ones"
    del bench.backend.hooks["write"]
    bench.write(ALL, new)
    assert bench.read(ALL) == new


def test_a_first_write_that_failed_left_nothing_to_read(bench: Bench) -> None:
    bench.open()
    bench.backend.set_hook("write", failing_at(N_REQUESTS - 1, errno.EIO))
    with pytest.raises(StorageError):
        bench.write(ALL, aligned(N_PAGES * PAGE_BYTES))
    for extent in ALL:
        with pytest.raises(StorageError, match="no such extent was written"):
            bench.read([extent])


@pytest.mark.parametrize("number", range(N_REQUESTS))
def test_without_checksums_what_a_failed_write_may_have_torn_is_refused(bench: Bench, number: int) -> None:
    bench.open(checksums=False)
    old, new = aligned((N_PAGES + 1) * PAGE_BYTES), aligned(N_PAGES * PAGE_BYTES)
    bench.files.grow(N_PAGES + 1)
    everything = pages(*range(N_PAGES + 1))
    bench.write(everything, old)
    bench.backend.set_hook("write", failing_at(number, errno.EIO))
    # The first page changes hands: only its first block is written, yet no byte of the old extent can be trusted.
    with pytest.raises(StorageError, match="writing"):
        bench.write([Extent(FrameId(0), 0, BLOCK_BYTES), *ALL[1:]], new[PAGE_BYTES - BLOCK_BYTES :])
    for extent in [Extent(FrameId(0), 0, BLOCK_BYTES), *ALL]:
        with pytest.raises(StorageError, match="no such extent was written"):
            bench.read([extent])
    assert bench.read(everything[-1:]) == old[-PAGE_BYTES:], "what the write did not touch is still there"
    del bench.backend.hooks["write"]
    bench.write(ALL, new)
    assert bench.read(ALL) == new


@pytest.mark.parametrize("at_byte", [0, BLOCK_BYTES])
def test_without_checksums_a_failed_write_spares_the_other_tensor_of_the_page(bench: Bench, at_byte: int) -> None:
    bench.open(checksums=False)
    source = aligned(2 * BLOCK_BYTES)
    extents = {offset: Extent(FrameId(3), offset, BLOCK_BYTES) for offset in (0, BLOCK_BYTES)}
    for offset, extent in extents.items():
        bench.write([extent], source[offset : offset + BLOCK_BYTES])
    bench.backend.set_hook("write", failing_at(0, errno.EIO))
    with pytest.raises(StorageError, match="writing"):
        bench.write([extents[at_byte]], aligned(BLOCK_BYTES))
    with pytest.raises(StorageError, match="no such extent was written"):
        bench.read([extents[at_byte]])
    other = BLOCK_BYTES - at_byte
    assert bench.read([extents[other]]) == source[other : other + BLOCK_BYTES]


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_failed_transfer_does_not_keep_the_buffer(bench: Bench, kind: str) -> None:
    files = bench.open()
    bench.write(ALL, aligned(N_PAGES * PAGE_BYTES))
    bench.backend.set_hook(kind, failing_at(1, errno.EIO))
    memory = mmap.mmap(-1, N_PAGES * PAGE_BYTES)
    view, errors, outcome = memoryview(memory), [], Outcome()

    def unmap(error: BaseException | None) -> None:
        errors.append(error)  # alive, with its traceback and what that refers to
        view.release()
        memory.close()
        outcome(None)

    (files.read if kind == "read" else files.write)(ALL, view, unmap)
    outcome.wait()
    assert isinstance(errors[0], StorageError)


def test_an_unexpected_exception_also_reaches_done(bench: Bench) -> None:
    bench.open()

    def broken(call: int) -> None:
        raise RuntimeError("a backend's bug")

    bench.backend.set_hook("write", broken)
    with pytest.raises(RuntimeError, match="a backend's bug"):
        bench.write(pages(0), aligned(PAGE_BYTES))


def test_done_waits_for_all_requests_and_gets_the_first_error(bench: Bench) -> None:
    bench.open(threads_per_path=2)
    bench.write(ALL, aligned(N_PAGES * PAGE_BYTES))
    second_is_in, first_failed, gate = threading.Event(), threading.Event(), threading.Event()

    def hook(call: int) -> None:
        if call == 0:
            second_is_in.wait(TIMEOUT_S)
            first_failed.set()
            raise OSError(errno.EIO, "the first error")
        if call == 1:
            second_is_in.set()
            gate.wait(TIMEOUT_S)
            raise OSError(errno.EIO, "a later error")

    bench.backend.set_hook("read", hook)
    outcome, into = Outcome(), aligned(N_PAGES * PAGE_BYTES)
    bench.files.read(ALL, into, outcome)
    assert first_failed.wait(TIMEOUT_S)
    # Queued behind the requests that had not begun: once this is over, the other thread has skipped them.
    bench.read(pages(0))
    assert outcome.calls.empty(), "the second request still uses the buffer"
    gate.set()
    with pytest.raises(StorageError, match="the first error"):
        outcome.wait()
    assert bench.backend.counts["read"] == 3, "two of the failed transfer and the one after it"
    assert outcome.calls.empty()


def test_reads_go_on_while_all_write_threads_are_stuck(bench: Bench) -> None:
    bench.open()
    source = aligned(N_PAGES * PAGE_BYTES)
    bench.write(ALL, source)
    gate, outcome = threading.Event(), Outcome()
    bench.backend.set_hook("write", lambda call: None if gate.wait(TIMEOUT_S) else 0)
    bench.files.write(ALL, source, outcome)
    assert bench.read(ALL) == source
    assert outcome.calls.empty()
    gate.set()
    outcome.wait()


def test_close_completes_what_is_queued(bench: Bench) -> None:
    bench.open(threads_per_path=1)
    gate, entered = threading.Event(), threading.Event()

    def hook(call: int) -> int | None:
        entered.set()
        return None if gate.wait(TIMEOUT_S) else 0

    bench.backend.set_hook("write", hook)
    outcomes = [Outcome() for _ in range(3)]
    for i, outcome in enumerate(outcomes):
        bench.files.write(pages(i), aligned(PAGE_BYTES), outcome)
    assert entered.wait(TIMEOUT_S)
    closing = threading.Thread(target=bench.files.close)
    closing.start()
    gate.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    for outcome in outcomes:
        outcome.wait()


def test_a_failed_sync_is_an_error(bench: Bench) -> None:
    bench.open()
    bench.backend.set_hook("sync", failing_at(0, errno.EIO))
    with pytest.raises(StorageError, match=f"syncing .*{PAGE_FILE_NAME}"):
        bench.files.sync()
    bench.files.sync()


# ---- no room -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing_path", [0, 1, 2])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_adds_nothing_and_takes_nothing(bench: Bench, failing_path: int, code: int) -> None:
    files = bench.open(3)
    source = aligned(N_PAGES * PAGE_BYTES)
    bench.write(ALL, source)
    sizes = [os.stat(path).st_size for path in files.paths]
    bench.backend.set_hook("allocate", failing_at(failing_path, code))
    with pytest.raises(DiskFullError, match=r"growing .* wanted \d+ bytes .* free are \d+") as caught:
        files.grow(8 * N_PAGES)
    assert files.paths[failing_path] in str(caught.value)
    assert files.n_frames == N_PAGES
    assert [os.stat(path).st_size for path in files.paths] == sizes
    assert bench.read(ALL) == source
    bench.write(ALL, source)
    files.grow(8 * N_PAGES)
    assert files.n_frames == 8 * N_PAGES
    bench.write(pages(8 * N_PAGES - 1), source[:PAGE_BYTES])
    assert bench.read(ALL) == source


def test_a_disk_that_cannot_lengthen_a_file_for_another_reason(bench: Bench) -> None:
    files = bench.open()
    bench.backend.set_hook("allocate", failing_at(0, errno.EFBIG))
    with pytest.raises(StorageError, match="growing") as caught:
        files.grow(2 * N_PAGES)
    assert not isinstance(caught.value, DiskFullError)
    assert files.n_frames == N_PAGES


def test_no_room_for_a_write_is_a_full_disk(bench: Bench) -> None:
    bench.open()
    bench.backend.set_hook("write", failing_at(0, errno.ENOSPC))
    with pytest.raises(DiskFullError, match="writing"):
        bench.write(pages(0), aligned(PAGE_BYTES))


# ---- files that cannot be opened -----------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [None, False])
def test_a_page_file_that_cannot_be_opened_leaves_nothing_behind(tmp_path: Path, direct: bool | None) -> None:
    threads, descriptors = set(threading.enumerate()), os.listdir("/proc/self/fd")
    with RunDirectory(tmp_path / "a") as first, RunDirectory(tmp_path / "b") as second:
        second.file(PAGE_FILE_NAME).mkdir()
        with pytest.raises(StorageError, match=rf"opening {second.file(PAGE_FILE_NAME)}: Is a directory"):
            PageFiles([first, second], page_bytes=PAGE_BYTES, direct=direct)
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_forcing_direct_where_it_is_refused_says_so() -> None:
    with pytest.raises(StorageError, match=r'/proc refuses it; set ssd\.direct to "auto"'):
        choose_backend([Path("/proc")], direct=True, n_workers=1)


@pytest.mark.parametrize("direct", [None, False])
def test_a_thread_that_cannot_be_started_leaves_none_behind(
    tmp_path: Path, direct: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, descriptors = set(threading.enumerate()), os.listdir("/proc/self/fd")
    start = threading.Thread.start
    for n_allowed in range(100):
        left = [n_allowed]

        def limited(thread: threading.Thread) -> None:
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)
        with RunDirectory(tmp_path) as directory:
            try:
                PageFiles([directory], page_bytes=PAGE_BYTES, direct=direct, threads_per_path=2).close()
                break
            except StorageError as error:
                assert "I/O thread could not be started" in str(error)
        assert set(threading.enumerate()) == threads
        assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert n_allowed >= 4, "two threads in each direction, each of which was refused once"
    assert n_allowed < 99
