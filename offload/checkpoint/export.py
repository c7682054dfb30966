"""`offload export`: the weights of a commit as safetensors files, streamed, so that a model of any size needs little
RAM.

The folder appears whole or not at all: everything is written under another name beside it, synced, and renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor

from offload.checkpoint.safetensors_writer import INDEX_NAME, ShardWriter, Weight, index_of, plan_shards, write_failure
from offload.checkpoint.sidecar import TORCH_DTYPES, Sidecar
from offload.commits.stopped_run import StoppedRun
from offload.commits.stored_layout import StoredLayout, StoredSlot, StoredUnit
from offload.console.byte_progress import ByteProgress
from pagemem.durable.commit_folder import CommitFolder
from pagemem.durable.manifest import Manifest, StoredTensor
from pagemem.durable.page_map import file_sizes, impossible
from pagemem.durable.page_reader import Chunk, PageReader
from pagemem.errors import ChecksumError, CommitError, DiskFullError, OffloadError
from pagemem.files.page_file import PAGE_FILE_NAME
from pagemem.folders.own_file import make_folder, naming, remove_folders, sync_folder
from pagemem.process import interrupts
from pagemem.units import KiB, format_bytes

#: dtypes that can be asked for; "keep" is what the parameters were computed in.
DTYPES: Final[dict[str, torch.dtype | None]] = {
    "keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
#: Elements of a parameter that are in memory at a time.
PIECE_NUMEL: Final = 256 * KiB
_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}

Bytes = npt.NDArray[np.uint8]


class ExportError(OffloadError):
    """A commit cannot be exported as asked, or not to that place. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: names of the files with tensors, their bytes, and the commit."""

    folder: Path
    files: tuple[str, ...]
    n_bytes: int
    manifest: Manifest


def export_run(
    run: Path,
    to: Path,
    *,
    paths: Sequence[Path],
    commit: str | None,
    dtype: str,
    max_shard_bytes: int,
    console: Console,
) -> Exported:
    """Export a commit of a run that nobody trains in. See `offload export --help`.

    Raises:
        RunDirectoryError: the run cannot be used. CommitError: the commit cannot. ExportError: not like this.
        DiskFullError, StorageError: reading or writing failed. Nothing is left of the export in any case.
    """
    with StoppedRun(run, paths) as stopped:
        manifest = stopped.choose(commit)
        for error in stopped.damaged_after(manifest):
            console.print(f"a newer commit is damaged: {error}", soft_wrap=True, highlight=False, markup=False)
        named = f" ({manifest.name})" if manifest.name else ""
        console.print(
            f"commit {manifest.number}{named}, step {manifest.step}, of {manifest.created}"
            + ("" if manifest.checksums else "; the run kept no checksums, so what is read cannot be verified"),
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
        exported = export_commit(
            stopped.folders, manifest, to, dtype=dtype, max_shard_bytes=max_shard_bytes, console=console
        )
    console.print(
        f"{exported.folder}: {len(exported.files)} files, {format_bytes(exported.n_bytes)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return exported


def export_commit(
    folders: Sequence[Path], manifest: Manifest, to: Path, *, dtype: str, max_shard_bytes: int, console: Console
) -> Exported:
    """Export a commit whose frames nobody reuses meanwhile.

    Args:
        folders: the run directories, in order.
        to: a new or empty folder.

    Raises:
        As `check_request` and `export_run`.
    """
    to = check_request(folders, to, dtype=dtype, max_shard_bytes=max_shard_bytes)
    check_alike(manifest.state.get("unlike"))
    with Sidecar(CommitFolder(folders[0]), manifest.number, manifest.state.get("sidecar")) as sidecar:
        weights = CommitWeights(folders, manifest, sidecar, DTYPES[dtype])
        shards = plan_shards(weights.listed(), max_shard_bytes, weights.tied)
        index = index_of(shards, {"step": manifest.step, "commit": manifest.number, "tied": weights.tied})
        total_bytes = len(index) + sum(shard.n_bytes for shard in shards)
        with (
            PageReader([folder / PAGE_FILE_NAME for folder in folders], manifest.page_bytes) as reader,
            _new_folder(to, total_bytes) as draft,
            ByteProgress(console, "exporting", weights.n_bytes) as progress,
            ShardWriter(draft, shards) as writer,
        ):
            for name, offset_bytes, data in weights.pieces(reader):
                interrupts.check()  # it may take long, and leaves nothing
                writer.write(name, offset_bytes, data)
                progress.advance(data.nbytes)
            writer.write_file(INDEX_NAME, index)
            writer.finish()
    return Exported(to, tuple(shard.file_name for shard in shards), total_bytes, manifest)


# ---- the place -----------------------------------------------------------------------------------------------------


def check_request(folders: Sequence[Path], to: Path, *, dtype: str, max_shard_bytes: int) -> Path:
    """Whether this can be asked for: returns the place, links resolved.

    Raises:
        ValueError: ``dtype`` or ``max_shard_bytes`` is none.
        ExportError: ``to`` is neither new nor empty, or inside the run.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; known are {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    with naming("looking at", to):
        to = to.resolve()
        for folder in folders:
            if to.is_relative_to(folder.resolve()):
                raise ExportError(f"{to} is inside the run directory {folder}; name a folder elsewhere")
        if to.exists() and not to.is_dir():
            raise ExportError(f"{to} is a file; name a new or empty folder")
        if to.is_dir() and os.listdir(to):
            raise ExportError(f"{to} is not empty; nothing is overwritten: name a new or empty folder")
    return to


def check_alike(unlike: str | None) -> None:
    """Raise ExportError where ``model.state_dict()`` has something else than the parameters and buffers of a commit."""
    if unlike is not None:
        raise ExportError(
            "the model's state_dict() is not made of its parameters and buffers alone, so an export would not equal "
            f"it: {unlike}; save model.state_dict() yourself, in the process that trains"
        )


@contextmanager
def _new_folder(to: Path, n_bytes: int) -> Iterator[Path]:
    """A folder that becomes ``to`` at the end of the block, and vanishes with everything in it after an error.

    Raises:
        DiskFullError: there is no room for ``n_bytes``.
    """
    made = make_folder(to.parent)
    draft: Path | None = None
    try:
        free_bytes = shutil.disk_usage(to.parent).free
        if free_bytes < n_bytes:
            raise DiskFullError(
                f"the export takes {n_bytes} bytes ({format_bytes(n_bytes)}), free in {to.parent} are {free_bytes} "
                f"({format_bytes(free_bytes)}); free some, or name another folder"
            )
        draft = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=".unfinished", dir=to.parent))
        yield draft
        draft.chmod(0o777 & ~_umask())
        sync_folder(draft)
        os.rename(draft, to)  # takes the place of an empty folder, refuses any other
        draft = to
        sync_folder(to.parent)
    except BaseException as error:
        failure = write_failure(error, "making", to) if isinstance(error, OSError) else error
        if draft is not None:
            _remove(draft, failure)
        remove_folders(made)
        raise failure from (error if failure is not error else error.__cause__)


