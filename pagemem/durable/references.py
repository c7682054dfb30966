"""What a commit says of tensors that lie in files of others: which bytes of which files, and how to know these again.

A file may have been moved, or copied to another machine, since: it is known by its size and by the digest of all its
bytes. Where it still lies as it did, by what the system says of it, it is not read for that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import torch
from pydantic import ConfigDict, Field

from pagemem.errors import CommitError, StorageError
from pagemem.folders.own_file import naming
from pagemem.folders.small_file import Count, Line
from pagemem.sources.source_digest import digest_of, note_digest
from pagemem.sources.source_files import Origin, SourceFile, SourcePiece

_DTYPES: Final = {
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz, "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}  # fmt: skip
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_Dtype = Annotated[str, Field(strict=True, pattern=f"^({'|'.join(_DTYPES)})$")]
#: The file that was opened can still be read, for as long as it is open.
_UNNAMEABLE: Final = (
    "a commit would name it, so none can be made; earlier ones need it, too: put the same file back, or save "
    "model.state_dict() elsewhere before this process ends"
)
#: Number of the file, offset and bytes in it, first byte in the tensor, dtype in the file and in the tensor.
_Piece = tuple[Count, Count, Count, Count, _Dtype, _Dtype]


@dataclass(frozen=True, slots=True)
class ReferencedFile:
    """A file of others. ``path``, ``mtime_ns`` and ``inode`` are what they were then."""

    path: Annotated[str, Field(strict=True, max_length=4096, pattern=r"^[^\x00]+$")]
    n_bytes: Count
    mtime_ns: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
    inode: Annotated[int, Field(strict=True, ge=0, lt=2**64)]
    digest: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}$")]

    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, file: SourceFile) -> ReferencedFile:
        """Of a file that must be there, as it was. It is read once, to know it again.

        Raises:
            StorageError: it is not.
        """
        try:
            with naming("looking at", file.path):
                now = os.stat(file.path)
        except StorageError as error:
            raise StorageError(f"{error}; {_UNNAMEABLE}") from error
        if (now.st_ino, now.st_dev) != (file.inode, file.device):
            raise StorageError(f"{file.path} was replaced since parameters were taken from it; {_UNNAMEABLE}")
        file.check(now)
        return cls(str(file.path), file.n_bytes, file.mtime_ns, file.inode, digest_of(file))

    def find(self, known: Iterable[SourceFile] = (), *, reads: bool = False) -> SourceFile:
        """The file, where it was then or among those that are known.

        Args:
            reads: whether it is read in any case, and not only where it may be another one.

        Raises:
            CommitError: it is neither; names its folder.
        """
        why = "there is another file now"
        try:
            there = [SourceFile.of(self.path)]
        except StorageError as error:
            there, why = [], str(error)
        for file in [*there, *known]:
            if file.n_bytes == self.n_bytes and not reads and self._lies_as_then(file):
                note_digest(file, self.digest)
                return file
            if file.n_bytes == self.n_bytes and digest_of(file) == self.digest:
                return file
        path = Path(self.path)
        raise CommitError(
            f"frozen or unchanged parameters were left in {path}, {self.n_bytes} bytes, when this was committed, and "
            f"that cannot be found: {why}. Put it back, or build the model from a folder that has the same file: "
            "offload.from_pretrained(folder, ...)"
        )

    def _lies_as_then(self, file: SourceFile) -> bool:
        return (str(file.path), file.mtime_ns, file.inode) == (self.path, self.mtime_ns, self.inode)


@dataclass(frozen=True, slots=True)
class ReferencedTensor:
    """One tensor's bytes in files of others."""

    name: Line
    tag: Annotated[str, Field(strict=True, max_length=100)]
    n_bytes: Count
    pieces: tuple[_Piece, ...]

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def key(self) -> str:
        """What tells tensors of one run apart."""
        return f"{self.tag}: {self.name}"

    def origin(self, files: Sequence[SourceFile]) -> Origin:
        """Where its bytes are, in files in the order of the commit's.

        Raises:
            ValueError: (one line) a piece is none.
        """
        pieces = []
        for number, offset_bytes, n_bytes, at_bytes, source, dtype in self.pieces:
            if number >= len(files):
                raise ValueError(f"{self.key}: it is said to be in file {number} of {len(files)}")
            pieces.append(SourcePiece(files[number], offset_bytes, n_bytes, at_bytes, _DTYPES[source], _DTYPES[dtype]))
        try:
            return Origin.of(pieces, self.n_bytes)
        except ValueError as error:
            raise ValueError(f"{self.key}: {error}") from None


def refer_to(
    origins: Iterable[tuple[tuple[str, str, int], Origin]],
) -> tuple[tuple[ReferencedFile, ...], tuple[ReferencedTensor, ...]]:
    """Files and tensors for a manifest, of origins with name, tag and bytes of their tensor.

    Raises:
        StorageError: a file is not there, or not as it was.
    """
    numbers: dict[SourceFile, int] = {}
    tensors = []
    for (name, tag, n_bytes), origin in origins:
        pieces = tuple(
            (
                numbers.setdefault(piece.file, len(numbers)), piece.offset_bytes, piece.n_bytes, piece.at_bytes,
                _NAMES[piece.source_dtype], _NAMES[piece.dtype],
            )
            for piece in origin.pieces
        )  # fmt: skip
        tensors.append(ReferencedTensor(name, tag, n_bytes, pieces))
    return tuple(ReferencedFile.of(file) for file in numbers), tuple(tensors)
