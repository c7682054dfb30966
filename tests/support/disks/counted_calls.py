"""Every call that a run makes of the system in its folders, counted, of which one goes wrong: pages, manifests, locks,
all alike."""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pagemem.files.page_file import PageFiles
from pagemem.units import BLOCK_BYTES, MiB


class Fault(enum.Enum):
    """What goes wrong with one call."""

    EIO = errno.EIO
    ENOSPC = errno.ENOSPC
    SHORT = "only half of the bytes move"
    NOTHING = "no byte moves"
    FLIPPED = "a bit of what moves is another one"


_MOVING = (Fault.EIO, Fault.SHORT, Fault.NOTHING, Fault.FLIPPED)
#: What can go wrong with which call.
FAULTS: dict[str, tuple[Fault, ...]] = {
    "preadv": _MOVING,
    "pwritev": (*_MOVING, Fault.ENOSPC),
    "pwrite": (*_MOVING, Fault.ENOSPC),
    "read": (Fault.EIO, Fault.SHORT),
    "pread": (Fault.EIO, Fault.SHORT),
    "posix_fallocate": (Fault.EIO, Fault.ENOSPC),
    "ftruncate": (Fault.EIO,),
    "fsync": (Fault.EIO, Fault.ENOSPC),
    "open": (Fault.EIO, Fault.ENOSPC),
    "rename": (Fault.EIO, Fault.ENOSPC),
    "unlink": (Fault.EIO,),
    "mkdir": (Fault.EIO, Fault.ENOSPC),
    "rmdir": (Fault.EIO,),
    "listdir": (Fault.EIO,),
    "lstat": (Fault.EIO,),
    "stat": (Fault.EIO,),
    "fstat": (Fault.EIO,),
    "statvfs": (Fault.EIO,),
    "flock": (Fault.EIO,),
}


class Call:
    """One call: its kind, a key of `FAULTS`, and what it is of, below the folder."""

    def __init__(self, kind: str, path: str) -> None:
        self.kind, self.path = kind, path

    def can(self, fault: Fault) -> bool:
        """Whether that can go wrong with it. Bits change in what a checksum covers."""
        covered = self.path.endswith("pages.bin") or "/commits/" in self.path
        return fault in FAULTS[self.kind] and (covered or fault is not Fault.FLIPPED)

    def __str__(self) -> str:
        return f"{self.kind} of {self.path}"


class CountedCalls:
    """The system under what runs from now on; of the calls that ``fault`` can befall, number ``at`` (from 0) goes
    wrong.

    Args:
        folder: only calls inside it count.
        kinds: only these calls count; None: all.

    Attributes:
        calls: so far.
        struck: the one that went wrong.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        folder: Path,
        at: int | None = None,
        fault: Fault | None = None,
        kinds: Sequence[str] | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self.struck: Call | None = None
        self._folder = str(folder)
        self._at = at
        self._fault = fault
        self._n_fitting = 0
        self._lock = threading.Lock()
        self._readlink = os.readlink
        kinds = list(FAULTS) if kinds is None else kinds
        self._real = {kind: getattr(fcntl if kind == "flock" else os, kind) for kind in FAULTS}
        for kind in kinds:
            patch.setattr(fcntl if kind == "flock" else os, kind, self._counted(kind))
        small_slabs(patch)

    def _counted(self, kind: str) -> Callable[..., Any]:
        real = self._real[kind]
        moves = getattr(self, f"_{kind}", None)

        def call(what: Any, *args: Any, **more: Any) -> Any:
            path = self._path(what)
            if path is None:
                return real(what, *args, **more)
            fault = self._count(kind, path)
            return real(what, *args, **more) if fault is None else moves(fault, what, *args)

        return call

    def _path(self, what: Any) -> str | None:
        """What a call is of, if it counts."""
        try:
            path = self._readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
        except (OSError, TypeError):
            return None
        return path if isinstance(path, str) and path.startswith(self._folder) else None

    def _count(self, kind: str, path: str) -> Fault | None:
        """Count a call; raises when it fails, or returns what else goes wrong with it."""
        call, fault = Call(kind, path[len(self._folder) :]), None
        with self._lock:
            self.calls.append(call)
            if self._fault is not None and call.can(self._fault):
                if self._n_fitting == self._at:
                    fault, self.struck = self._fault, call
                self._n_fitting += 1
        if fault in (Fault.EIO, Fault.ENOSPC):
            raise OSError(fault.value, os.strerror(fault.value))
        return fault

    # ---- calls that move bytes ---------------------------------------------------------------------------------------

    def _preadv(self, fault: Fault, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        moved = self._move("preadv", fault, fd, buffers, offset)
        if fault is Fault.FLIPPED:
            buffers[0][moved // 2 % buffers[0].nbytes] ^= 4
        return moved

    def _pwritev(self, fault: Fault, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Of a flipped bit the caller sees nothing: it is on the disk alone."""
        moved = self._move("pwritev", fault, fd, buffers, offset)
        if fault is Fault.FLIPPED:
            other = self._real["open"](self._readlink(f"/proc/self/fd/{fd}"), os.O_RDWR)
            place = offset + moved // 2
            self._real["pwrite"](other, bytes([self._real["pread"](other, 1, place)[0] ^ 4]), place)
            self._real["fsync"](other)
            os.close(other)
        return moved

    def _move(self, kind: str, fault: Fault, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fault is Fault.NOTHING:
            return 0
        if fault is Fault.SHORT:
            half = buffers[0].nbytes // 2 // BLOCK_BYTES * BLOCK_BYTES
            with buffers[0][: half or BLOCK_BYTES] as part:
                return int(self._real[kind](fd, [part], offset))
        return int(self._real[kind](fd, buffers, offset))

    def _pwrite(self, fault: Fault, fd: int, content: Any, offset: int) -> int:
        half = len(content) // 2
        if fault is Fault.NOTHING:
            return 0
        if fault is Fault.SHORT:
            content = bytes(content)[: half or 1]
        else:
            content = bytes(content)
            content = content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :]
        return int(self._real["pwrite"](fd, content, offset))

    def _read(self, fault: Fault, fd: int, n_bytes: int) -> bytes:
        found: bytes = self._real["read"](fd, max(1, n_bytes // 2))
        return found

    def _pread(self, fault: Fault, fd: int, n_bytes: int, offset: int) -> bytes:
        found: bytes = self._real["pread"](fd, max(1, n_bytes // 2), offset)
        return found


def small_slabs(patch: pytest.MonkeyPatch) -> None:
    """Let page files grow by less, which takes less time."""
    patch.setitem(PageFiles.__init__.__kwdefaults__, "slab_bytes", MiB // 2)  # type: ignore[index]
