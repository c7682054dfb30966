"""The weights of a commit under the names of ``model.state_dict()``, read from the page files piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offload.checkpoint.safetensors_writer import Weight
from offload.commits.commit_state import state_of
from offload.commits.sidecar import Sidecar
from offload.commits.stored_layout import StoredSlot, StoredUnit
from pagemem.durable.manifest import Manifest, StoredTensor
from pagemem.durable.page_map import file_sizes, impossible
from pagemem.durable.page_reader import Chunk, PageReader
from pagemem.errors import ChecksumError, CommitError, OffloadError
from pagemem.files.page_file import PAGE_FILE_NAME
from pagemem.sources.source_files import Origin, SourcePiece
from pagemem.sources.source_reader import SourceReader
from pagemem.units import KiB

#: Supported dtypes; "keep" is what the parameters were computed in.
DTYPES: Final[dict[str, torch.dtype | None]] = {
    "keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
#: Elements of a parameter that are in memory at a time.
PIECE_NUMEL: Final = 256 * KiB

Bytes = npt.NDArray[np.uint8]


class ExportError(OffloadError):
    """A commit cannot be exported as asked, or not to that place. Nothing was changed."""


class CommitWeights:
    """The tensors of a commit, under the names of ``model.state_dict()``, and their bytes piece by piece.

    Args:
        sidecar: the small tensors beside the manifest; open as long as this is used.
        sources: reads what lies in files of others.
        dtype: of the paged parameters; None: as they were computed in. Buffers keep their own.

    Attributes:
        tied: further names, each with the one under which the tensor is.

    Raises:
        CommitError: the commit names places that cannot be, or a file of others that is not there as it was.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        manifest: Manifest,
        sidecar: Sidecar,
        sources: SourceReader,
        dtype: torch.dtype | None,
    ) -> None:
        self._manifest = manifest
        self._sidecar = sidecar
        self._dtype = dtype
        self._state = state_of(manifest)
        self._stored = {stored.key: stored for stored in manifest.tensors}
        self._referenced = {tensor.key: tensor for tensor in manifest.referenced}
        self._files = [file.find() for file in manifest.files]
        self._sources = sources
        self.tied = {name: kept for name, kept in self._state.names.items() if name != kept}
        why = impossible([manifest], file_sizes(folder / PAGE_FILE_NAME for folder in folders))
        if why:
            raise CommitError(f"commit {manifest.number} is damaged: {why[manifest.number]}")
        kept = set(self._state.names.values())
        self._paged: dict[str, list[tuple[StoredUnit, StoredSlot]]] = {}
        for unit in self._state.units:
            for slot in unit.slots:
                if slot.whole in kept:
                    self._paged.setdefault(slot.whole, []).append((unit, slot))
        for name, places in self._paged.items():
            if not _follow_one_another([slot for _, slot in places]):
                raise CommitError(f"commit {manifest.number} is damaged: slices of {name} do not follow one another")

    def listed(self) -> list[Weight]:
        """All of them, in the order of the names.

        Raises:
            CommitError: the commit does not have one.
        """
        found = []
        for name in dict.fromkeys(self._state.names.values()):
            if name in self._paged:
                unit, slot = self._paged[name][0]
                shape = slot.shape
                if slot.of is not None:
                    shape = (sum(part.shape[0] for _, part in self._paged[name]), *slot.shape[1:])
                found.append(Weight(name, self._dtype or unit.torch_dtype, shape))
            elif (small := self._sidecar.tensors.get(name)) is not None:
                found.append(Weight(name, small.dtype, tuple(small.shape)))
            else:
                raise CommitError(f"commit {self._manifest.number} has no {name} that can be exported")
        return found

    def pieces(self, reader: PageReader) -> Iterator[tuple[str, int, memoryview]]:
        """Name, offset and bytes of each piece.

        Raises:
            ChecksumError: a page does not hold what was written; names the tensor, the file and the frame.
            StorageError: a file cannot be read.
            ExportError: a value cannot be expressed in the dtype.
        """
        for name in dict.fromkeys(self._state.names.values()):
            if name in self._sidecar.tensors:
                for begin, piece in self._sidecar.pieces(name):
                    yield name, begin, piece
        buffers = [np.frombuffer(reader.buffer(), dtype=np.uint8) for _ in range(2)]
        for unit in self._state.units:
            yield from self._unit_pieces(unit, reader, buffers)

    def _unit_pieces(
        self, unit: StoredUnit, reader: PageReader, buffers: Sequence[Bytes]
    ) -> Iterator[tuple[str, int, memoryview]]:
        source, target = unit.torch_dtype, self._dtype or unit.torch_dtype
        size = source.itemsize
        checksums = self._manifest.checksums
        values = _Stream(
            reader, self._sources, buffers[0], [(0, unit.slots[-1].end * size, self._place(unit.parameters))],
            checksums=checksums,
        )  # fmt: skip
        masters = None
        if target is not source and all(part.master is not None for part in unit.slices):
            parts = [(part.begin * 4, part.end * 4, self._place(part.master or "")) for part in unit.slices]
            masters = _Stream(reader, self._sources, buffers[1], parts, checksums=checksums)
        for slot in unit.slots:
            if slot.whole not in self._paged:
                continue  # dropped from the model since its unit was made
            for begin in range(slot.offset, slot.end, PIECE_NUMEL):
                end = min(begin + PIECE_NUMEL, slot.end)
                piece = torch.from_numpy(values.take(begin * size, end * size)).view(source)
                if target is not source:
                    wide = (
                        None
                        if masters is None
                        else torch.from_numpy(masters.take(begin * 4, end * 4)).view(torch.float32)
                    )
                    piece = _converted(slot, piece, wide, target)
                yield (
                    slot.whole,
                    (slot.first + begin - slot.offset) * target.itemsize,
                    piece.view(torch.uint8).numpy().data,
                )

    def _place(self, key: str) -> StoredTensor | Origin:
        """Where a tensor lies: in page files, or in files of others."""
        referenced = self._referenced.get(key)
        return self._stored[key] if referenced is None else referenced.origin(self._files)


