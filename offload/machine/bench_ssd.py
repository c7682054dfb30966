"""What page files reach on a folder: bandwidth by size of a request and number of I/O threads.

All of it lies in one new folder inside the one that is measured, and goes with it. The test file is written whole once:
its bytes repeat a block of random ones, each at a place that does not depend on the page size, so every point reads
pages whose checksums are known, and what it writes changes nothing.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import numpy as np
import psutil  # type: ignore[import-untyped]

from offload.config_file import ConfigError
from pagemem.errors import DiskFullError, StorageError
from pagemem.files.backend import Direction
from pagemem.files.checksums import digests
from pagemem.files.page_file import PageFiles
from pagemem.files.requests import Route
from pagemem.folders.run_directory import RunDirectory, folder_use
from pagemem.frames.page import Extent, FrameId
from pagemem.units import KiB, MiB, format_bytes, round_up

REQUEST_BYTES: Final = (256 * KiB, MiB, 4 * MiB, 16 * MiB)
THREADS: Final = (1, 2, 4)
#: The point of a usual tensor and the engine's default number of threads; measured without checksums as well.
USUAL_REQUEST_BYTES: Final = 4 * MiB
DEFAULT_THREADS: Final = 4
FOLDER_PREFIX: Final = "offload-bench-ssd-"
#: File systems that are memory.
IN_RAM: Final = frozenset({"tmpfs", "ramfs"})
#: Room on the file system that is never taken.
SPARE_BYTES: Final = 64 * MiB
#: Transfers under way for each thread, so that none waits for the next.
_AHEAD: Final = 2
_SOURCE_BYTES: Final = 64 * MiB


@dataclass(frozen=True, slots=True)
class Setting:
    """What is varied: bytes of a request, which is one page, and I/O threads for each direction."""

    request_bytes: int
    threads: int
    checksums: bool = True


@dataclass(frozen=True, slots=True)
class Point:
    """What was measured with a setting, in 10^9 bytes a second."""

    setting: Setting
    write_gb_per_s: float
    read_gb_per_s: float

    @property
    def both_gb_per_s(self) -> float:
        """The rate of reading and writing equally many bytes one after the other, as training does about."""
        return 2 / (1 / self.write_gb_per_s + 1 / self.read_gb_per_s)


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to measure: a file of ``size_bytes``, ``seconds`` for each direction of each setting.

    Raises:
        ConfigError: the file is too small to keep as many requests under way as are asked for, or the time is not above
            0.
    """

    size_bytes: int
    seconds: float
    settings: tuple[Setting, ...]

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ConfigError(f"--seconds is {self.seconds:g}; it must be above 0")
        least = max(self.settings, key=lambda setting: setting.request_bytes * setting.threads)
        n_ahead = _AHEAD * least.threads
        if self.size_bytes < least.request_bytes * n_ahead:
            raise ConfigError(
                f"--size is {format_bytes(self.size_bytes)}, but {n_ahead} requests of "
                f"{format_bytes(least.request_bytes)} are under way at a time; give at least "
                f"{format_bytes(least.request_bytes * n_ahead)}"
            )

    @property
    def file_bytes(self) -> int:
        """The size of the test file: whole requests of every setting."""
        return round_up(self.size_bytes, max(setting.request_bytes for setting in self.settings))


def full_plan(size_bytes: int, seconds: float) -> BenchPlan:
    """Every size with every number of threads, as the engine has it by default, and the usual ones without
    checksums."""
    grid = [Setting(request_bytes, threads) for request_bytes in REQUEST_BYTES for threads in THREADS]
    return BenchPlan(size_bytes, seconds, (*grid, Setting(USUAL_REQUEST_BYTES, DEFAULT_THREADS, checksums=False)))


@dataclass(frozen=True, slots=True)
class Target:
    """A folder to measure, found fit for it.

    Attributes:
        free_bytes: what this user may still write there.
        holder: the process of a run that uses the folder now and would share its disk; None: there is none.
    """

    path: Path
    file_system: str
    free_bytes: int
    holder: str | None


@dataclass(frozen=True, slots=True)
class Measured:
    """A folder's points. ``backend`` is "direct" or "aiofiles", as the probe chose."""

    target: Target
    backend: str
    points: tuple[Point, ...]


def check_target(path: Path, file_bytes: int) -> Target:
    """A folder that can be measured. Nothing in it is changed.

    Raises:
        StorageError: there is no such folder, or it cannot be written.
        DiskFullError: it has no room for the test file.
    """
    if not os.path.isdir(path):
        what = " is not a folder" if os.path.exists(path) else ": there is no such folder"
        raise StorageError(f"{path}{what}; name one on the disk to be measured")
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: this user cannot write there; name a folder of its own on that disk")
    free_bytes = shutil.disk_usage(path).free
    if free_bytes < file_bytes + SPARE_BYTES:
        raise DiskFullError(
            f"{path} has {format_bytes(free_bytes)} free; the test file takes {format_bytes(file_bytes)} and "
            f"{format_bytes(SPARE_BYTES)} stay free; free some, or give a smaller --size"
        )
    return Target(path, file_system(path), free_bytes, folder_use(path).holder)


def file_system(path: Path) -> str:
    """The type of the file system that holds a path, e.g. "ext4"; "unknown" where the system does not say."""
    real = path.resolve()
    around = [mount for mount in psutil.disk_partitions(all=True) if real.is_relative_to(mount.mountpoint)]
    # Of two at the same place the later one hides the other.
    return (
        max(enumerate(around), key=lambda each: (len(each[1].mountpoint), each[0]))[1].fstype if around else "unknown"
    )


