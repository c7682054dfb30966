"""One safetensors file: which tensors it has, and their bytes.

The header is taken for nothing before it is checked: sizes, dtypes, shapes and places of all tensors must account for
every byte of the file once. Reading a header costs at most `MAX_HEADER_BYTES` of text. (A file is 8 bytes of header
length, the header in JSON, and the tensors' bytes without gaps.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor

from pagemem.errors import StorageError
from pagemem.folders.own_file import os_failure
from pagemem.folders.small_file import Count, Line, Record, checked, open_regular, parse_json, read_small
from pagemem.sources.source_files import SourceFile, SourcePiece
from pagemem.sources.source_reader import SourceReader

#: torch's dtypes by the names that safetensors has for them.
DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
}  # fmt: skip
MAX_HEADER_BYTES: Final = 32 << 20
_MAX_FILE_BYTES: Final = 1 << 60
_LENGTH_BYTES: Final = 8
#: What strides of a tensor without elements may come to, with room for the element's size.
_MAX_NUMEL: Final = 1 << 59


class _Header(Record):
    """What a header says of one tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Annotated[str, Field(strict=True, max_length=16)]
    shape: Annotated[list[Count], Field(max_length=64)]
    data_offsets: tuple[Count, Count]


_HEADERS: Final = TypeAdapter(dict[Line, _Header])
_METADATA: Final = TypeAdapter(dict[Annotated[str, Field(strict=True)], Annotated[str, Field(strict=True)]])


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file.

    Attributes:
        kind: its dtype as safetensors names it.
        offset_bytes: where it begins in the file.
    """

    name: str
    file: SourceFile
    kind: str
    shape: torch.Size
    offset_bytes: int
    n_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return DTYPES[self.kind]

    def pieces(self, dtype: torch.dtype) -> list[SourcePiece]:
        """Where its elements are, to become those of ``dtype``; none for an empty tensor."""
        piece = SourcePiece(self.file, self.offset_bytes, self.n_bytes, 0, self.dtype, dtype)
        return [piece] if self.n_bytes else []

    def read(self, dtype: torch.dtype, begin: int = 0, end: int | None = None) -> Tensor:
        """Its elements from ``begin`` to ``end``, flat, as ``.to(dtype)`` makes them.

        Raises:
            StorageError: the file cannot be read, or is not as it was.
        """
        end = self.shape.numel() if end is None else end
        found = torch.empty(end - begin, dtype=dtype)
        reader = SourceReader()
        try:
            for piece in self.pieces(dtype):
                part = piece.part(begin, end).moved(-begin * dtype.itemsize)
                reader.fill([part], found.view(torch.uint8).numpy())
        finally:
            reader.close()
        return found


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The tensors of a file, by name, in the order of their bytes."""

    tensors: Mapping[str, FileTensor]
    metadata: Mapping[str, str]


def read_header(path: Path) -> SafetensorsFile:
    """What a file holds.

    Raises:
        StorageError: (one line) it cannot be read, or is no safetensors file.
    """
    try:
        fd, _ = open_regular(path, _MAX_FILE_BYTES, follow=True)
        try:
            return header_of(fd, Path(os.path.realpath(path)))
        finally:
            os.close(fd)
    except OSError as error:
        raise os_failure(error, "reading", path) from error
    except ValueError as error:
        raise StorageError(f"{path} is no safetensors file: {error}") from error


def header_of(fd: int, path: Path) -> SafetensorsFile:
    """What an open file holds that lies at ``path``.

    Raises:
        OSError: it cannot be read.
        ValueError: (one line) it is no safetensors file.
    """
    file = SourceFile.opened(path, os.fstat(fd))
    length_bytes = int.from_bytes(os.pread(fd, _LENGTH_BYTES, 0), "little")
    if not 0 < length_bytes <= min(file.n_bytes - _LENGTH_BYTES, MAX_HEADER_BYTES):
        raise ValueError(
            f"its header has {length_bytes} bytes by its first eight, in a file of {file.n_bytes}; at most "
            f"{MAX_HEADER_BYTES} are read"
        )
    content = bytearray(length_bytes)
    fill(fd, _LENGTH_BYTES, memoryview(content))
    return SafetensorsFile(*_parse(file, bytes(content), _LENGTH_BYTES + length_bytes))


def _parse(file: SourceFile, content: bytes, start_bytes: int) -> tuple[dict[str, FileTensor], dict[str, str]]:
    found = parse_json(content)
    if not isinstance(found, dict):
        raise ValueError("its header is not an object")
    metadata = checked(_METADATA, found.pop("__metadata__", None) or {})
    tensors = {}
    reached_bytes, known = 0, checked(_HEADERS, found)
    for name, header in sorted(known.items(), key=lambda item: item[1].data_offsets):
        begin_bytes, end_bytes = header.data_offsets
        if header.dtype not in DTYPES:
            raise ValueError(f"{name[:200]!r} is of dtype {header.dtype!r}, which is not known here")
        wanted_bytes = math.prod(header.shape) * DTYPES[header.dtype].itemsize
        if end_bytes - begin_bytes != wanted_bytes:
            raise ValueError(
                f"{name[:200]!r} has {end_bytes - begin_bytes} bytes, but its shape and dtype make {wanted_bytes}"
            )
        if math.prod(max(size, 1) for size in header.shape) > _MAX_NUMEL:
            raise ValueError(f"{name[:200]!r} has shape {header.shape[:8]}, larger than any tensor's")
        if begin_bytes != reached_bytes:
            raise ValueError(f"{name[:200]!r} begins at byte {begin_bytes}, where the one before ends at "
                             f"{reached_bytes}")  # fmt: skip
        reached_bytes = end_bytes
        tensors[name] = FileTensor(
            name, file, header.dtype, torch.Size(header.shape), start_bytes + begin_bytes, wanted_bytes
        )
    if start_bytes + reached_bytes != file.n_bytes:
        raise ValueError(f"its tensors end at byte {start_bytes + reached_bytes}, the file has {file.n_bytes} bytes")
    return tensors, metadata


def fill(fd: int, offset_bytes: int, target: memoryview) -> None:
    """Read until ``target`` is full.

    Raises:
        OSError: that cannot be read.
        ValueError: the file ends before.
    """
    done = 0
    while done < len(target):
        n_bytes = os.preadv(fd, [target[done:]], offset_bytes + done)
        if not n_bytes:
            raise ValueError(f"it ends at byte {offset_bytes + done}, inside what it was to hold")
        done += n_bytes


def json_of(path: Path, max_bytes: int) -> Any:
    """The value in a small JSON file of a checkpoint.

    Raises:
        StorageError: it cannot be read, or is no JSON.
    """
    try:
        return parse_json(read_small(path, max_bytes, follow=True))
    except OSError as error:
        raise os_failure(error, "reading", path) from error
    except ValueError as error:
        raise StorageError(f"{path}: {error}") from error
