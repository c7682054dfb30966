"""One folder per SSD path that belongs to this engine: its identity file and its lock.

Whatever is not provably ours is never changed: a folder is taken only when it is absent, empty, or carries our
identity, and only while we hold the lock in it. What lies in the folder besides these two files is
`pagemem.page_file`'s business.
"""

from __future__ import annotations

import fcntl
import json
import os
import reprlib
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter

from pagemem.errors import RunDirectoryError
from pagemem.raw_file import sync_folder
from pagemem.small_file import Line, Record, checked, parse_json, read_small

IDENTITY_NAME: Final = "pagemem.json"
LOCK_NAME: Final = "pagemem.lock"
FORMAT: Final = "pagemem-run-directory-1"

_DRAFT_NAME: Final = "pagemem.json.new"
#: What a crash between taking the lock and publishing the identity can leave in a folder that was empty before.
_UNFINISHED_CLAIM: Final = frozenset({LOCK_NAME, _DRAFT_NAME})


class _Identity(Record):
    format: Line
    run_id: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
    created: Line


_IDENTITY: Final = TypeAdapter(_Identity)
_MAX_IDENTITY_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class FolderUse:
    """What a folder is to this engine, found without changing anything.

    Attributes:
        kind: ``"absent"``, ``"empty"`` (also a claim that was cut short), ``"run"`` or ``"foreign"``.
        detail: the run id of a run, why a foreign folder is none of ours; else empty.
        holder: the process that has the lock (``"unknown"`` where it left no number), or None: nobody has.
    """

    kind: Literal["absent", "empty", "run", "foreign"]
    detail: str = ""
    holder: str | None = None


def folder_use(path: str | os.PathLike[str]) -> FolderUse:
    """Whether a folder is a run, and whether an engine has it. Nothing is made, removed or written. Any thread.

    A lock file that a killed engine left is tried with a shared lock, for some microseconds.

    Raises:
        OSError: the folder or its lock file cannot be read.
    """
    folder = Path(path)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return FolderUse("absent")
    except NotADirectoryError:
        return FolderUse("foreign", f"{folder} is not a folder; name one that is empty or new")
    holder = _holder(folder)
    if IDENTITY_NAME not in names and not set(names) - _UNFINISHED_CLAIM:
        return FolderUse("empty", holder=holder)
    try:
        _refuse_foreign(folder)
        return FolderUse("run", read_run_id(folder), holder)
    except RunDirectoryError as error:
        return FolderUse("foreign", str(error), holder)


def _holder(folder: Path) -> str | None:
    """The process that has a folder's lock, as its file says; None where nobody has."""
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return holder_of(fd)
    else:
        fcntl.flock(fd, fcntl.LOCK_UN)
        return None
    finally:
        os.close(fd)


def holder_of(fd: int) -> str:
    """The process that an open lock file names, or ``"unknown"``."""
    try:
        said = os.pread(fd, 32, 0).strip()
    except OSError:
        return "unknown"  # it is no file
    return said.decode() if said.isdigit() else "unknown"


