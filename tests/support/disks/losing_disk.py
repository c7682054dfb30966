"""A disk that loses what was written before a sync that fails, as Linux does: the next sync succeeds and says nothing
of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


class LosingDisk:
    """Follows what is written to one file; sync number ``failing`` of it fails, and what was written before it is lost.

    Attributes:
        n_syncs: of the file so far.
    """

    def __init__(self, patch: pytest.MonkeyPatch, file: Path, failing: int) -> None:
        self.n_syncs = 0
        self._file = file
        self._failing = failing
        self._durable = bytearray()
        self._written: list[tuple[int, bytes]] = []
        self._pwritev, self._fsync = os.pwritev, os.fsync
        patch.setattr(os, "pwritev", self._write)
        patch.setattr(os, "fsync", self._sync)

    def lose_power(self) -> None:
        """Have the file hold what is durable, and nothing else. To be called once nobody uses it."""
        n_bytes = self._file.stat().st_size
        self._file.write_bytes(bytes(self._durable[:n_bytes]).ljust(n_bytes, b"\0"))

    def _is_it(self, fd: int) -> bool:
        return os.readlink(f"/proc/self/fd/{fd}") == str(self._file)

    def _write(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        moved = self._pwritev(fd, buffers, offset)
        if self._is_it(fd):
            self._written.append((offset, b"".join(bytes(buffer) for buffer in buffers)[:moved]))
        return moved

    def _sync(self, fd: int) -> None:
        if not self._is_it(fd):
            self._fsync(fd)
            return
        written, self._written = self._written, []
        self.n_syncs += 1
        if self.n_syncs - 1 == self._failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        for offset, content in written:
            end = offset + len(content)
            self._durable.extend(bytes(max(0, end - len(self._durable))))
            self._durable[offset:end] = content
