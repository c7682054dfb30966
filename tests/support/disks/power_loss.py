"""A disk that forgets what was not synced: a run's calls are recorded, and what could be left after each of them is put
together.

After a loss of power a file has what was synced, and of every later write all, nothing or some sectors; a folder has
the names it had when it was synced, and of its later changes the first few. A new file's name is not durable before its
folder was synced.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SECTOR_BYTES = 512
WRITERS = ("write", "pwrite", "pwritev")


@dataclass(eq=False)
class Change:
    """One call that changed something.

    Attributes:
        node: the file, or the folder whose names changed. at: place in the order of all calls.
        done: whether the call has returned; what syncs covers it from then on.
        synced_at: when it became durable, or None.
    """

    node: int
    at: int
    apply: tuple[Any, ...]
    done: bool = False
    synced_at: int | None = None


@dataclass
class DeviceEvent:
    """Something that the run was told is durable."""

    at: int
    what: str


@dataclass
class Recording:
    """All changes below a folder, in order; nodes are numbers, 0 is the folder itself."""

    root: Path
    changes: list[Change] = field(default_factory=list)
    marks: list[DeviceEvent] = field(default_factory=list)
    clock: int = 0

    def __post_init__(self) -> None:
        self._nodes = {str(self.root): 0}
        self._pending: dict[int, list[Change]] = {}
        self._lock = threading.RLock()
        self._next = 0
        for path in sorted(self.root.rglob("*")):  # what was there before is durable
            self._made(str(path), "folder" if path.is_dir() else "file", synced=True)
            if path.is_file() and (content := path.read_bytes()):
                self._add(self._nodes[str(path)], ("write", 0, content)).synced_at = 0
        for change in self.changes:
            change.at = self.clock = 0
        self._pending.clear()

    # ---- recording -------------------------------------------------------------------------------------------------

    def mark(self, what: str) -> None:
        """From here on this must be found after a loss of power."""
        with self._lock:
            self.clock += 1
            self.marks.append(DeviceEvent(self.clock, what))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls of the block."""
        with pytest.MonkeyPatch.context() as patch:
            for name in (
                "open",
                "fsync",
                "fdatasync",
                "rename",
                "replace",
                "unlink",
                "remove",
                "mkdir",
                "rmdir",
                "ftruncate",
                "truncate",
                "posix_fallocate",
                *WRITERS,
            ):
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            yield

    def _wrapped(self, name: str, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if name in ("fsync", "fdatasync"):
                return self._sync(args[0], really)
            if name in WRITERS:
                return self._write(name, really, *args)
            with self._lock:
                before = self._look(name, args, more)
                result = really(*args, **more)
                self._note(name, args, more, before)
                return result

        return call

    def _path(self, path: Any, dir_fd: int | None = None) -> str:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        return os.path.join(base, os.fspath(path))

    def _look(self, name: str, args: Any, more: Any) -> Any:
        """What must be known before the call."""
        return os.path.lexists(self._path(args[0], more.get("dir_fd"))) if name == "open" else None

    def _note(self, name: str, args: Any, more: Any, before: Any) -> None:
        path = self._path(args[0], more.get("dir_fd")) if name not in ("rename", "replace") else self._path(args[0])
        if not path.startswith(str(self.root) + "/"):
            return
        if name == "open":
            if not before and args[1] & os.O_CREAT:
                self._made(path, "file")
            elif before and args[1] & os.O_TRUNC:
                self._add(self._nodes[path], ("size", 0), done=True)
        elif name == "mkdir":
            self._made(path, "folder")
        elif name in ("unlink", "remove", "rmdir"):
            self._gone(path)
            self._add(self._parent(path), ("gone", os.path.basename(path)), done=True)
        elif name in ("rename", "replace"):
            self._renamed(path, self._path(args[1]))
        elif name in ("ftruncate", "truncate"):
            self._add(self._nodes[path], ("size", args[1]), done=True)
        elif name == "posix_fallocate":
            self._add(self._nodes[path], ("grow", args[1] + args[2]), done=True)

    def _made(self, path: str, kind: str, *, synced: bool = False) -> None:
        self._next += 1
        self._nodes[path] = self._next
        change = self._add(self._parent(path), ("made", os.path.basename(path), self._next, kind), done=True)
        if synced:
            change.synced_at = 0

    def _renamed(self, old: str, new: str) -> None:
        assert os.path.dirname(old) == os.path.dirname(new), "a rename from one folder to another is not modelled"
        self._gone(new)
        node = self._nodes[old]
        for path in [path for path in self._nodes if path == old or path.startswith(old + "/")]:
            self._nodes[new + path[len(old) :]] = self._nodes.pop(path)
        self._add(self._parent(new), ("renamed", os.path.basename(old), os.path.basename(new), node), done=True)

    def _gone(self, path: str) -> None:
        for inner in [inner for inner in self._nodes if inner == path or inner.startswith(path + "/")]:
            del self._nodes[inner]

    def _parent(self, path: str) -> int:
        return self._nodes[os.path.dirname(path)]

    def _add(self, node: int, apply: tuple[Any, ...], *, done: bool = False) -> Change:
        with self._lock:
            self.clock += 1
            change = Change(node, self.clock, apply, done)
            self.changes.append(change)
            self._pending.setdefault(node, []).append(change)
            return change

    def _write(self, name: str, really: Callable[..., Any], fd: int, data: Any, *offset: int) -> int:
        node = self._nodes.get(self._path(fd)) if isinstance(fd, int) else None
        if node is None:
            return int(really(fd, data, *offset))
        assert offset, f"{name} without an offset is not modelled"
        content = b"".join(bytes(part) for part in data) if name == "pwritev" else bytes(data)
        change = self._add(node, ("write", offset[0], content))
        written = int(really(fd, data, *offset))
        change.apply = ("write", offset[0], content[:written])
        change.done = True
        return written

    def _sync(self, fd: int, really: Callable[..., Any]) -> None:
        with self._lock:
            node = self._nodes.get(self._path(fd))
            covered = [] if node is None else [change for change in self._pending.get(node, []) if change.done]
        really(fd)
        with self._lock:
            self.clock += 1
            for change in covered:
                if change.synced_at is None:  # another thread may have synced the same
                    change.synced_at = self.clock
                    self._pending[change.node].remove(change)

    # ---- what is left ------------------------------------------------------------------------------------------------

    def lose_power(self, at: int, draw: random.Random, to: Path) -> None:
        """Make in ``to``, which is new, what a loss of power right after moment ``at`` could leave."""
        keeps = draw.choice(["nothing", "everything", "something"])
        files: dict[int, list[tuple[Any, ...]]] = {}
        names: dict[int, list[tuple[Any, ...]]] = {}
        late: dict[int, int] = {}
        for change in self.changes:
            if change.at > at:
                break
            durable = change.synced_at is not None and change.synced_at <= at
            kind = change.apply[0]
            if kind in ("write", "size", "grow"):
                kept = (
                    change.apply
                    if durable or keeps == "everything"
                    else None
                    if keeps == "nothing"
                    else _some(change.apply, draw)
                )
                if kept is not None:
                    files.setdefault(change.node, []).append(kept)
                continue
            if not durable:  # changes of a folder reach the disk in their order
                left = late.setdefault(change.node, {"nothing": 0, "everything": 1 << 30}.get(keeps, draw.randrange(6)))
                late[change.node] = left - 1
                if left <= 0:
                    continue
            names.setdefault(change.node, []).append(change.apply)
        to.mkdir()
        self._make(0, to, names, files)

    def _make(
        self, node: int, to: Path, names: dict[int, list[tuple[Any, ...]]], files: dict[int, list[tuple[Any, ...]]]
    ) -> None:
        there: dict[str, tuple[int, str]] = {}
        for what, name, *more in names.get(node, []):
            if what == "made":
                there[name] = (more[0], more[1])
            elif what == "gone":
                there.pop(name, None)
            elif name in there:
                there[more[0]] = there.pop(name)
        for name, (inner, kind) in there.items():
            if kind == "folder":
                (to / name).mkdir()
                self._make(inner, to / name, names, files)
                continue
            with open(to / name, "wb", buffering=0) as file:
                for what, first, *rest in files.get(inner, []):
                    size = os.fstat(file.fileno()).st_size
                    if what == "write":
                        os.pwrite(file.fileno(), rest[0], first)
                    elif what == "size" or first > size:
                        file.truncate(first)


def _some(apply: tuple[Any, ...], draw: random.Random) -> tuple[Any, ...] | None:
    """Of a change that was not synced all, nothing, or the first sectors."""
    chance = draw.random()
    if chance < 0.4:
        return None
    if chance < 0.7 or apply[0] != "write":
        return apply
    what, offset, content = apply
    return (what, offset, content[: draw.randrange(len(content) // SECTOR_BYTES + 1) * SECTOR_BYTES])