def _remove(folder: Path, failure: BaseException) -> None:
    """Remove what there is of an export; where that cannot be done either, the failure says so."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if not isinstance(failure, OffloadError):
            return
        failure.args = (f"{failure}; what is left in {folder} could not be removed: {error.strerror}",)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# ---- the weights ---------------------------------------------------------------------------------------------------


class CommitWeights:
    """The tensors of a commit, under the names of ``model.state_dict()``, and their bytes piece by piece.

    Args:
        sidecar: the file beside the manifest, open.
        dtype: of the paged parameters; None: as they were computed in. Buffers keep their own.

    Attributes:
        tied: further names, each with the one under which the tensor is.

    Raises:
        CommitError: the commit names places that cannot be.
    """

    def __init__(
        self, folders: Sequence[Path], manifest: Manifest, sidecar: Sidecar, dtype: torch.dtype | None
    ) -> None:
        self._manifest = manifest
        self._beside = sidecar
        self._dtype = dtype
        self._layout = StoredLayout.read(manifest.state)
        self._stored = {stored.key: stored for stored in manifest.tensors}
        self.tied = {name: kept for name, kept in self._layout.names.items() if name != kept}
        why = impossible([manifest], file_sizes(folder / PAGE_FILE_NAME for folder in folders))
        if why:
            raise CommitError(f"commit {manifest.number} is damaged: {why[manifest.number]}")
        kept = set(self._layout.names.values())
        self._paged = {
            slot.name: (unit, slot) for unit in self._layout.units for slot in unit.slots if slot.name in kept
        }

    def listed(self) -> list[Weight]:
        """All of them, in the order of the names.

        Raises:
            CommitError: the commit does not have one.
        """
        found = []
        for name in dict.fromkeys(self._layout.names.values()):
            if name in self._paged:
                unit, slot = self._paged[name]
                found.append(Weight(name, _NAMES[self._dtype or unit.torch_dtype], slot.shape))
            elif name in self._beside.weights:
                found.append(self._beside.weights[name])
            else:
                raise CommitError(f"commit {self._manifest.number} has no {name}")
        return found

    @property
    def n_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(weight.n_bytes for weight in self.listed())

    def pieces(self, reader: PageReader) -> Iterator[tuple[str, int, memoryview]]:
        """Name, offset and bytes of each piece.

        Raises:
            ChecksumError: a page does not hold what was written; names the tensor, the file and the frame.
            StorageError: a file cannot be read.
            ExportError: a value cannot be expressed in the dtype.
        """
        for name in dict.fromkeys(self._layout.names.values()):
            if name in self._beside.weights:
                yield from ((name, offset, memoryview(piece)) for offset, piece in self._beside.pieces(name))
        buffers = [np.frombuffer(reader.buffer(), dtype=np.uint8) for _ in range(2)]
        for unit in self._layout.units:
            yield from self._unit_pieces(unit, reader, buffers)

    def _unit_pieces(
        self, unit: StoredUnit, reader: PageReader, buffers: Sequence[Bytes]
    ) -> Iterator[tuple[str, int, memoryview]]:
        source, target = unit.torch_dtype, self._dtype or unit.torch_dtype
        size = source.itemsize
        checksums = self._manifest.checksums
        values = _Stream(
            reader, buffers[0], [(0, unit.slots[-1].end * size, self._tensor(unit.parameters))], checksums=checksums
        )
        masters = None
        if target is not source and unit.has_masters:
            parts = [(part.begin * 4, part.end * 4, self._tensor(part.master or "")) for part in unit.slices]
            masters = _Stream(reader, buffers[1], parts, checksums=checksums)
        for slot in unit.slots:
            if slot.name not in self._paged:
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
                yield slot.name, (begin - slot.offset) * target.itemsize, piece.view(torch.uint8).numpy().data

    def _tensor(self, key: str) -> StoredTensor:
        if key not in self._stored:
            raise CommitError(f"commit {self._manifest.number} has no {key}")
        return self._stored[key]


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
    """Bytes of stored tensors that lie one after another, read once, from front to back, a chunk at a time.

    Args:
        buffer: as long as a chunk, this stream's alone while it is used.
        parts: first byte, end, and the tensor that has them from its first byte on.
    """

    def __init__(
        self, reader: PageReader, buffer: Bytes, parts: Sequence[tuple[int, int, StoredTensor]], *, checksums: bool
    ) -> None:
        self._reader = reader
        self._checksums = checksums
        self._buffer = buffer
        self._begin = self._end = 0
        self._chunks = _chunks_of(reader, parts)

    def take(self, begin: int, end: int) -> Bytes:
        """A copy of bytes [begin, end), none of which lies before what was taken last."""
        taken: Bytes = np.empty(end - begin, dtype=np.uint8)
        at = begin
        while at < end:
            while at >= self._end:
                self._next()
            n_bytes = min(end, self._end) - at
            taken[at - begin : at - begin + n_bytes] = self._buffer[at - self._begin : at - self._begin + n_bytes]
            at += n_bytes
        return taken

    def _next(self) -> None:
        try:
            self._begin, self._end, stored, chunk = next(self._chunks)
        except StopIteration:
            raise CommitError("a tensor of the commit is shorter than its parameters") from None
        with self._buffer.data as into:
            wrong = self._reader.read(chunk, into, checksums=self._checksums)
        if wrong:
            raise ChecksumError(
                f"{stored.key}: {wrong[0]}: the disk or another program changed it; export an earlier commit"
            )


def _chunks_of(
    reader: PageReader, parts: Sequence[tuple[int, int, StoredTensor]]
) -> Iterator[tuple[int, int, StoredTensor, Chunk]]:
    """First byte and end of each chunk, its tensor, and the chunk."""
    for begin, end, stored in parts:
        for chunk in reader.chunks(stored):
            start = begin + chunk.begin_bytes
            yield start, min(end, start + chunk.n_bytes), stored, chunk
