"""What a commit has of each parameter, by elements: its values, its fp32 master and its optimizer states.

A commit of several ranks has parts, each with its own page files; how they cut units, pages and slices does not matter
here. So a run goes on from a commit of any number of ranks, any degree, page size and packing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offload.commits.commit_state import CommitState, state_of
from offload.commits.stored_layout import StoredSlot, StoredUnit
from pagemem.durable.manifest import Manifest, StoredTensor
from pagemem.durable.page_map import file_sizes, impossible
from pagemem.durable.page_reader import Chunk, PageReader
from pagemem.errors import ChecksumError, CommitError
from pagemem.files.page_file import PAGE_FILE_NAME
from pagemem.sources.source_files import Origin
from pagemem.sources.source_reader import SourceReader

#: What there is of a parameter: its values, its master, or, from 0 on, the optimizer's states in their order.
VALUES: Final = -2
MASTER: Final = -1

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CommitPart:
    """One rank's part of a commit, or all of a single process's.

    Attributes:
        folders: the run directories with its page files, in the order of their striping.
    """

    folders: tuple[Path, ...]
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Elements [begin, end) of a parameter that lie in one stored tensor.

    Attributes:
        at_bytes: where the first of them does.
    """

    begin: int
    end: int
    tensor: _TensorReader
    at_bytes: int


