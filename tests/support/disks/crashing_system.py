"""A system that stops between two of its calls, and what of the calls before is on the disk afterwards.

A killed process leaves everything that its calls have done. A machine that loses its power leaves less: of a file that
was not synced only a part, of the changes of a folder that was not synced none. Both are made here, in a real folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Crash(BaseException):
    """The process is gone; nothing that it does from here on has an effect."""


class CrashingSystem:
    """Counts the calls that change a folder, and stops before call number ``at``, or after half of it if that writes.

    Args:
        folder: the one that is looked at.
        at: counted from 0; None: never.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, at: int | None = None) -> None:
        self.calls: list[str] = []
        self._folder = folder
        self._at = at
        self._crashed = False
        self._unsynced_files: dict[Path, int] = {}
        self._undo: list[Callable[[], object]] = []
        self._new_folder = False
        self._real = {name: getattr(os, name) for name in ("fsync", "rename", "unlink", "mkdir", "open", "pwrite")}
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))

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
            self._real["unlink"](path, **more)
            return
        before = Path(path).read_bytes()
        self._real["unlink"](path, **more)
        self._undo.append(lambda: Path(path).write_bytes(before))

    def _mkdir(self, path: Any, *args: Any, **more: Any) -> None:
        self._call("mkdir")
        self._real["mkdir"](path, *args, **more)
        self._new_folder = True

    def _open(self, path: Any, flags: int, *args: Any, **more: Any) -> int:
        writes = flags & os.O_CREAT and Path(path).is_relative_to(self._folder)
        if writes:
            self._call("open")
        fd = self._real["open"](path, flags, *args, **more)
        if writes:
            self._unsynced_files[Path(path)] = 0
        return int(fd)

    def _pwrite(self, fd: int, content: Any, offset: int) -> int:
        """Half of it at most, so that the system can stop between two calls; whoever writes goes on with the rest."""
        self._call("write")
        part = content[: (len(content) + 1) // 2] if len(content) > 100 else content
        return int(self._real["pwrite"](fd, part, offset))
