"""Page files opened for a test, and blocking reads and writes of them."""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pagemem.files.page_file import PageFiles
from pagemem.folders.run_directory import RunDirectory
from pagemem.frames.page import Extent, FrameId
from pagemem.units import KiB, MiB

PAGE_BYTES = 64 * KiB
TIMEOUT_S = 30.0


class Buffer:
    """Page-aligned memory, filled with fresh random bytes or cleared."""

    def __init__(self, n_bytes: int, random: bool = True) -> None:
        self._map = mmap.mmap(-1, n_bytes)
        self.view = memoryview(self._map)
        if random:
            self.view[:] = os.urandom(n_bytes)

    def close(self) -> None:
        """Unmap; raises BufferError if anybody else still holds a view."""
        self.view.release()
        self._map.close()


class Outcome:
    """A ``done`` that can be waited for and counts its calls."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.thread_name = ""

    def __call__(self, error: BaseException | None) -> None:
        self.thread_name = threading.current_thread().name
        self.calls.put(error)

    def wait(self) -> None:
        error = self.calls.get(timeout=TIMEOUT_S)
        if error is not None:
            raise error


def write(files: PageFiles, extents: Sequence[Extent], source: memoryview) -> None:
    outcome = Outcome()
    files.write(extents, source, outcome)
    outcome.wait()


def read(files: PageFiles, extents: Sequence[Extent]) -> bytes:
    outcome, into = Outcome(), Buffer(sum(extent.length_bytes for extent in extents), random=False)
    files.read(extents, into.view, outcome)
    outcome.wait()
    found = bytes(into.view)
    into.close()
    return found


def pages(*frames: int, page_bytes: int = PAGE_BYTES) -> list[Extent]:
    return [Extent(FrameId(frame), 0, page_bytes) for frame in frames]


class Opener:
    """Opens page files under one folder and closes all of them at the end of the test."""

    def __init__(self, folder: Path, direct: bool | None) -> None:
        self.folder = folder
        self.direct = direct
        self.stack = ExitStack()

    def __call__(self, n_paths: int = 1, n_frames: int = 64, **options: Any) -> PageFiles:
        directories = [self.stack.enter_context(RunDirectory(self.folder / f"ssd{i}")) for i in range(n_paths)]
        options = {"page_bytes": PAGE_BYTES, "direct": self.direct, "slab_bytes": MiB, **options}
        files = PageFiles(directories, **options)
        self.stack.callback(files.close)
        files.grow(n_frames)
        return files
