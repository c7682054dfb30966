"""The safetensors file beside a commit: checked before anything in it is used, and read piece by piece.

Nothing is mapped: bytes that cannot be read are an error, not a signal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from offload.sources.safetensors_file import FileTensor, fill, header_of
from pagemem.durable.commit_folder import CommitFolder
from pagemem.errors import CommitError
from pagemem.units import MiB

_PIECE_BYTES: Final = 4 * MiB


class Sidecar:
    """The small tensors of a commit; a context manager that has their file open.

    Args:
        state: of the commit's manifest; it may say that there is no file.

    Attributes:
        tensors: what is in it, by name.

    Raises:
        CommitError: (one line, all methods) it is not what was written, is no safetensors file of these dtypes, or
            cannot be read; nothing is left open.
    """

    def __init__(self, folder: CommitFolder, number: int, state: Mapping[str, Any]) -> None:
        self.tensors: Mapping[str, FileTensor] = {}
        self._path = folder.sidecar(number)
        self._fd: int | None = None
        entry = state.get("sidecar")
        if entry is None:
            return
        self._fd = folder.open_sidecar(number, entry)
        try:
            self.tensors = header_of(self._fd, self._path).tensors
        except BaseException as error:
            self.close()
            if isinstance(error, (OSError, ValueError)):
                raise self._failure(error) from error
            raise

    def pieces(self, name: str) -> Iterator[tuple[int, memoryview]]:
        """Offset and bytes of each piece of a tensor, in order."""
        n_bytes = self.tensors[name].n_bytes
        for offset_bytes in range(0, n_bytes, _PIECE_BYTES):
            piece = memoryview(bytearray(min(_PIECE_BYTES, n_bytes - offset_bytes)))
            self._fill(name, offset_bytes, piece)
            yield offset_bytes, piece

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole."""
        stored = self.tensors[name]
        content = torch.empty(stored.n_bytes, dtype=torch.uint8)
        self._fill(name, 0, content.numpy().data)
        return content.view(stored.dtype).reshape(stored.shape)

    def _fill(self, name: str, offset_bytes: int, target: memoryview) -> None:
        assert self._fd is not None
        try:
            fill(self._fd, self.tensors[name].offset_bytes + offset_bytes, target)
        except (OSError, ValueError) as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError | ValueError) -> CommitError:
        if isinstance(error, OSError):
            return CommitError(f"{self._path} cannot be read: {error.strerror or error}")
        return CommitError(f"{self._path} is damaged: {error}")

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


def read_sidecar(folder: CommitFolder, number: int, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """All small tensors of a commit by name; arguments and errors as of `Sidecar`."""
    with Sidecar(folder, number, state) as sidecar:
        return {name: sidecar.tensor(name) for name in sidecar.tensors}
