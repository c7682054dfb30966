"""Whether a file system takes O_DIRECT: tried, as asking it does not tell."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Final

from pagemem.folders.own_file import open_file, os_failure, remove_draft, remove_file
from pagemem.units import BLOCK_BYTES

_PROBE_NAME: Final = "pagemem.probe"
#: What file systems without O_DIRECT answer.
_REFUSED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


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
