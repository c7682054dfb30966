"""The O_DIRECT backend: positional vector I/O past the page cache, on the calling thread, with the GIL released."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pagemem.files import raw_file
from pagemem.folders.own_file import open_file, os_failure, remove_draft, remove_file
from pagemem.units import BLOCK_BYTES

_PROBE_NAME: Final = "pagemem.probe"
#: What file systems without O_DIRECT answer.
_REFUSED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


class DirectBackend:
    """Page files opened with O_DIRECT; see `pagemem.files.backend.RawBackend` for the contract."""

    name: Final = "direct"

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._fds: list[int] = []

    def open(self, path: str) -> int:
        """Open or make the file; returns its index."""
        raw_file.ensure_file(path)
        self._fds.append(open_file(path, os.O_RDWR | os.O_DIRECT))
        self._paths.append(path)
        return len(self._fds) - 1

    def allocate(self, file: int, old_bytes: int, new_bytes: int) -> None:
        """See `raw_file.allocate`."""
        raw_file.allocate(self._paths[file], self._fds[file], old_bytes, new_bytes)

    def shrink(self, file: int, n_bytes: int) -> None:
        """See `raw_file.shrink`."""
        raw_file.shrink(self._fds[file], n_bytes)

    def read_into(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """One preadv; returns the number of bytes read."""
        return os.preadv(self._fds[file], buffers, offset_bytes)

    def write_from(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """One pwritev; returns the number of bytes written."""
        return os.pwritev(self._fds[file], buffers, offset_bytes)

    def sync(self, file: int) -> None:
        """fsync."""
        os.fsync(self._fds[file])

    def stat(self, file: int) -> os.stat_result:
        """fstat."""
        return os.fstat(self._fds[file])

    def close(self) -> None:
        """Close the files. Idempotent."""
        raw_file.close_all(self._fds)


def accepts_direct(folder: Path) -> bool:
    """Whether an aligned write and read with O_DIRECT work in the folder; tried on a scratch file that is removed.

    Raises:
        StorageError: the folder cannot be written, or the disk fails: that says nothing about O_DIRECT.
    """
    scratch = folder / _PROBE_NAME
    remove_draft(scratch)
    try:
        fd = open_file(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, mode=0o600)
    except OSError as error:
        remove_file(scratch)  # some kernels make the name and then refuse the flag
        if error.errno in _REFUSED:
            return False
        raise os_failure(error, "making", scratch) from error
    try:
        remove_file(scratch)
        with mmap.mmap(-1, 2 * BLOCK_BYTES) as block:
            block[:BLOCK_BYTES] = os.urandom(BLOCK_BYTES)
            with memoryview(block) as view, view[:BLOCK_BYTES] as sent, view[BLOCK_BYTES:] as back:
                moved = os.pwritev(fd, [sent], 0), os.preadv(fd, [back], 0)
                return moved == (BLOCK_BYTES, BLOCK_BYTES) and sent == back
    except OSError as error:
        if error.errno in _REFUSED:
            return False
        raise os_failure(error, "trying O_DIRECT with", scratch, 0, BLOCK_BYTES) from error
    finally:
        os.close(fd)
