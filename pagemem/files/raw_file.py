"""What all I/O backends do alike with a file of fixed place: make it, lengthen it, cut it, close it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress

from pagemem.folders.descriptor import close_last
from pagemem.folders.own_file import open_file, sync_folder


def ensure_file(path: str) -> None:
    """Make an empty file, durably, unless there is one.

    Raises:
        OSError, StorageError: it cannot be made, or something else lies there.
    """
    os.close(open_file(path, os.O_RDWR | os.O_CREAT))
    sync_folder(os.path.dirname(path))


def allocate(path: str, fd: int, old_bytes: int, new_bytes: int) -> None:
    """Give the file's bytes from ``old_bytes`` to ``new_bytes`` room on the disk; bytes that had it keep their content.

    Args:
        fd: the file, open with O_DIRECT or not.

    Raises:
        OSError: (ENOSPC, EDQUOT, ...) there is no room; what was gained on the way is given back. (ESTALE) the path
            leads to another file by now.
    """
    # A descriptor of its own, without O_DIRECT: where a file system cannot allocate, libc writes single bytes instead.
    plain = open_file(path, os.O_RDWR)
    try:
        before = os.fstat(plain)
        if not os.path.samestat(before, os.fstat(fd)):
            raise OSError(errno.ESTALE, "another file has taken its place")
        try:
            os.posix_fallocate(plain, old_bytes, new_bytes - old_bytes)
        except OSError:
            with suppress(OSError):  # the first error is the one to raise; a longer file harms nobody
                os.ftruncate(plain, before.st_size)
            raise
    finally:
        os.close(plain)


def shrink(fd: int, n_bytes: int) -> None:
    """Cut the file to at most ``n_bytes`` and free the rest."""
    os.ftruncate(fd, min(n_bytes, os.fstat(fd).st_size))


def close_all(fds: list[int], close: Callable[[int], None] = os.close) -> None:
    """Close descriptors, all of them, and empty the list.

    Raises:
        OSError: the first one that could not be closed; the system has let go of it, too.
    """
    failure: OSError | None = None
    while fds:
        try:
            close_last(fds, close)
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure
