"""The page files' calls of the operating system, and whole transfers on top of them.

`RawBackend` is the seam: its calls may be short or fail, exactly as the system's, and a test can wrap one to make them
do so. `choose_backend` picks by a probe.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from pagemem.errors import StorageError
from pagemem.files.buffered import AiofilesThreads
from pagemem.files.direct import accepts_direct
from pagemem.folders.descriptor import close_fds
from pagemem.folders.own_file import open_file, os_failure, sync_folder
from pagemem.units import BLOCK_BYTES

Result = TypeVar("Result")

#: Calls in a row that may move less than a block before a transfer is given up.
MAX_STALLS: Final = 8


class Direction(enum.Enum):
    """Which way bytes go."""

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    READ = "reading"
    WRITE = "writing"


class RawBackend:
    """Files with stable indices, and positional I/O on them. Calls raise OSError and may be made on any thread, which
    they block.

    A buffer's address and length and every offset are multiples of `BLOCK_BYTES`. No call keeps a buffer.

    Args:
        threads: make the calls that move bytes, through the page cache; closed by `close`. None: O_DIRECT, on the
            caller's own thread with the GIL released.

    Attributes:
        name: ``"direct"`` or ``"aiofiles"``.
    """

    def __init__(self, threads: AiofilesThreads | None = None) -> None:
        self.name = "direct" if threads is None else "aiofiles"
        self._threads = threads
        self._paths: list[str] = []
        self._fds: list[int] = []

    def _call(self, function: Callable[..., Result], *args: object) -> Result:
        return function(*args) if self._threads is None else self._threads.run(function, *args)

    def open(self, path: str) -> int:
        """Open the file, or make an empty one, durably; returns its index, counted from 0.

        Raises:
            OSError, StorageError: it cannot be opened or made, or something else lies there.
        """
        os.close(open_file(path, os.O_RDWR | os.O_CREAT))
        sync_folder(os.path.dirname(path))
        self._fds.append(open_file(path, os.O_RDWR | (os.O_DIRECT if self._threads is None else 0)))
        self._paths.append(path)
        return len(self._fds) - 1

    def allocate(self, file: int, old_bytes: int, new_bytes: int) -> None:
        """Give the file's bytes from ``old_bytes`` to ``new_bytes`` room on the disk; bytes that had it keep their
        content.

        Raises:
            OSError: (ENOSPC, EDQUOT, ...) there is no room; what was gained on the way is given back. (ESTALE) the path
                leads to another file by now.
        """
        # A descriptor of its own, without O_DIRECT: where a file system cannot allocate, libc writes single bytes.
        plain = open_file(self._paths[file], os.O_RDWR)
        try:
            before = os.fstat(plain)
            if not os.path.samestat(before, self.stat(file)):
                raise OSError(errno.ESTALE, "another file has taken its place")
            try:
                os.posix_fallocate(plain, old_bytes, new_bytes - old_bytes)
            except OSError:
                with suppress(OSError):  # the first error is the one to raise; a longer file harms nobody
                    os.ftruncate(plain, before.st_size)
                raise
        finally:
            os.close(plain)

    def shrink(self, file: int, n_bytes: int) -> None:
        """Cut the file to ``n_bytes`` if it is longer."""
        os.ftruncate(self._fds[file], min(n_bytes, self.stat(file).st_size))

    def read_into(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """Read once into the buffers in order; returns how many bytes came, 0 at the end of the file."""
        return self._call(os.preadv, self._fds[file], buffers, offset_bytes)

    def write_from(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """Write once from the buffers in order; returns how many bytes went."""
        return self._call(os.pwritev, self._fds[file], buffers, offset_bytes)

    def sync(self, file: int) -> None:
        """Make durable what was written."""
        self._call(os.fsync, self._fds[file])

    def stat(self, file: int) -> os.stat_result:
        """What the system says of the open file."""
        return os.fstat(self._fds[file])

    def close(self) -> None:
        """Close all files and end the threads. Idempotent."""
        try:
            close_fds(self._fds)
        finally:
            if self._threads is not None:
                self._threads.close()


def choose_backend(folders: Sequence[Path], *, direct: bool | None, n_workers: int) -> RawBackend:
    """The backend for page files in these folders.

    Args:
        folders: where the files lie; one backend serves all.
        direct: True or False forces O_DIRECT or aiofiles; None takes O_DIRECT if every folder accepts it.
        n_workers: transfers under way at a time in each direction, where the backend has threads of its own.

    Raises:
        StorageError: O_DIRECT is forced and a folder refuses it.
    """
    refusing = [] if direct is False else [folder for folder in folders if not accepts_direct(folder)]
    if direct and refusing:
        raise StorageError(
            f'O_DIRECT is forced, but the file system of {refusing[0]} refuses it; set ssd.direct to "auto" or false'
        )
    if direct is not False and not refusing:
        return RawBackend()
    return RawBackend(AiofilesThreads(2 * n_workers + 1))  # reads, writes and a sync keep none of the others waiting


def transfer(
    call: Callable[[int, Sequence[memoryview]], int],
    direction: Direction,
    path: str,
    offset_bytes: int,
    buffers: list[memoryview],
) -> None:
    """Move all bytes of the buffers, going on after short calls and signals.

    Args:
        call: moves bytes once, from an offset in the file on; returns how many.
        path: the file's name, for messages.
        offset_bytes: where in the file the first byte lies.
        buffers: their bytes in order; released and taken out as they are done. The caller releases what is left.

    Raises:
        StorageError: the system failed, the file ended, or calls moved nothing; some bytes may have moved.
        DiskFullError: the file system has no room for a write.
    """
    stalls = 0
    while buffers:
        try:
            moved_bytes = call(offset_bytes, buffers)
        except InterruptedError:
            continue
        except OSError as error:
            raise os_failure(error, direction.value, path, offset_bytes, _length(buffers)) from error
        # O_DIRECT cannot go on inside a block: what came of it is moved again.
        progress_bytes = moved_bytes - moved_bytes % BLOCK_BYTES
        stalls = 0 if progress_bytes else stalls + 1
        if moved_bytes == 0 or stalls > MAX_STALLS:
            raise StorageError(
                f"{direction.value} {path} at offset {offset_bytes}: {moved_bytes} of {_length(buffers)} bytes moved "
                f"and no more would; has the file been cut by somebody else?"
            )
        _advance(buffers, progress_bytes)
        offset_bytes += progress_bytes


def _length(buffers: Sequence[memoryview]) -> int:
    return sum(buffer.nbytes for buffer in buffers)


def _advance(buffers: list[memoryview], n_bytes: int) -> None:
    """Drop the first ``n_bytes`` bytes of the buffers, releasing what is done."""
    while n_bytes:
        head = buffers[0]
        if head.nbytes <= n_bytes:
            n_bytes -= head.nbytes
            buffers.pop(0).release()
        else:
            buffers[0] = head[n_bytes:]
            head.release()
            n_bytes = 0