class StoredValues:
    """Reads a commit by parameter; a context manager. One thread.

    Args:
        parts: of the commit, in rank order.

    Attributes:
        states: what each part says beside its tensors.

    Raises:
        CommitError: a part names places that cannot be, or a file of others that is not there as it was.
        StorageError: a page file cannot be opened.
    """

    def __init__(self, parts: Sequence[CommitPart]) -> None:
        self.states: list[CommitState] = [state_of(part.manifest) for part in parts]
        self._stretches: dict[tuple[str, int], list[_Stretch]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._open = ExitStack()
        with ExitStack() as undo:
            undo.callback(self._open.close)
            sources = SourceReader()
            self._open.callback(sources.close)
            for part, state in zip(parts, self.states, strict=True):
                self._add(_PartReader(part, sources, self._open), state)
            undo.pop_all()
        for found in self._stretches.values():
            found.sort(key=lambda stretch: (stretch.begin, stretch.end))

    def __enter__(self) -> StoredValues:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files. Idempotent."""
        self._open.close()

    def dtype(self, name: str) -> torch.dtype:
        """Of a parameter's values. KeyError: the commit has no such parameter."""
        return self._dtypes[name]

    def has(self, name: str, what: int) -> bool:
        """Whether there is any of it: a state that nothing was added to holds no bytes."""
        return (name, what) in self._stretches

    def read(self, name: str, what: int, begin: int, into: Tensor) -> None:
        """Fill a flat tensor, of the values' dtype or fp32, with a parameter's elements from ``begin`` on; states of
        which there are none are zeros.

        Args:
            name: of the whole parameter, where it is cut. what: `VALUES`, `MASTER`, or the number of a state.

        Raises:
            CommitError: the commit does not have them all.
            ChecksumError: a page does not hold what was written. StorageError: a file cannot be read.
        """
        end, at, size = begin + into.numel(), begin, into.element_size()
        flat: Bytes = into.view(torch.uint8).numpy()
        if what >= 0:
            flat[:] = 0
        for stretch in self._stretches.get((name, what), ()):
            first, last = max(at, stretch.begin), min(end, stretch.end)
            if first >= last:
                continue
            if first > at and what < 0:
                break
            at_bytes = stretch.at_bytes + (first - stretch.begin) * size
            stretch.tensor.read(at_bytes, flat[(first - begin) * size : (last - begin) * size])
            at = last
        if at < end and what < 0:
            kind = "values" if what == VALUES else "master"
            raise CommitError(f"the commit has no {kind} of {name} from element {at} on")

    def _add(self, part: _PartReader, state: CommitState) -> None:
        for unit in state.units:
            for slot in unit.slots:
                self._dtypes.setdefault(slot.whole, unit.torch_dtype)
                self._add_values(part, unit, slot)
                for number in range(len(unit.slices)):
                    self._add_slice(part, unit, number, slot)

    def _add_values(self, part: _PartReader, unit: StoredUnit, slot: StoredSlot) -> None:
        begin, end = unit.values
        size = unit.torch_dtype.itemsize
        self._add_range(part, unit.parameters, slot, VALUES, (begin, end), 0, size)

    def _add_slice(self, part: _PartReader, unit: StoredUnit, number: int, slot: StoredSlot) -> None:
        piece = unit.slices[number]
        span = piece.begin, piece.end
        if piece.master is not None:
            self._add_range(part, piece.master, slot, MASTER, span, 0, 4)
        if piece.states is not None and piece.states in part.n_bytes and piece.end > piece.begin:
            one_bytes = 4 * (piece.end - piece.begin)
            for state in range(part.n_bytes[piece.states] // one_bytes):
                self._add_range(part, piece.states, slot, state, span, state * one_bytes, 4)

    def _add_range(
        self, part: _PartReader, key: str, slot: StoredSlot, what: int, span: tuple[int, int], at_bytes: int, size: int
    ) -> None:
        """Elements [begin, end) of a unit's layout lie one after another in a tensor from ``at_bytes`` on: those of a
        slot."""
        begin, end = max(span[0], slot.offset), min(span[1], slot.end)
        if begin < end:
            first = slot.first + begin - slot.offset
            at_bytes += (begin - span[0]) * size
            found = self._stretches.setdefault((slot.whole, what), [])
            if any(other.begin <= first and other.end >= first + end - begin for other in found):
                return  # another rank has the same
            found.append(_Stretch(first, first + end - begin, part.tensor(key, what), at_bytes))


class _PartReader:
    """One part's tensors by key."""

    def __init__(self, part: CommitPart, sources: SourceReader, open_: ExitStack) -> None:
        manifest = part.manifest
        page_files = [folder / PAGE_FILE_NAME for folder in part.folders]
        if why := impossible([manifest], file_sizes(page_files)):
            raise CommitError(f"commit {manifest.number} in {part.folders[0]} is damaged: {why[manifest.number]}")
        self._pages = open_.enter_context(PageReader(page_files, manifest.page_bytes))
        self._sources = sources
        self._checksums = manifest.checksums
        files = [file.find() for file in manifest.files]
        self._places: dict[str, StoredTensor | Origin] = {stored.key: stored for stored in manifest.tensors}
        self._places |= {tensor.key: tensor.origin(files) for tensor in manifest.referenced}
        self.n_bytes = {key: place.n_bytes for key, place in self._places.items()}
        self._readers: dict[str, _TensorReader] = {}
        self._buffers: dict[int, _Buffer] = {}

    def tensor(self, key: str, what: int) -> _TensorReader:
        """What reads one; tensors of different kinds are read side by side, each with a buffer."""
        if key not in self._readers:
            buffer = self._buffers.setdefault(min(what, 0), _Buffer(self._pages))
            self._readers[key] = _TensorReader(self._places[key], self._pages, self._sources, buffer, self._checksums)
        return self._readers[key]


class _Buffer:
    """The chunk of a tensor that was read last."""

    def __init__(self, pages: PageReader) -> None:
        self._pages = pages
        self._made: Bytes | None = None
        self.of: tuple[object, int] | None = None

    @property
    def content(self) -> Bytes:
        """The memory, made when it is first wanted."""
        if self._made is None:
            self._made = np.frombuffer(self._pages.buffer(), dtype=np.uint8)
        return self._made


class _TensorReader:
    """Any bytes of one stored tensor, read a chunk at a time."""

    def __init__(
        self, place: StoredTensor | Origin, pages: PageReader, sources: SourceReader, buffer: _Buffer, checksums: bool
    ) -> None:
        self._place = place
        self._pages = pages
        self._sources = sources
        self._buffer = buffer
        self._checksums = checksums
        self._chunks: list[Chunk] = []

    def read(self, begin: int, into: Bytes) -> None:
        """Fill ``into`` with the bytes from ``begin`` on."""
        end = begin + len(into)
        if end > self._place.n_bytes:
            raise CommitError(f"a tensor of {self._place.n_bytes} bytes is to have some up to {end}")
        at = begin
        for chunk_begin, chunk_end, number in self._overlapping(begin, end):
            if self._buffer.of != (self, number):
                self._buffer.of = None
                self._load(number, chunk_begin, chunk_end)
                self._buffer.of = self, number
            last = min(end, chunk_end)
            into[at - begin : last - begin] = self._buffer.content[at - chunk_begin : last - chunk_begin]
            at = last

    def _overlapping(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """First byte, end and number of the chunks that have bytes [begin, end)."""
        if isinstance(self._place, Origin):
            size = self._pages.chunk_bytes
            for number in range(begin // size, -(-end // size)):
                yield number * size, min((number + 1) * size, self._place.n_bytes), number
            return
        if not self._chunks:
            self._chunks = list(self._pages.chunks(self._place))
        for number, chunk in enumerate(self._chunks):
            chunk_end = chunk.begin_bytes + chunk.n_bytes
            if chunk.begin_bytes < end and chunk_end > begin:
                yield chunk.begin_bytes, chunk_end, number

    def _load(self, number: int, begin: int, end: int) -> None:
        content = self._buffer.content
        if isinstance(self._place, Origin):
            content[:] = 0
            self._sources.fill(self._place.part(begin, end), content)
            return
        with content.data as into:
            wrong = self._pages.read(self._chunks[number], into, checksums=self._checksums)
        if wrong:
            raise ChecksumError(f"{self._place.key}: {wrong[0]}: the disk or another program changed it")
