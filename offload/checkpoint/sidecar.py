"""The safetensors file beside a commit: its header held against its bytes, and its tensors read one by one.

The file is 8 bytes of header length, the header in JSON, and the tensors' bytes without gaps; see
`offload.checkpoint.safetensors_writer`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Annotated, Any, Final

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from offload.checkpoint.safetensors_writer import Weight
from pagemem.durable.commit_folder import CommitFolder
from pagemem.errors import CommitError
from pagemem.folders.small_file import Count, Line, Record, checked, parse_json
from pagemem.units import MiB

_MAX_HEADER_BYTES: Final = 64 * MiB
_PIECE_BYTES: Final = 4 * MiB
_METADATA: Final = "__metadata__"
TORCH_DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class _Entry(Record):
    dtype: Line
    shape: Annotated[tuple[Count, ...], Field(max_length=64)]
    data_offsets: tuple[Count, Count]


_HEADER: Final = TypeAdapter(dict[Line, _Entry])


class Sidecar:
    """The small tensors of a commit; a context manager that holds the file open. Closed at once where there is none.

    Args:
        entry: of the manifest for the file; None: there is no file.

    Attributes:
        weights: what is in it, by name.

    Raises:
        CommitError: it is not what was written, or not a whole safetensors file; nothing is left open.
    """

    def __init__(self, folder: CommitFolder, number: int, entry: Mapping[str, Any] | None) -> None:
        self.weights: dict[str, Weight] = {}
        self._places: dict[str, int] = {}
        self._fd: int | None = None
        if entry is None:
            return
        self._fd = folder.open_sidecar(number, entry)
        self._path = folder.sidecar(number)
        try:
            self._read_header(int(entry["n_bytes"]))
        except ValueError as error:
            self.close()
            raise CommitError(f"{self._path} is damaged: {error}") from error
        except BaseException:
            self.close()
            raise

    def _read_header(self, n_file_bytes: int) -> None:
        n_header = int.from_bytes(self._at(0, 8), "little")
        if not 2 <= n_header <= min(_MAX_HEADER_BYTES, n_file_bytes - 8):
            raise ValueError(
                f"its header would have {n_header} bytes, of {n_file_bytes} in the file; at most {_MAX_HEADER_BYTES} "
                "are read"
            )
        found = parse_json(self._at(8, n_header))
        if isinstance(found, dict):
            found.pop(_METADATA, None)
        end = 0
        for name, entry in sorted(checked(_HEADER, found).items(), key=lambda item: item[1].data_offsets):
            if entry.dtype not in TORCH_DTYPES:
                raise ValueError(f"{name}: dtype {entry.dtype!r} is not known")
            begin, upto = entry.data_offsets
            weight = Weight(name, entry.dtype, entry.shape)
            if begin != end or upto - begin != weight.n_bytes:
                raise ValueError(
                    f"{name}: it lies at bytes {begin} to {upto}, the one before it ends at {end}; "
                    f"{list(entry.shape)[:8]} of {entry.dtype} take {weight.n_bytes}"
                )
            self.weights[name], self._places[name], end = weight, 8 + n_header + begin, upto
        if 8 + n_header + end != n_file_bytes:
            raise ValueError(f"its tensors end at byte {8 + n_header + end}, the file at {n_file_bytes}")

    def pieces(self, name: str) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of each piece of a tensor, in order.

        Raises:
            CommitError: it cannot be read.
        """
        place, n_bytes = self._places[name], self.weights[name].n_bytes
        for offset in range(0, n_bytes, _PIECE_BYTES):
            yield offset, self._at(place + offset, min(_PIECE_BYTES, n_bytes - offset))

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole.

        Raises:
            CommitError: it cannot be read.
        """
        weight = self.weights[name]
        content = bytearray().join(piece for _, piece in self.pieces(name))
        flat = (
            torch.frombuffer(content, dtype=torch.uint8).view(TORCH_DTYPES[weight.dtype])
            if content
            else torch.empty(0, dtype=TORCH_DTYPES[weight.dtype])
        )
        return flat.reshape(weight.shape)

    def _at(self, position: int, n_bytes: int) -> bytes:
        assert self._fd is not None
        found = b""
        try:
            while len(found) < n_bytes and (part := os.pread(self._fd, n_bytes - len(found), position + len(found))):
                found += part
        except OSError as error:
            raise CommitError(
                f"{self._path} cannot be read at byte {position + len(found)}: {error.strerror}"
            ) from error
        if len(found) < n_bytes:
            raise CommitError(f"{self._path} is damaged: it ends at byte {position + len(found)}")
        return found

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
