"""What a commit says: which bytes of the page files make up which tensor, and the scalars of that moment. Pure data.

On disk a manifest is one header line (format, length and xxh3 of the rest) and JSON. A file that was cut anywhere, or
changed anywhere, is refused whole; so is one that is whole and has a field missing, unknown, of another type or out of
range.
"""

from __future__ import annotations

import json
import re
import reprlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, TypeAdapter
from xxhash import xxh3_128_hexdigest

from pagemem.durable.references import ReferencedFile, ReferencedTensor
from pagemem.errors import CommitError, DamagedCommitError, UnknownCommitError
from pagemem.folders.small_file import Count, Flag, Line, checked, parse_json
from pagemem.frames.page import MAX_PAGE_BYTES, MIN_PAGE_BYTES, Extent, FrameId, FrameRun, Placement, TensorId
from pagemem.sources.source_files import SourceFile
from pagemem.tier import TRANSIENT, Tag, Tier
from pagemem.units import BLOCK_BYTES, ceil_div

FORMAT: Final = "offload-commit-1"
_ANY_FORMAT: Final = re.compile(r"offload-commit-\d+")
#: A larger file is neither written nor read. Read, one takes some dozens of times its bytes of RAM at the worst.
MAX_BYTES: Final = 64 << 20

_Bytes = Annotated[int, Field(strict=True, gt=0, le=2**48)]
_Frame = Annotated[int, Field(strict=True, ge=0, lt=2**40)]
_Frames = Annotated[int, Field(strict=True, gt=0, lt=2**40)]
_InPage = Annotated[int, Field(strict=True, ge=0, le=MAX_PAGE_BYTES)]
_Sum = Annotated[int, Field(strict=True, ge=0, lt=2**64)]
_CommittedTag = Annotated[
    str, Field(strict=True, pattern=f"^({'|'.join(tag.value for tag in Tag if tag not in TRANSIENT)})$")
]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor's bytes: its runs of whole frames, then at most one part of a page; checksums of its extents in order.

    Attributes:
        runs: (first frame, frames) each.
        tail: frame, offset and length of the part of a page, or None.
    """

    name: Line
    tag: _CommittedTag
    n_bytes: _Bytes
    runs: tuple[tuple[_Frame, _Frames], ...]
    tail: tuple[_Frame, _InPage, _InPage] | None
    sums: tuple[_Sum, ...]

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def key(self) -> str:
        """What tells tensors of one run apart."""
        return f"{self.tag}: {self.name}"

    def placement(self) -> Placement:
        """Its frames, for an allocator; the tensor in it is nobody's."""
        runs = tuple(FrameRun(FrameId(first), n_frames) for first, n_frames in self.runs)
        tail = None if self.tail is None else Extent(FrameId(self.tail[0]), self.tail[1], self.tail[2])
        return Placement(TensorId(-1), Tier.SSD, self.n_bytes, runs, tail)

    def fault(self, page_bytes: int) -> str | None:
        """What is wrong with the place by itself; where nothing is, its extents are those of its size, inside their
        pages."""
        tail_bytes = 0
        if self.tail is not None:
            frame, offset_bytes, tail_bytes = self.tail
            inside = tail_bytes > 0 and offset_bytes + tail_bytes <= page_bytes
            if not inside or offset_bytes % BLOCK_BYTES or tail_bytes % BLOCK_BYTES:
                return (
                    f"{self.key}: its tail of {tail_bytes} bytes at offset {offset_bytes} of frame {frame} is not "
                    f"inside a page of {page_bytes}"
                )
        if self.n_bytes % BLOCK_BYTES:
            return (
                f"{self.key}: {self.n_bytes} bytes in runs {reprlib.repr(list(self.runs))} are no whole blocks in "
                "whole frames"
            )
        n_frames, wanted = sum(n for _, n in self.runs), ceil_div(self.n_bytes - tail_bytes, page_bytes)
        if tail_bytes > self.n_bytes:
            return f"{self.key}: its tail has {tail_bytes} bytes, more than its {self.n_bytes}"
        if n_frames != wanted:
            return f"{self.key}: it has {n_frames} whole frames, its {self.n_bytes} bytes take {wanted}"
        n_extents = n_frames + (self.tail is not None)
        if len(self.sums) != n_extents:
            return f"{self.key}: it has {len(self.sums)} checksums for {n_extents} extents"
        return None


