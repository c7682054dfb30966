"""Page files when the system fails: nothing hangs, nothing that was good is lost."""

from __future__ import annotations

import errno
import mmap
import threading

import pytest
from page_file_bench import (
    ALL,
    N_PAGES,
    N_REQUESTS,
    PAGE_BYTES,
    REQUEST_PAGES,
    TIMEOUT_S,
    Bench,
    Outcome,
    aligned,
    failing_at,
    pages,
)

from pagemem.errors import ChecksumError, StorageError
from pagemem.files.page_file import PAGE_FILE_NAME
from pagemem.frames.page import Extent, FrameId
from pagemem.units import BLOCK_BYTES

# ---- errors of the system ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finishing_threads", [None, 0])
@pytest.mark.parametrize("number", range(N_REQUESTS))
def test_a_failed_read_is_reported_once_and_loses_nothing(
    bench: Bench, number: int, finishing_threads: int | None
) -> None:
    bench.open(finishing_threads=finishing_threads)
    source = aligned(N_PAGES * PAGE_BYTES)
    bench.write(ALL, source)
    bench.backend.set_hook("read", failing_at(number, errno.EIO))
    with pytest.raises(
        StorageError, match=rf"reading .*{PAGE_FILE_NAME} at offset \d+, 262144 bytes: .*rror"
    ) as caught:
        bench.read(ALL)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.EIO
    assert bench.backend.counts["read"] > number, "the fault was reached"
    del bench.backend.hooks["read"]
    assert bench.read(ALL) == source


@pytest.mark.parametrize("finishing_threads", [None, 0])
@pytest.mark.parametrize("number", range(N_REQUESTS))
def test_after_a_failed_write_no_torn_page_passes_for_whole(
    bench: Bench, number: int, finishing_threads: int | None
) -> None:
    bench.open(finishing_threads=finishing_threads)
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
