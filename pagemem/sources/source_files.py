"""Origins: pieces of other programs' files (a checkpoint's safetensors) that together are the content of a tensor.

A file is known by what the system says of it when it is first looked at; whoever reads it later compares. Nothing is
read here: arithmetic over pieces, and which reads of the files fill a tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from pagemem.errors import StorageError
from pagemem.folders.own_file import naming
from pagemem.folders.small_file import open_regular
from pagemem.units import KiB

#: Reads of one file that lie no further apart are one read.
GAP_BYTES: Final = 32 * KiB


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A regular file as it was when it was looked at.

    Attributes:
        path: absolute, links resolved.
    """

    path: Path
    n_bytes: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> SourceFile:
        """The file at ``path``, to which links may lead.

        Raises:
            StorageError: there is none, it is no regular file, or it cannot be read.
        """
        with naming("opening", path):
            found = Path(os.path.realpath(path))
            fd, _ = open_regular(found, 2**62)
            try:
                return cls.opened(found, os.fstat(fd))
            finally:
                os.close(fd)

    @classmethod
    def opened(cls, path: Path, stat: os.stat_result) -> SourceFile:
        """What the system says of a file that lies at ``path``."""
        return cls(path, stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev)

    def check(self, stat: os.stat_result) -> None:
        """Raise StorageError where that is of another file, or of one that was changed."""
        if self.opened(self.path, stat) == self:
            return
        what = f"was cut or lengthened from {self.n_bytes} to {stat.st_size} bytes"
        if stat.st_size == self.n_bytes:
            what = "was changed" if (stat.st_ino, stat.st_dev) == (self.inode, self.device) else "was replaced"
        raise StorageError(
            f"{self.path} {what} since parameters were taken from it, so they cannot be read any more: put it back "
            "as it was, and go on from the last commit"
        )


