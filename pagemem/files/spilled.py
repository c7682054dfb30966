"""Tensors whose bytes are in a file without a name: copies of any size that take no RAM of their own.

What `state_dict()` returns may be as large as the model. Its tensors are mapped files beside the page files, whose
pages the system takes back when memory is short, and which are gone with the last view of the tensor, or the process.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from pagemem.errors import DiskFullError, StorageError
from pagemem.units import MiB, format_bytes, round_up

#: Smaller ones are in RAM: a file and a mapping cost more than they are worth.
SMALLEST_BYTES: Final = MiB
#: What is mapped at a time while a tensor is filled.
_CHUNK_BYTES: Final = 8 * MiB


class SpilledTensor:
    """A new tensor on the CPU, to be filled by `put`. Any one thread.

    Args:
        folder: where its file is; one of a run that is locked. None: it is in RAM.

    Attributes:
        tensor: contiguous and writable; an ordinary one, that outlives this object and the folder's lock.

    Raises:
        DiskFullError: there is no room for it. StorageError: no file can be made there.
    """

    def __init__(self, folder: Path | None, shape: torch.Size, dtype: torch.dtype) -> None:
        self._mapped: mmap.mmap | None = None
        n_bytes = shape.numel() * dtype.itemsize
        if folder is None or n_bytes < SMALLEST_BYTES:
            self.tensor = torch.empty(shape, dtype=dtype)
        else:
            self._mapped = _mapped_file(folder, n_bytes)
            self.tensor = torch.frombuffer(self._mapped, dtype=dtype, count=shape.numel()).view(shape)
        self._flat = self.tensor.view(-1)

    def put(self, begin: int, values: Tensor) -> None:
        """Copy flat ``values``, on any device, to the elements from ``begin`` on."""
        numel = _CHUNK_BYTES // values.element_size()
        for first in range(0, values.numel(), numel):
            part = values[first : first + numel]
            at = begin + first
            self._flat[at : at + part.numel()].copy_(part)
            self._give_back(at * values.element_size(), (at + part.numel()) * values.element_size())

    def _give_back(self, begin_bytes: int, end_bytes: int) -> None:
        """The process need not have these bytes mapped; the file has them."""
        if self._mapped is not None:
            first = begin_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_DONTNEED, first, round_up(end_bytes - first, mmap.PAGESIZE))


def spilled_copy(folder: Path | None, values: Tensor) -> Tensor:
    """A copy on the CPU of a contiguous tensor of any device but meta. Raises as `SpilledTensor`."""
    made = SpilledTensor(folder, values.shape, values.dtype)
    made.put(0, values.view(-1))
    return made.tensor


def _mapped_file(folder: Path, n_bytes: int) -> mmap.mmap:
    """A mapping of a new file without a name that has its room on the disk."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)  # a write to a mapping cannot say that there is none
            return mmap.mmap(file.fileno(), n_bytes)
    except OSError as error:
        text = f"{folder} has no room for a copy of {n_bytes} bytes ({format_bytes(n_bytes)}), as state_dict() makes"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{text}; free some, or write the weights with engine.export") from error
        raise StorageError(f"{text}: {error.strerror}") from error