@contextmanager
def temporary_run(path: Path) -> Iterator[RunDirectory]:
    """A new run directory inside ``path``, removed with all that is in it, however the block is left.

    Raises:
        StorageError: it cannot be made; nothing was.
    """
    folder = path / f"{FOLDER_PREFIX}{secrets.token_hex(8)}"
    try:
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise StorageError(f"{path}: no folder can be made there: {error.strerror or error}") from error
        with RunDirectory(folder) as directory:
            yield directory
    finally:
        # Asked of the disk: an interrupt can come between the folder's making and the next line.
        if folder.exists():
            _remove(folder)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except KeyboardInterrupt:
        if folder.exists():  # a second Ctrl-C ends no sooner, but must not leave a file of this size behind
            shutil.rmtree(folder)
        raise


def measure(target: Target, plan: BenchPlan, measured: Callable[[Point], None] = lambda point: None) -> Measured:
    """Measure all settings of a plan, one after another, writing before reading. On the calling thread and I/O threads.

    Args:
        measured: called with each point when it is there.

    Raises:
        StorageError: the disk failed, or there is no room after all. The folder is as it was before.
    """
    with temporary_run(target.path) as directory:
        memory = _Memory(plan)
        backend = ""
        points: list[Point] = []
        for setting in plan.settings:
            files = PageFiles(
                [directory], page_bytes=setting.request_bytes, checksums=setting.checksums,
                direct=None if not backend else backend == "direct", threads_per_path=setting.threads,
                max_request_bytes=setting.request_bytes, slab_bytes=plan.file_bytes,
            )  # fmt: skip
            try:
                traffic = _Traffic(files, memory, setting, plan.file_bytes)
                if not backend:
                    backend = files.backend_name
                    traffic.run(Direction.WRITE, None)
                write_gb_per_s = traffic.run(Direction.WRITE, plan.seconds)
                points.append(Point(setting, write_gb_per_s, traffic.run(Direction.READ, plan.seconds)))
            finally:
                files.close()
            measured(points[-1])
    return Measured(target, backend, tuple(points))


class _Memory:
    """Random bytes that are written over and over, and room to read into, in huge pages as the engine's arenas."""

    def __init__(self, plan: BenchPlan) -> None:
        largest = max(setting.request_bytes for setting in plan.settings)
        n_read_bytes = max(setting.request_bytes * setting.threads for setting in plan.settings) * _AHEAD
        self.source = _mapped(round_up(min(_SOURCE_BYTES, plan.file_bytes), largest))
        self.into = _mapped(n_read_bytes)
        for buffer in (self.source, self.into):  # both, so that no point pays for their first touch
            for start in range(0, len(buffer), MiB):
                buffer[start : start + MiB] = os.urandom(min(MiB, len(buffer) - start))


def _mapped(n_bytes: int) -> memoryview:
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class _Traffic:
    """Transfers of one page each between the test file and memory, several under way, each begun where one ends.

    As many slots as there are transfers under way; the frames of a slot are its own, so no two touch the same bytes.
    """

    def __init__(self, files: PageFiles, memory: _Memory, setting: Setting, file_bytes: int) -> None:
        self._files, self._memory = files, memory
        self._page_bytes = setting.request_bytes
        self._n_frames = file_bytes // self._page_bytes
        self._n_slots = _AHEAD * setting.threads
        files.grow(self._n_frames)
        extents = [Extent(FrameId(frame), 0, self._page_bytes) for frame in range(self._n_frames)]
        starts = np.arange(self._n_frames, dtype=np.int64) * self._page_bytes % len(memory.source)
        distinct = min(self._n_frames, len(memory.source) // self._page_bytes)
        sums = digests(memory.source, starts[:distinct], np.full(distinct, self._page_bytes, dtype=np.int64))
        # The file holds these bytes, or will after the first round of writing.
        files.remember(files.route(extents), np.resize(sums, self._n_frames))
        self._routes: Sequence[Route] = [files.route([extent]) for extent in extents]
        self._starts = starts.tolist()

    def run(self, direction: Direction, seconds: float | None) -> float:
        """GB/s over so many seconds, or over every frame once. After an error or an interrupt, transfers continue until
        the page files are closed."""
        started_s = time.perf_counter()
        end_s = math.inf if seconds is None else started_s + seconds
        own = [range(slot, self._n_frames, self._n_slots) for slot in range(self._n_slots)]
        left = [iter(frames) if seconds is None else cycle(frames) for frames in own]
        ended: SimpleQueue[tuple[int, BaseException | None]] = SimpleQueue()
        for slot in range(self._n_slots):
            ended.put((slot, None))
        n_begun, n_busy = 0, self._n_slots
        while n_busy:
            slot, error = ended.get()
            if error is not None:
                raise error
            frame = next(left[slot], None) if time.perf_counter() < end_s else None
            if frame is None:
                n_busy -= 1
            else:
                self._begin(direction, slot, frame, ended)
                n_begun += 1
        return n_begun * self._page_bytes / (time.perf_counter() - started_s) / 1e9

    def _begin(
        self, direction: Direction, slot: int, frame: int, ended: SimpleQueue[tuple[int, BaseException | None]]
    ) -> None:
        def done(error: BaseException | None) -> None:
            ended.put((slot, error))

        if direction is Direction.READ:
            start = slot * self._page_bytes
            self._files.read(self._routes[frame], self._memory.into[start : start + self._page_bytes], done)
        else:
            start = self._starts[frame]
            self._files.write(self._routes[frame], self._memory.source[start : start + self._page_bytes], done)