class RunDirectory:
    """A locked folder of ours; from construction to `close` no other engine can use it.

    The lock is an flock: it excludes other processes and other engines of this process alike, and the operating system
    frees it when the holder dies. Methods may be called on any one thread.

    Args:
        path: the folder; it and its parents are created when absent.

    Raises:
        RunDirectoryError: the folder holds something else, is in use, or cannot be written. Nothing in it was changed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            created = _create_folder(self.path)
            _refuse_foreign(self.path)
            self._lock_fd: int | None = _lock(self.path)
        except OSError as error:
            raise _unusable(self.path, error) from error
        try:
            known = (self.path / IDENTITY_NAME).exists()
            self.run_id = read_run_id(self.path) if known else _write_identity(self.path)
        except BaseException as error:
            self._undo_claim(created)
            if isinstance(error, OSError):
                raise _unusable(self.path, error) from error
            raise

    def file(self, name: str) -> Path:
        """Where a file of this name lies in the folder; nothing is created."""
        return self.path / name

    def close(self) -> None:
        """Remove and release the lock; the folder stays ours and can be opened again. Idempotent."""
        fd, self._lock_fd = self._lock_fd, None
        if fd is None:
            return
        # Removed while it is still locked: whoever opens the name afterwards makes a new file, see `_lock`.
        (self.path / LOCK_NAME).unlink(missing_ok=True)
        fcntl.flock(fd, fcntl.LOCK_UN)  # explicitly, as forked children may share the description
        os.close(fd)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _undo_claim(self, created: bool) -> None:
        (self.path / _DRAFT_NAME).unlink(missing_ok=True)
        self.close()
        if created:
            self.path.rmdir()


def _create_folder(path: Path) -> bool:
    """Make the folder if absent; returns whether it was."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _refuse_foreign(path: Path) -> None:
    """Raise unless the folder is empty, ours, or left by a claim of ours that was cut short."""
    names = set(os.listdir(path))
    if IDENTITY_NAME in names:
        read_run_id(path)
    elif names - _UNFINISHED_CLAIM:
        raise RunDirectoryError(
            f"{path} is not empty and is not a run directory of this engine (it has no {IDENTITY_NAME}; it holds "
            f"{sorted(names)[0]!r}, {len(names)} entries in all). Nothing was changed; name an empty or new folder."
        )


def read_run_id(path: Path) -> str:
    """The run id in a folder's identity file. Nothing is changed.

    Raises:
        RunDirectoryError: the file is not an identity that this version can read.
        FileNotFoundError: there is none.
    """
    name = path / IDENTITY_NAME
    try:
        found = parse_json(read_small(name, _MAX_IDENTITY_BYTES))
        if isinstance(found, dict) and isinstance(found.get("format"), str) and found["format"] != FORMAT:
            raise RunDirectoryError(
                f"{path} was made by another version: format {reprlib.repr(found['format'])}, this one reads {FORMAT!r}. "
                f"Nothing was changed; name an empty or new folder."
            )
        return checked(_IDENTITY, found).run_id
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RunDirectoryError(
            f"{name} is not an identity file of this engine ({why}). Nothing was changed; name an empty or new folder."
        ) from error


def _write_identity(path: Path) -> str:
    """Publish a new identity in one step, durably; returns its run id. The lock must be held."""
    run_id = str(uuid.uuid4())
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    draft = path / _DRAFT_NAME
    with open(draft, "w") as file:
        json.dump({"format": FORMAT, "run_id": run_id, "created": created}, file)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path / IDENTITY_NAME)
    sync_folder(path)
    return run_id


def _lock(path: Path) -> int:
    """Take the folder's lock and return the descriptor that holds it.

    Raises:
        RunDirectoryError: another engine has it; the message names its process.
    """
    name = path / LOCK_NAME
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(fd, name):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
        except BlockingIOError as error:
            holder = holder_of(fd)
            os.close(fd)
            raise RunDirectoryError(f"{path} is in use by process {holder}{_way_out(holder)}") from error
        except BaseException:
            os.close(fd)
            raise
        # The holder closed between our open and our flock and took the name away: what we locked is no longer the lock.
        os.close(fd)


def _way_out(holder: str) -> str:
    """What to do about a folder in use; the rest of a sentence."""
    if holder == str(os.getpid()):
        return (
            ", this one: an engine made earlier, as by a notebook cell run twice, still has it. Nothing was changed; call that engine's close() "
            "(optimizer.engine.close() after offload.prepare), or name another folder."
        )
    return ". Nothing was changed; wait for that run to end, close its engine, or name another folder."


def _is_still(fd: int, name: Path) -> bool:
    """Whether the name still leads to the open file."""
    try:
        there = os.stat(name)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _unusable(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path} cannot be used as a run directory: {error.strerror or error}. "
        f"Name a folder on a local disk that this user can create and write."
    )


class FolderLock:
    """The lock of a folder that is no run directory; from construction to `close` nobody else can have it.

    Raises:
        RunDirectoryError: somebody has it; the message names the process. OSError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = _lock(path)

    def close(self) -> None:
        """Remove and release the lock. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            (self._path / LOCK_NAME).unlink(missing_ok=True)
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)