@dataclass(frozen=True, slots=True)
class Manifest:
    """One commit.

    Attributes:
        number: counts the commits of a run; later ones have greater numbers.
        name: given by the user, or None.
        step: optimizer steps made.
        run_ids: identities of the run directories with the page files, in order of their paths.
        checksums: whether ``sums`` mean anything.
        state: what else makes up the moment (counters, random generators, ...), as JSON has it.
        files: of others, in which the ``referenced`` tensors lie.
    """

    number: Annotated[int, Field(strict=True, gt=0, lt=2**53)]
    name: Line | None
    created: Line
    step: Count
    page_bytes: Annotated[int, Field(strict=True, ge=MIN_PAGE_BYTES, le=MAX_PAGE_BYTES)]
    run_ids: Annotated[tuple[Line, ...], Field(min_length=1, max_length=64)]
    checksums: Flag
    tensors: tuple[StoredTensor, ...]
    state: dict[str, Any]
    files: tuple[ReferencedFile, ...] = ()
    referenced: tuple[ReferencedTensor, ...] = ()

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor, wherever it lies, by its key."""
        stored = {tensor.key: tensor.n_bytes for tensor in self.tensors}
        return stored | {tensor.key: tensor.n_bytes for tensor in self.referenced}

    def encode(self) -> bytes:
        """The file's content.

        Raises:
            TypeError, ValueError: ``state`` has something that JSON cannot say.
        """
        body = json.dumps(asdict(self), allow_nan=False, separators=(",", ":")).encode()
        return f"{FORMAT} {len(body)} {xxh3_128_hexdigest(body)}\n".encode() + body

    @classmethod
    def decode(cls, content: bytes) -> Manifest:
        """The manifest in a file's content.

        Raises:
            DamagedCommitError: it was cut or changed. UnknownCommitError: it was written by another version.
            CommitError: it says what no run does.
        """
        header, _, body = content.partition(b"\n")
        words = header.decode("ascii", errors="replace").split(" ")
        if words[0] != FORMAT:
            # What another version wrote is whole, and not for us to judge.
            kind = UnknownCommitError if _ANY_FORMAT.fullmatch(words[0]) else DamagedCommitError
            raise kind(f"this is not a commit of this version: it begins with {words[0][:40]!r}, not {FORMAT!r}")
        if len(words) != 3 or words[1] != str(len(body)):
            raise DamagedCommitError(
                f"it has {len(body)} bytes after its header, which says {' '.join(words[1:2]) or 'nothing'}: it was cut"
            )
        if words[2] != xxh3_128_hexdigest(body):
            raise DamagedCommitError("its content is not what was written: its checksum differs")
        try:
            found = checked(_ADAPTER, parse_json(body))
            found.check()
            return found
        except ValueError as error:
            raise CommitError(f"its content cannot be read: {error}") from error

    def check(self) -> None:
        """Whether fields agree with each other.

        Raises:
            ValueError: (one line) they do not.
        """
        if self.page_bytes & (self.page_bytes - 1):
            raise ValueError(f"page_bytes: {self.page_bytes} is no power of two")
        if len(set(self.run_ids)) < len(self.run_ids):
            raise ValueError(f"run_ids: one is there twice: {', '.join(self.run_ids)}")
        keys: set[str] = set()
        files = [SourceFile(Path(file.path), file.n_bytes, 0, 0, 0) for file in self.files]
        for tensor in self.referenced:
            tensor.origin(files)
        for key in [*(stored.key for stored in self.tensors), *(tensor.key for tensor in self.referenced)]:
            if key in keys:
                raise ValueError(f"tensors: {key} is there twice")
            keys.add(key)


_ADAPTER: Final = TypeAdapter(Manifest)
