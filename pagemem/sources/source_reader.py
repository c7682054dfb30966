"""Reads what `pagemem.sources.source_files` describes: aligned reads past the page cache into a bounce buffer, and from
there to where the values belong, converted on the way.

Values in a file begin anywhere, and O_DIRECT moves whole blocks to aligned addresses; hence the copy. It releases the
GIL. A file is compared with what it was before and after each read: changed bytes are an error, never content.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from pagemem.errors import StorageError
from pagemem.folders.descriptor import close_fds
from pagemem.folders.own_file import naming, os_failure
from pagemem.folders.small_file import open_regular
from pagemem.sources.source_files import Origin, SourceFile, SourcePiece, SourceRead, plan_reads
from pagemem.units import BLOCK_BYTES, MiB, round_up

Bytes = npt.NDArray[np.uint8]

#: Most bytes of a file that are read at a time.
CHUNK_BYTES: Final = 2 * MiB
#: Values converted by one call: torch takes no second thread for so few.
_SERIAL_NUMEL: Final = 32768


class Bounce:
    """Memory that a read fits into, one at a time; made by `several`."""

    def __init__(self, memory: memoryview) -> None:
        self.map = memory
        self.bytes: Bytes = np.frombuffer(memory, dtype=np.uint8)

    @classmethod
    def several(cls, number: int, chunk_bytes: int) -> list[Bounce]:
        """So many of them, for reads of at most ``chunk_bytes`` each."""
        each_bytes = bounce_bytes(chunk_bytes)
        whole = mmap.mmap(-1, number * each_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # The kernel makes a disk's requests of pieces that are adjacent in memory: a third more bytes a second.
        whole.madvise(mmap.MADV_HUGEPAGE)
        memory = memoryview(whole)
        return [cls(memory[begin : begin + each_bytes]) for begin in range(0, number * each_bytes, each_bytes)]


def bounce_bytes(chunk_bytes: int) -> int:
    """Memory for a read of ``chunk_bytes`` that begins and ends inside of blocks."""
    return round_up(chunk_bytes, BLOCK_BYTES) + 2 * BLOCK_BYTES


class SourceReader:
    """Opened source files. Any thread.

    Args:
        chunk_bytes: most bytes of a read, a multiple of 64.

    Attributes:
        chunk_bytes: may be changed while nothing is read.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._fds: dict[SourceFile, int] = {}
        self._open: list[int] = []

    @property
    def files(self) -> list[SourceFile]:
        """What is open."""
        return list(self._fds)

    def open(self, file: SourceFile) -> None:
        """Have a file open until `close`.

        Raises:
            StorageError: it cannot be opened, or is not as it was.
        """
        with self._lock:
            if file in self._fds:
                return
            with naming("opening", file.path):
                fd, _ = open_regular(file.path, 2**62)
                self._open.append(fd)
                try:
                    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # through the page cache, then
                        raise
            self._check(file, fd)
            self._fds[file] = fd

    def plan(self, origin: Origin) -> list[SourceRead]:
        """The reads that fill a tensor."""
        return plan_reads(origin.pieces, self.chunk_bytes)

    def move(self, read: SourceRead, bounce: Bounce, into: Bytes) -> None:
        """Read, and put the values of each piece at its place of ``into``.

        Raises:
            StorageError: the system failed, or the file is not as it was; some values may be there.
        """
        begin_bytes = read.begin_bytes - read.begin_bytes % BLOCK_BYTES
        fd = self._fds[read.file]
        self._check(read.file, fd)
        self._fill(read, fd, begin_bytes, bounce.map)
        self._check(read.file, fd)
        for piece in read.pieces:
            start = piece.offset_bytes - begin_bytes
            put(piece, bounce.bytes[start : start + piece.n_bytes], into)

    def fill(self, pieces: Sequence[SourcePiece], into: Bytes) -> None:
        """Read pieces to their places in ``into``, on the calling thread. Raises as `open` and `move`."""
        for file in dict.fromkeys(piece.file for piece in pieces):
            self.open(file)
        (bounce,) = Bounce.several(1, self.chunk_bytes)
        for read in plan_reads(pieces, self.chunk_bytes):
            self.move(read, bounce, into)

    def _check(self, file: SourceFile, fd: int) -> None:
        with naming("looking at", file.path):
            file.check(os.fstat(fd))

    def _fill(self, read: SourceRead, fd: int, begin_bytes: int, into: memoryview) -> None:
        """Have the bytes from ``begin_bytes`` to the read's end in ``into``; behind the file's end there are none."""
        wanted_bytes = read.end_bytes - begin_bytes
        length_bytes, moved_bytes, tried_direct = round_up(wanted_bytes, BLOCK_BYTES), 0, True
        while moved_bytes < wanted_bytes:
            with into[moved_bytes:length_bytes] as left:
                try:
                    n_bytes = os.preadv(fd, [left], begin_bytes + moved_bytes)
                except InterruptedError:
                    continue
                except OSError as error:
                    if error.errno == errno.EINVAL and tried_direct:
                        tried_direct = False
                        _leave_direct(fd)
                        continue
                    raise os_failure(error, "reading", read.file.path, begin_bytes + moved_bytes, len(left)) from error
            if moved_bytes + n_bytes < wanted_bytes:
                n_bytes -= n_bytes % BLOCK_BYTES  # O_DIRECT cannot go on inside a block
            if not n_bytes:
                self._check(read.file, fd)
                raise StorageError(
                    f"reading {read.file.path} at offset {begin_bytes + moved_bytes}: it ends before byte "
                    f"{read.end_bytes}, up to which parameters lie in it"
                )
            moved_bytes += n_bytes

    def close(self) -> None:
        """Close the files. Idempotent."""
        with self._lock, suppress(OSError):  # nothing was written to them
            self._fds.clear()
            close_fds(self._open)


def _leave_direct(fd: int) -> None:
    """Go on through the page cache where a file system takes O_DIRECT and then refuses to read by it."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def put(piece: SourcePiece, values: Bytes, into: Bytes) -> None:
    """Copy a piece's values from the bytes that a file has to its place in a tensor's bytes, as ``.to(dtype)`` makes
    them."""
    target = into[piece.at_bytes : piece.end_bytes]
    if not piece.converts:
        target[:] = values
        return
    if values.ctypes.data % piece.source_dtype.itemsize:
        values = values.copy()
    source = torch.from_numpy(values).view(piece.source_dtype)
    made = torch.from_numpy(target).view(piece.dtype)
    for begin in range(0, piece.numel, _SERIAL_NUMEL):
        made[begin : begin + _SERIAL_NUMEL].copy_(source[begin : begin + _SERIAL_NUMEL])
