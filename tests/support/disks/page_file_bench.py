"""Page files on a real disk whose calls can be made to fail, wait or come up short."""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pagemem.files.backend import RawBackend, choose_backend
from pagemem.files.page_file import PageFiles
from pagemem.folders.run_directory import RunDirectory
from pagemem.frames.page import Extent, FrameId
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

    def stat(self, file: int) -> os.stat_result:
        return self.inner.stat(file)

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
        sizes = {"page_bytes": PAGE_BYTES, "slab_bytes": MiB, "max_request_bytes": REQUEST_PAGES * PAGE_BYTES}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pagemem.files.page_file.choose_backend", lambda folders, **_: self.backend)
            self.files = PageFiles(directories, **{**sizes, **options})
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
