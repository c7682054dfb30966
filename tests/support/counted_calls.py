"""Every call that a run makes of the disk, counted, of which one goes wrong: pages and manifests alike."""

from __future__ import annotations

import builtins
import enum
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pagemem.io import RawBackend, choose_backend
from pagemem.page_file import PageFiles
from pagemem.units import BLOCK_BYTES, MiB


class Fault(enum.Enum):
    """What goes wrong with one call."""

    EIO = errno.EIO
    ENOSPC = errno.ENOSPC
    SHORT = "only half of the bytes move"
    NOTHING = "no byte moves"
    FLIPPED = "a bit of what moves is another one"


#: What can go wrong with which call.
FAULTS: dict[str, tuple[Fault, ...]] = {
    "read": (Fault.EIO, Fault.SHORT, Fault.NOTHING, Fault.FLIPPED),
    "write": (Fault.EIO, Fault.ENOSPC, Fault.SHORT, Fault.NOTHING, Fault.FLIPPED),
    "allocate": (Fault.ENOSPC,),
    "sync": (Fault.EIO,),
    "open": (Fault.EIO, Fault.ENOSPC),
    "fsync": (Fault.EIO, Fault.ENOSPC),
    "rename": (Fault.EIO,),
    "unlink": (Fault.EIO,),
    "manifest": (Fault.ENOSPC, Fault.FLIPPED),
}


class CountedCalls:
    """The system under the next engines; call number ``at`` (from 0) goes wrong by ``fault``.

    Attributes:
        kinds: of all calls so far, keys of `FAULTS`.
        folder: of a call outside the page files, only those inside it count.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, at: int | None = None, fault: Fault | None = None) -> None:
        self.kinds: list[str] = []
        self._folder = folder
        self._at = at
        self._fault = fault
        self._lock = threading.Lock()
        self._inner: RawBackend | None = None
        self._real = {name: getattr(os, name) for name in ("fsync", "rename", "unlink")}
        patch.setattr("pagemem.page_file.choose_backend", self._choose)
        patch.setattr("pagemem.commit_folder.open", self._open, raising=False)
        for name in self._real:
            patch.setattr(os, name, self._wrapped(name))
        small_slabs(patch)

    @property
    def struck(self) -> bool:
        """Whether the call that goes wrong has been made."""
        return self._at is not None and self._at < len(self.kinds)

    def _count(self, kind: str) -> Fault | None:
        """Count a call; raises when it fails, or returns what else goes wrong with it."""
        with self._lock:
            self.kinds.append(kind)
            fault = self._fault if len(self.kinds) - 1 == self._at else None
        if fault in (Fault.EIO, Fault.ENOSPC):
            raise OSError(fault.value, os.strerror(fault.value))
        return fault

    # ---- page files ------------------------------------------------------------------------------------------------

    def _choose(self, folders: Sequence[Path], **options: Any) -> CountedCalls:
        self._inner = choose_backend(folders, **options)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def allocate(self, file: int, old_bytes: int, new_bytes: int) -> None:
        """Counted."""
        self._count("allocate")
        self._inner.allocate(file, old_bytes, new_bytes)  # type: ignore[union-attr]

    def sync(self, file: int) -> None:
        """Counted."""
        self._count("sync")
        self._inner.sync(file)  # type: ignore[union-attr]

    def read_into(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """Counted."""
        fault = self._count("read")
        moved = self._move(self._inner.read_into, fault, file, offset_bytes, buffers)  # type: ignore[union-attr]
        if fault is Fault.FLIPPED:
            buffers[0][moved // 2 % buffers[0].nbytes] ^= 4
        return moved

    def write_from(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """Counted. Of a flipped bit the caller sees nothing: it is on the disk alone."""
        fault = self._count("write")
        moved = self._move(self._inner.write_from, fault, file, offset_bytes, buffers)  # type: ignore[union-attr]
        if fault is Fault.FLIPPED:
            fd = os.open(self._folder / "pages" / "pages.bin", os.O_RDWR)
            place = offset_bytes + moved // 2
            os.pwrite(fd, bytes([os.pread(fd, 1, place)[0] ^ 4]), place)
            self._real["fsync"](fd)
            os.close(fd)
        return moved

    def _move(self, call: Callable[..., int], fault: Fault | None, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        if fault is Fault.NOTHING:
            return 0
        if fault is Fault.SHORT:
            half = buffers[0].nbytes // 2 // BLOCK_BYTES * BLOCK_BYTES
            with buffers[0][: half or BLOCK_BYTES] as part:
                return call(file, offset_bytes, [part])
        return call(file, offset_bytes, buffers)

    # ---- manifests -------------------------------------------------------------------------------------------------

    def _wrapped(self, name: str) -> Callable[..., Any]:
        def call(what: Any, *args: Any, **more: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
            if str(path).startswith(str(self._folder / "pages" / "commits")):
                self._count(name)
            return self._real[name](what, *args, **more)

        return call

    def _open(self, path: Path, mode: str) -> Any:
        self._count("open")
        file = builtins.open(path, mode, buffering=0)
        write = file.write

        def counted(content: bytes) -> int:
            if self._count("manifest") is Fault.FLIPPED:
                content = content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :]
            return write(content)

        return _Wrapped(file, counted)


class _Wrapped:
    """A file with another ``write``."""

    def __init__(self, file: Any, write: Callable[[bytes], int]) -> None:
        self._file = file
        self.write = write
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self) -> _Wrapped:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def small_slabs(patch: pytest.MonkeyPatch) -> None:
    """Let page files grow by less, which takes less time."""
    patch.setitem(PageFiles.__init__.__kwdefaults__, "slab_bytes", MiB // 2)  # type: ignore[index]
