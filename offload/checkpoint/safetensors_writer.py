"""Weights as Hugging Face lays them out in a folder: safetensors files of limited size and an index. Written piece by
piece.

Names, dtypes and shapes are known beforehand, so each file's header is written first and every byte of a tensor has its
place: tensors may come in any order and in pieces, and no file is ever whole in memory. (A file is 8 bytes of header
length, the header in JSON padded with spaces, and the tensors' bytes without gaps.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from safetensors import safe_open

from offload.sources.safetensors_file import DTYPES
from pagemem.errors import StorageError
from pagemem.folders.own_file import open_file, os_failure, write_all
from pagemem.units import round_up

#: What safetensors calls the dtypes.
DTYPE_NAMES: Final = {dtype: kind for kind, dtype in DTYPES.items()}
_ALIGN_BYTES: Final = 8
#: What to do where an export finds no room.
REMEDY: Final = "Nothing is left of the export; free some, or name another folder."


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its header, and at which byte each tensor begins."""

    file_name: str
    weights: tuple[Weight, ...]
    header: bytes
    starts: dict[str, int]

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(weight.n_bytes for weight in self.weights)


def plan_shards(weights: Sequence[Weight], max_bytes: int, tied: Mapping[str, str]) -> list[Shard]:
    """Divide tensors, in order, among files of at most ``max_bytes`` of them; a larger tensor has a file of its own.

    Args:
        tied: further names of tensors, which are written once: each with the name that is written. They are noted in
            the header's metadata, as `safetensors.torch.save_model` does.
    """
    groups: list[list[Weight]] = [[]]
    n_bytes = 0
    for weight in weights:
        if groups[-1] and n_bytes + weight.n_bytes > max_bytes:
            groups.append([])
            n_bytes = 0
        groups[-1].append(weight)
        n_bytes += weight.n_bytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0], tied)]
    return [
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, tied)
        for number, group in enumerate(groups, 1)
    ]


def _shard(file_name: str, weights: Sequence[Weight], tied: Mapping[str, str]) -> Shard:
    # The widest first, so that each tensor begins at a multiple of its element's size.
    ordered = tuple(sorted(weights, key=lambda weight: -weight.dtype.itemsize))
    here = {weight.name for weight in ordered}
    entries: dict[str, Any] = {
        "__metadata__": {"format": "pt", **{name: kept for name, kept in tied.items() if kept in here}}
    }
    offsets: dict[str, int] = {}
    end = 0
    for weight in ordered:
        offsets[weight.name], end = end, end + weight.n_bytes
        entries[weight.name] = {
            "dtype": DTYPE_NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offsets[weight.name], end],
        }
    body = json.dumps(entries, separators=(",", ":")).encode()
    body = body.ljust(round_up(len(body), _ALIGN_BYTES))
    header = len(body).to_bytes(8, "little") + body
    return Shard(file_name, ordered, header, {name: len(header) + offset for name, offset in offsets.items()})


def index_of(shards: Sequence[Shard], metadata: Mapping[str, Any]) -> bytes:
    """The index file: which tensor is in which shard."""
    total_bytes = sum(weight.n_bytes for shard in shards for weight in shard.weights)
    weight_map = {weight.name: shard.file_name for shard in shards for weight in shard.weights}
    index = {"metadata": {"total_size": total_bytes, **metadata}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


class ShardWriter:
    """Writes shards into a folder that is this writer's alone; a context manager.

    Raises:
        DiskFullError, StorageError: (all methods) a file cannot be written; the folder is to be thrown away.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder = folder
        self._shards = shards
        self._places = {name: (shard, start) for shard in shards for name, start in shard.starts.items()}
        self._open: tuple[str, int] | None = None
        try:
            for shard in shards:
                self._write(shard.file_name, 0, shard.header, create=True)
        except BaseException:
            self._let_go(sync=False)
            raise

    def write(self, name: str, offset_bytes: int, data: bytes | memoryview) -> None:
        """Write a part of a tensor, ``offset_bytes`` from its start."""
        shard, start = self._places[name]
        self._write(shard.file_name, start + offset_bytes, data)

    def write_file(self, file_name: str, content: bytes) -> None:
        """Write a whole other file."""
        self._write(file_name, 0, content, create=True)
        self._let_go()

    def _write(self, file_name: str, position_bytes: int, data: bytes | memoryview, *, create: bool = False) -> None:
        write_all(
            self._descriptor(file_name, create=create), data, self._folder / file_name, position_bytes, remedy=REMEDY
        )

    def _descriptor(self, file_name: str, *, create: bool) -> int:
        if self._open is None or self._open[0] != file_name:
            self._let_go()
            path = self._folder / file_name
            try:
                self._open = (file_name, open_file(path, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if create else 0)))
            except OSError as error:
                raise write_failure(error, "opening", path) from error
        return self._open[1]

    def _let_go(self, *, sync: bool = True) -> None:
        """Close the file that is open. It is synced by the descriptor that wrote it: another one may not hear of what
        failed."""
        if self._open is None:
            return
        (file_name, fd), self._open = self._open, None
        try:
            try:
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise write_failure(error, "syncing", self._folder / file_name) from error

    def finish(self) -> None:
        """Have every file durable, and look whether it reads back with the names, dtypes and shapes that were meant."""
        self._let_go()
        for shard in self._shards:
            check_readable(self._folder / shard.file_name, shard)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go(sync=error is None)


def check_readable(path: Path, shard: Shard) -> None:
    """Have the safetensors library open a shard that was written.

    Raises:
        StorageError: it cannot, or finds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {
                name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118 - it has no iterator
            }
    except Exception as error:  # the library raises its own class, which is no OSError
        raise StorageError(f"{path} cannot be read back: {error}") from error
    if found != {weight.name: (DTYPE_NAMES[weight.dtype], weight.shape) for weight in shard.weights}:
        raise StorageError(f"{path} reads back with other tensors than were written")


def write_failure(error: OSError, doing: str, path: Path) -> StorageError:
    """What to raise where a file of an export cannot be written."""
    return os_failure(error, doing, path, remedy=REMEDY)
