"""A system that stops between two of its calls, and what of the calls before is on the disk afterwards.

A killed process leaves everything that its calls have done. A machine that loses its power leaves less: of a file that
was not synced only a part, of the changes of a folder that was not synced none. Both are made here, in a real folder.
"""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest


class Crash(BaseException):
    """The process is gone; nothing that it does from here on has an effect."""


class CrashingSystem:
    """Counts the calls that change a folder, and stops before call number ``at``, or after half of it if that writes.

    Args:
        folder: the one that is looked at.
        module: where ``open`` is called.
        at: counted from 0; None: never.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, at: int | None = None) -> None:
        self.calls: list[str] = []
        self._folder = folder
        self._at = at
        self._crashed = False
        self._unsynced_files: dict[Path, int] = {}
        self._undo: list[Callable[[], object]] = []
        self._new_folder = False
        self._real = {name: getattr(os, name) for name in ("fsync", "rename", "unlink", "mkdir")}
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(f"{module}.open", self._open, raising=False)

    def lose_power(self) -> None:
        """Take back what was not synced. To be called once the process is gone."""
        for path, synced_bytes in self._unsynced_files.items():
            if path.exists():
                os.truncate(path, (synced_bytes + path.stat().st_size) // 2)
        for undo in reversed(self._undo):
            undo()
        if self._new_folder:
            shutil.rmtree(self._folder)

    def _call(self, name: str) -> None:
        if self._crashed or self._at == len(self.calls):
            self._crashed = True
            raise Crash(name)
        self.calls.append(name)

    def _fsync(self, fd: int) -> None:
        self._call("fsync")
        self._real["fsync"](fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path == self._folder:
            self._undo.clear()
        elif path == self._folder.parent:
            self._new_folder = False
        self._unsynced_files.pop(path, None)

    def _rename(self, source: Any, target: Any, **more: Any) -> None:
        self._call("rename")
        before = Path(target).read_bytes() if Path(target).exists() else None
        self._real["rename"](source, target, **more)
        if Path(source) in self._unsynced_files:
            self._unsynced_files[Path(target)] = self._unsynced_files.pop(Path(source))

        def undo() -> None:
            self._real["rename"](target, source)
            if before is not None:
                Path(target).write_bytes(before)

        self._undo.append(undo)

    def _unlink(self, path: Any, **more: Any) -> None:
        self._call("unlink")
        if not Path(path).exists():
            return self._real["unlink"](path, **more)
        before = Path(path).read_bytes()
        self._real["unlink"](path, **more)
        self._undo.append(lambda: Path(path).write_bytes(before))

    def _mkdir(self, path: Any, *args: Any, **more: Any) -> None:
        self._call("mkdir")
        self._real["mkdir"](path, *args, **more)
        self._new_folder = True

    def _open(self, path: Path, mode: str) -> IO[bytes]:
        self._call("open")
        self._unsynced_files[path] = 0
        return _TornFile(builtins.open(path, mode, buffering=0), self)  # type: ignore[return-value]


class _TornFile:
    """A file of which the last write may be cut in half."""

    def __init__(self, file: Any, system: CrashingSystem) -> None:
        self._file = file
        self._system = system

    def write(self, content: bytes) -> int:
        """In two calls, so that the system can stop between them."""
        half = len(content) // 2
        for part in (content[:half], content[half:]):
            self._system._call("write")
            self._file.write(part)
        return len(content)

    def flush(self) -> None:
        """Nothing is buffered."""

    def fileno(self) -> int:
        """The real one."""
        return int(self._file.fileno())

    def __enter__(self) -> _TornFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
