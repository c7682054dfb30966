"""Reads stored tensors straight out of page files that are only read: no allocation, no threads, nothing changed.

What training reads goes through `pagemem.files.page_file`; this is for looking at a run that stands still. Requests are
made, and checksums computed, by the same code. Where the file system refuses O_DIRECT, reads go through the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from pagemem.durable.manifest import StoredTensor
from pagemem.files.backend import Direction, transfer
from pagemem.files.checksums import digests
from pagemem.files.requests import ExtentTable, plan_requests, tabulate
from pagemem.files.striping import Striping
from pagemem.folders.descriptor import close_fds
from pagemem.folders.own_file import naming
from pagemem.folders.small_file import open_regular
from pagemem.frames.page import Extent
from pagemem.units import MiB

#: Bytes read at a time, where pages are not larger.
CHUNK_BYTES: Final = 4 * MiB


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some adjacent extents of one stored tensor; its bytes begin at ``begin_bytes`` of the tensor's."""

    begin_bytes: int
    extents: tuple[Extent, ...]
    sums: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes in it."""
        return sum(extent.length_bytes for extent in self.extents)


@dataclass(frozen=True, slots=True)
class WrongExtent:
    """An extent whose bytes are not those that were written, or are not there."""

    extent: Extent
    path: str
    position_bytes: int
    what: str

    def __str__(self) -> str:
        return (
            f"{self.path}: frame {self.extent.frame} (file offset {self.position_bytes}, {self.extent.length_bytes} "
            f"bytes) {self.what}"
        )


class PageReader:
    """Reads chunks of stored tensors. `read` may be called on any thread.

    Args:
        paths: the page files, in the order of their striping.
        page_bytes: size of a frame.

    Attributes:
        chunk_bytes: most bytes in a chunk.
        file_bytes: of each file.
        backend_name: ``"direct"`` or ``"page cache"``.

    Raises:
        StorageError: a file cannot be opened; none is left open.
    """

    def __init__(self, paths: Sequence[Path], page_bytes: int) -> None:
        self.paths = [str(path) for path in paths]
        self.page_bytes = page_bytes
        self.chunk_bytes = max(CHUNK_BYTES, page_bytes)
        self._striping = Striping(len(paths))
        self.backend_name = "direct"
        self.file_bytes: list[int] = []
        self._fds: list[int] = []
        try:
            for path in self.paths:
                with naming("opening", path):
                    self._open(path)
        except BaseException:
            with suppress(OSError):  # what failed first is what to raise; all are closed
                close_fds(self._fds)
            raise

    def _open(self, path: str) -> None:
        fd, n_bytes = open_regular(Path(path), 2**62)
        self._fds.append(fd)
        self.file_bytes.append(n_bytes)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.backend_name = "page cache"

    @property
    def n_frames(self) -> int:
        """Whole frames in the files."""
        return sum(n_bytes // self.page_bytes for n_bytes in self.file_bytes)

    def buffer(self) -> mmap.mmap:
        """Memory that any chunk fits into, aligned as O_DIRECT wants it."""
        return mmap.mmap(-1, self.chunk_bytes)

    def chunks(self, stored: StoredTensor) -> Iterator[Chunk]:
        """A tensor's bytes in order. Where the run kept no checksums, ``stored.sums`` are zeros.

        Raises:
            ValueError: the manifest has not one checksum for each extent.
        """
        extents = stored.placement().extents(self.page_bytes)
        if len(extents) != len(stored.sums):
            raise ValueError(f"{stored.key} has {len(extents)} extents and {len(stored.sums)} checksums")
        a_chunk = max(1, self.chunk_bytes // self.page_bytes)
        begin_bytes = 0
        for start in range(0, len(extents), a_chunk):
            chunk = Chunk(begin_bytes, tuple(extents[start : start + a_chunk]), stored.sums[start : start + a_chunk])
            yield chunk
            begin_bytes += chunk.n_bytes

    def read(self, chunk: Chunk, into: memoryview, *, checksums: bool) -> list[WrongExtent]:
        """Read a chunk to the start of ``into``; returns what is wrong with it, extent by extent.

        Raises:
            ValueError: an extent is empty, not aligned, or not inside a page.
            StorageError: the system failed.
        """
        beyond = max(extent.frame for extent in chunk.extents) + 1
        table = tabulate(chunk.extents, self._striping, self.page_bytes, beyond)
        ends = table.positions + table.lengths
        cut = [row for row in range(len(table)) if ends[row] > self.file_bytes[int(table.paths[row])]]
        if cut:
            return [
                self._wrong(
                    chunk,
                    table,
                    row,
                    f"lies beyond the end of the file, {self.file_bytes[int(table.paths[row])]} bytes",
                )
                for row in cut
            ]
        for request in plan_requests(table, len(self.paths), self.page_bytes, self.chunk_bytes):
            buffers = [into[start:end] for start, end in request.spans]
            try:
                call = partial(self._read_once, request.path)
                transfer(call, Direction.READ, self.paths[request.path], request.position_bytes, buffers)
            finally:
                for buffer in buffers:  # of an error: its traceback would keep them
                    buffer.release()
        if not checksums:
            return []
        found = digests(into, table.starts, table.lengths).tolist()
        return [
            self._wrong(chunk, table, row, f"was written with xxh3 {expected:016x} and reads as {is_now:016x}")
            for row, (expected, is_now) in enumerate(zip(chunk.sums, found, strict=True))
            if expected != is_now
        ]

    def _read_once(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        return os.preadv(self._fds[file], buffers, offset_bytes)

    def _wrong(self, chunk: Chunk, table: ExtentTable, row: int, what: str) -> WrongExtent:
        return WrongExtent(chunk.extents[row], self.paths[int(table.paths[row])], int(table.positions[row]), what)

    def close(self) -> None:
        """Close the files. Idempotent."""
        close_fds(self._fds)

    def __enter__(self) -> PageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