@dataclass(frozen=True, slots=True)
class SourcePiece:
    """Adjacent values in a file, and where in a tensor they belong.

    Attributes:
        offset_bytes: of the first value in the file. n_bytes: in the file.
        at_bytes: of the first value in the tensor (given to `PageStore.make_unit`: in the parameter).
        source_dtype: of the values in the file. dtype: in the tensor, as ``.to(dtype)`` makes them.
    """

    file: SourceFile
    offset_bytes: int
    n_bytes: int
    at_bytes: int
    source_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many values there are."""
        return self.n_bytes // self.source_dtype.itemsize

    @property
    def end_bytes(self) -> int:
        """One past the last byte in the tensor."""
        return self.at_bytes + self.numel * self.dtype.itemsize

    @property
    def converts(self) -> bool:
        """Whether values become others on the way."""
        return self.source_dtype is not self.dtype

    def moved(self, by_bytes: int) -> SourcePiece:
        """The same values ``by_bytes`` further on in the tensor."""
        return replace(self, at_bytes=self.at_bytes + by_bytes)

    def part(self, begin: int, end: int) -> SourcePiece:
        """Values [begin, end) of it."""
        size = self.source_dtype.itemsize
        return replace(
            self,
            offset_bytes=self.offset_bytes + begin * size,
            n_bytes=(end - begin) * size,
            at_bytes=self.at_bytes + begin * self.dtype.itemsize,
        )

    def fault(self) -> str | None:
        """What is wrong with it by itself, in words."""
        if self.n_bytes <= 0 or self.n_bytes % self.source_dtype.itemsize:
            return f"{self.n_bytes} bytes are no values of {self.source_dtype}"
        if self.offset_bytes < 0 or self.offset_bytes + self.n_bytes > self.file.n_bytes:
            return f"bytes {self.offset_bytes} to {self.offset_bytes + self.n_bytes} lie beyond {self.file.path}"
        if self.at_bytes < 0 or self.at_bytes % self.dtype.itemsize:
            return f"byte {self.at_bytes} of the tensor is no place of a value of {self.dtype}"
        return None


@dataclass(frozen=True, slots=True)
class Origin:
    """The content of a tensor of ``n_bytes``: pieces, in the order of their places; what none covers reads as zeros.

    Made by `Origin.of`.
    """

    pieces: tuple[SourcePiece, ...]
    n_bytes: int

    @classmethod
    def of(cls, pieces: Iterable[SourcePiece], n_bytes: int) -> Origin:
        """The origin of these pieces, in any order.

        Raises:
            ValueError: (one line) two meet, one is not inside of tensor or file, or there is none.
        """
        ordered = tuple(sorted(pieces, key=lambda piece: piece.at_bytes))
        if not ordered:
            raise ValueError("an origin has at least one piece")
        reached = 0
        for piece in ordered:
            fault = piece.fault()
            if fault is None and piece.at_bytes < reached:
                fault = f"bytes from {piece.at_bytes} on are another piece's, too"
            if fault is not None:
                raise ValueError(fault)
            reached = piece.end_bytes
        if reached > n_bytes:
            raise ValueError(f"pieces reach to byte {reached} of a tensor of {n_bytes}")
        return cls(ordered, n_bytes)

    @property
    def read_bytes(self) -> int:
        """Bytes that a load reads."""
        return sum(piece.n_bytes for piece in self.pieces)

    @property
    def files(self) -> list[SourceFile]:
        """Each file once."""
        return list(dict.fromkeys(piece.file for piece in self.pieces))

    def gaps(self) -> list[tuple[int, int]]:
        """[begin, end) of bytes that no piece covers."""
        edges = [0, *(edge for piece in self.pieces for edge in (piece.at_bytes, piece.end_bytes)), self.n_bytes]
        return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]

    def part(self, begin_bytes: int, end_bytes: int) -> list[SourcePiece]:
        """The pieces of bytes [begin_bytes, end_bytes), which begin and end between values; places count from there."""
        found = []
        for piece in self.pieces:
            size = piece.dtype.itemsize
            begin, end = max(begin_bytes, piece.at_bytes), min(end_bytes, piece.end_bytes)
            if begin < end:
                cut = piece.part((begin - piece.at_bytes) // size, (end - piece.at_bytes) // size)
                found.append(cut.moved(-begin_bytes))
        return found


def converted(origin: Origin, dtype: torch.dtype, n_bytes: int) -> Origin | None:
    """The origin of a tensor of ``n_bytes`` with the same values in ``dtype`` at the same places; None: it would round
    once where going through the dtype they have rounds twice."""
    pieces = []
    for piece in origin.pieces:
        if piece.converts and torch.promote_types(piece.source_dtype, piece.dtype) is not piece.dtype:
            return None
        at = piece.at_bytes // piece.dtype.itemsize
        pieces.append(replace(piece, dtype=dtype, at_bytes=at * dtype.itemsize))
    return Origin.of(pieces, n_bytes)


@dataclass(frozen=True, slots=True)
class SourceRead:
    """Adjacent bytes of one file that are read at once, and the pieces in them."""

    file: SourceFile
    begin_bytes: int
    end_bytes: int
    pieces: tuple[SourcePiece, ...]


def plan_reads(pieces: Sequence[SourcePiece], chunk_bytes: int) -> list[SourceRead]:
    """Reads that together fill all pieces, none longer than ``chunk_bytes``, which is a multiple of 64, in the order of
    the files.

    Large pieces are cut; neighbours in a file, a small gap between them included, are read together.
    """
    reads: list[SourceRead] = []
    for piece in sorted(_cut(pieces, chunk_bytes), key=lambda piece: (str(piece.file.path), piece.offset_bytes)):
        end_bytes = piece.offset_bytes + piece.n_bytes
        last = reads[-1] if reads else None
        if (
            last is not None
            and last.file == piece.file
            and piece.offset_bytes - last.end_bytes <= GAP_BYTES
            and max(end_bytes, last.end_bytes) - last.begin_bytes <= chunk_bytes
        ):
            reads[-1] = replace(last, end_bytes=max(end_bytes, last.end_bytes), pieces=(*last.pieces, piece))
        else:
            reads.append(SourceRead(piece.file, piece.offset_bytes, end_bytes, (piece,)))
    return reads


def _cut(pieces: Iterable[SourcePiece], chunk_bytes: int) -> Iterator[SourcePiece]:
    for piece in pieces:
        step = chunk_bytes // piece.source_dtype.itemsize
        for begin in range(0, piece.numel, step):
            yield piece.part(begin, min(begin + step, piece.numel))
