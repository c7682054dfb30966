"""What all I/O backends do alike with a file of fixed place: make it, lengthen it, make it durable."""

from __future__ import annotations

import os


def ensure_file(path: str) -> None:
    """Make an empty file, durably, unless there is one.

    Raises:
        OSError: it cannot be made.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
    sync_folder(os.path.dirname(path))


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make durable which names the folder has; syncing a file does not say that its name is there after a crash."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def allocate(path: str, old_bytes: int, new_bytes: int) -> None:
    """Give the file's bytes from ``old_bytes`` to ``new_bytes`` room on the disk; bytes that had it keep their content.

    Raises:
        OSError: (ENOSPC, EDQUOT, ...) there is no room; what was gained on the way is given back.
    """
    # A descriptor of its own, without O_DIRECT: where a file system cannot allocate, libc writes single bytes instead.
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size_before_bytes = os.fstat(fd).st_size
        try:
            os.posix_fallocate(fd, old_bytes, new_bytes - old_bytes)
        except OSError:
            os.ftruncate(fd, size_before_bytes)
            raise
    finally:
        os.close(fd)


def shrink(path: str, n_bytes: int) -> None:
    """Cut the file to at most ``n_bytes`` and free the rest."""
    os.truncate(path, min(n_bytes, os.stat(path).st_size))
