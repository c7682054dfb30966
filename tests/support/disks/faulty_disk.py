"""A real disk that fails when told to, and counts what the system moved, under any engine made in a test."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pagemem.files.backend import RawBackend, choose_backend


class FaultyDisk:
    """A `RawBackend` around the probed one. ``errors`` holds what the system answers to a kind of call from now on.

    Attributes:
        errors: errno by kind of call: "open", "allocate", "read", "write".
        gates: events that calls of a kind wait for.
        moved_bytes: bytes the system moved, by kind.
    """

    def __init__(self) -> None:
        self.errors: dict[str, int] = {}
        self.gates: dict[str, threading.Event] = {}
        self.moved_bytes = {"read": 0, "write": 0}
        self._inner: RawBackend | None = None
        self._lock = threading.Lock()

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
        """Have the next engine's page files lie on this disk."""
        disk = cls()

        def chosen(folders: Sequence[Path], **options: Any) -> FaultyDisk:
            disk._inner = choose_backend(folders, **options)
            return disk

        monkeypatch.setattr("pagemem.files.page_file.choose_backend", chosen)
        return disk

    @property
    def inner(self) -> RawBackend:
        """The real one."""
        assert self._inner is not None, "no engine was made on this disk"
        return self._inner

    @property
    def name(self) -> str:
        """The real one's name."""
        return self.inner.name

    def _fail(self, kind: str) -> None:
        if kind in self.errors:
            raise OSError(self.errors[kind], os.strerror(self.errors[kind]))

    def open(self, path: str) -> int:
        """As the real one, unless told to fail."""
        self._fail("open")
        return self.inner.open(path)

    def allocate(self, file: int, old_bytes: int, new_bytes: int) -> None:
        """As the real one, unless told to fail."""
        self._fail("allocate")
        self.inner.allocate(file, old_bytes, new_bytes)

    def shrink(self, file: int, n_bytes: int) -> None:
        """As the real one."""
        self.inner.shrink(file, n_bytes)

    def read_into(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """As the real one, counted, unless told to fail."""
        return self._move("read", self.inner.read_into, file, offset_bytes, buffers)

    def write_from(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """As the real one, counted, unless told to fail."""
        return self._move("write", self.inner.write_from, file, offset_bytes, buffers)

    def _move(
        self, kind: str, call: Callable[..., int], file: int, offset_bytes: int, buffers: Sequence[memoryview]
    ) -> int:
        self._fail(kind)
        if kind in self.gates:
            assert self.gates[kind].wait(30), "a gate of the test was never opened"
        n_bytes = call(file, offset_bytes, buffers)
        with self._lock:
            self.moved_bytes[kind] += n_bytes
        return n_bytes

    def sync(self, file: int) -> None:
        """As the real one."""
        self.inner.sync(file)

    def stat(self, file: int) -> os.stat_result:
        """As the real one."""
        return self.inner.stat(file)

    def close(self) -> None:
        """As the real one."""
        self.inner.close()
