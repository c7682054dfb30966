"""Page files without room, or that cannot be opened: nothing is taken, nothing is left behind."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from page_file_bench import ALL, N_PAGES, PAGE_BYTES, Bench, aligned, failing_at, pages

from pagemem.errors import DiskFullError, StorageError
from pagemem.files.backend import choose_backend
from pagemem.files.page_file import PAGE_FILE_NAME, PageFiles
from pagemem.folders.run_directory import RunDirectory

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
        (second.path / PAGE_FILE_NAME).mkdir()
        with pytest.raises(StorageError, match=rf"{second.path / PAGE_FILE_NAME} is a folder, not a file of this run"):
            PageFiles([first, second], page_bytes=PAGE_BYTES, direct=direct)
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_forcing_direct_where_it_is_refused_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagemem.files.backend.accepts_direct", lambda folder: False)
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

        def limited(thread: threading.Thread, left: list[int] = left) -> None:
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


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_path_that_cannot_grow_leaves_pages_of_an_earlier_run_in_the_others(bench: Bench, code: int) -> None:
    files = bench.open(2)
    source = aligned(N_PAGES * PAGE_BYTES)
    bench.write(ALL, source)
    sums, route = files.sums(files.route(ALL)), files.route(ALL)
    files.close()
    bench.stack.close()
    sizes = [os.stat(path).st_size for path in files.paths]
    directories = [bench.stack.enter_context(RunDirectory(bench.folder / f"ssd{number}")) for number in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        real = os.posix_fallocate
        calls: list[int] = []

        def second_fails(fd: int, offset: int, length: int) -> None:
            calls.append(fd)
            if len(calls) == 2:
                raise OSError(code, os.strerror(code))
            real(fd, offset, length)

        patch.setattr(os, "posix_fallocate", second_fails)
        again = PageFiles(directories, page_bytes=PAGE_BYTES, direct=bench.direct)
        bench.stack.callback(again.close)
        with pytest.raises(StorageError, match="growing .*ssd1"):
            again.grow(N_PAGES)
    assert [os.stat(path).st_size for path in files.paths] == sizes
    again.grow(N_PAGES)
    again.remember(route, sums)
    bench.files = again
    assert bench.read(ALL) == source