def _follow_one_another(slots: Sequence[StoredSlot]) -> bool:
    """Whether slots are one parameter, or all slices of one in order."""
    if slots[0].of is None:
        return len(slots) == 1
    row, inner = 0, slots[0].shape[1:]
    for slot in slots:
        if slot.of is None or not slot.shape or slot.first_row != row or slot.shape[1:] != inner:
            return False
        row += slot.shape[0]
    return True


def _converted(slot: StoredSlot, values: Tensor, masters: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values in another dtype, from their masters, except where they were edited since those were made."""
    exact = values
    if masters is not None:
        exact = torch.where(masters.to(values.dtype) == values, masters, values.float())
    if exact.dtype is dtype:
        return exact
    converted = exact.to(dtype)
    if bool((torch.isinf(converted) & torch.isfinite(exact)).any()):
        raise ExportError(
            f"{slot.name} has values beyond the largest of {dtype}, {torch.finfo(dtype).max:g}; export as bf16 or fp32"
        )
    return converted


class _Stream:
    """Bytes of tensors that lie one after another, read once, from front to back, a chunk at a time.

    Args:
        buffer: as long as a chunk, this stream's alone while it is used.
        parts: first byte, end, and where the tensor lies that has them from its first byte on.
    """

    def __init__(
        self,
        reader: PageReader,
        sources: SourceReader,
        buffer: Bytes,
        parts: Sequence[tuple[int, int, StoredTensor | Origin]],
        *,
        checksums: bool,
    ) -> None:
        self._reader = reader
        self._sources = sources
        self._checksums = checksums
        self._buffer = buffer
        self._begin = self._end = 0
        self._chunks = self._chunks_of(parts)

    def take(self, begin: int, end: int) -> Bytes:
        """A copy of bytes [begin, end), none of which lies before what was taken last."""
        taken: Bytes = np.empty(end - begin, dtype=np.uint8)
        at = begin
        while at < end:
            while at >= self._end:
                self._begin, self._end, read = next(self._chunks)  # long enough: see `check_commit`
                read()
            n_bytes = min(end, self._end) - at
            taken[at - begin : at - begin + n_bytes] = self._buffer[at - self._begin : at - self._begin + n_bytes]
            at += n_bytes
        return taken

    def _chunks_of(
        self, parts: Sequence[tuple[int, int, StoredTensor | Origin]]
    ) -> Iterator[tuple[int, int, Callable[[], None]]]:
        """First byte and end of each chunk, and what reads it."""
        for begin, end, place in parts:
            if isinstance(place, Origin):
                for start in range(begin, end, len(self._buffer)):
                    stop = min(end, start + len(self._buffer))
                    yield start, stop, partial(self._read_sources, place.part(start - begin, stop - begin))
                continue
            for chunk in self._reader.chunks(place):
                start = begin + chunk.begin_bytes
                yield start, min(end, start + chunk.n_bytes), partial(self._read_pages, place, chunk)

    def _read_sources(self, pieces: Sequence[SourcePiece]) -> None:
        self._buffer[:] = 0
        self._sources.fill(pieces, self._buffer)

    def _read_pages(self, stored: StoredTensor, chunk: Chunk) -> None:
        with self._buffer.data as into:
            wrong = self._reader.read(chunk, into, checksums=self._checksums)
        if wrong:
            raise ChecksumError(
                f"{stored.key}: {wrong[0]}: the disk or another program changed it; export an earlier commit"
            )
