"""The contract between page files and the operating system, and whole transfers on top of it.

`RawBackend` is the seam: its calls may be short or fail, exactly as the system's, and a test can wrap one to make them
do so. `pagemem.files.direct` and `pagemem.files.buffered` implement it; `choose_backend` picks by a probe.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from pagemem.errors import StorageError
from pagemem.files.buffered import AiofilesBackend
from pagemem.files.direct import DirectBackend, accepts_direct
from pagemem.folders.own_file import os_failure
from pagemem.units import BLOCK_BYTES

#: Calls in a row that may move less than a block before a transfer is given up.
MAX_STALLS: Final = 8


class Direction(enum.Enum):
    """Which way bytes go."""

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    READ = "reading"
    WRITE = "writing"


class RawBackend(Protocol):
    """Files with stable indices, and positional I/O on them. Calls raise OSError and may be made on any thread.

    A buffer's address and length and every offset are multiples of `BLOCK_BYTES`. No call keeps a buffer.
    """

    @property
    def name(self) -> str:
        """``"direct"`` or ``"aiofiles"``."""

    def open(self, path: str) -> int:
        """Open or make the file; returns its index, counted from 0."""

    def allocate(self, file: int, old_bytes: int, new_bytes: int) -> None:
        """Reserve room on the disk for bytes ``old_bytes`` to ``new_bytes``; on failure nothing is gained or lost."""

    def shrink(self, file: int, n_bytes: int) -> None:
        """Cut the file to ``n_bytes`` if it is longer."""

    def read_into(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """Read once into the buffers in order; returns how many bytes came, 0 at the end of the file."""

    def write_from(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """Write once from the buffers in order; returns how many bytes went."""

    def sync(self, file: int) -> None:
        """Make durable what was written."""

    def stat(self, file: int) -> os.stat_result:
        """What the system says of the open file."""

    def close(self) -> None:
        """Close all files and end all threads of the backend. Idempotent."""


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
    return AiofilesBackend(n_workers) if direct is False or refusing else DirectBackend()


def transfer(
    backend: RawBackend, direction: Direction, file: int, path: str, offset_bytes: int, buffers: list[memoryview]
) -> None:
    """Move all bytes of the buffers, going on after short calls and signals.

    Args:
        file: the backend's index of the file.
        path: the file's name, for messages.
        offset_bytes: where in the file the first byte lies.
        buffers: their bytes in order; released and taken out as they are done. The caller releases what is left.

    Raises:
        StorageError: the system failed, the file ended, or calls moved nothing; some bytes may have moved.
        DiskFullError: the file system has no room for a write.
    """
    call = backend.read_into if direction is Direction.READ else backend.write_from
    stalls = 0
    while buffers:
        try:
            moved_bytes = call(file, offset_bytes, buffers)
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
