"""The lock of a folder: one process at a time, and one engine in it.

It is an flock on a file in the folder: it excludes other processes and other holders in this process alike, and the
kernel lets go of it when the holder dies, however that happens. So a file that a killed process left is no lock. A
forked child has none of its parent's locks, and can let go of none.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from pagemem.errors import RunDirectoryError, StorageError
from pagemem.folders.descriptor import close_fds
from pagemem.folders.own_file import kind_of, naming, open_file, os_failure, remove_file, write_all
from pagemem.process.forks import disown_in_children

LOCK_NAME: Final = "pagemem.lock"
_PID_BYTES: Final = 32


class FolderLock:
    """Holds a folder's lock from construction to `close`. Methods may be called on any one thread.

    Args:
        folder: there is such a folder.
        name: of the lock's file.
        keep: leave a file that was there as it is, also on a read-only file system, where nobody else can take the
            lock.
        whose: names the folder in messages.

    Raises:
        RunDirectoryError: somebody has it; the message names the process. Nothing was changed.
        StorageError: something else lies in its place, or the system failed. Likewise.
    """

    def __init__(self, folder: Path, name: str = LOCK_NAME, *, keep: bool = False, whose: str = "") -> None:
        self._name = folder / name
        self._remove = True
        self._read_only = False
        self._fds = self._locked(folder, keep, whose)  # the lock's file, or nothing
        disown_in_children(self)

    def _locked(self, folder: Path, keep: bool, whose: str) -> list[int]:
        while True:
            fds = [self._open(folder, keep)]
            taken = False
            try:
                taken = self._take(fds[0], f"{whose}{folder}")
                if taken:
                    return fds
            finally:
                # The holder let go between our open and our flock and took the name away: what we locked is no lock.
                if not taken:
                    close_fds(fds)

    def _open(self, folder: Path, keep: bool) -> int:
        try:
            with naming("opening", self._name):
                self._remove = not keep or kind_of(self._name) is None
                return open_file(self._name, os.O_RDWR | os.O_CREAT if self._remove else os.O_RDONLY)
        except StorageError as error:
            code = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
            if keep and code == errno.EROFS:
                self._remove, self._read_only = False, True
                with naming("opening", folder):
                    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if keep and code == errno.ENOENT:
                return self._open(folder, keep)  # its holder has just removed it
            raise

    def _take(self, fd: int, folder: str) -> bool:
        """Lock an open file; returns whether its name still leads to it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _pid_in(fd)
            raise RunDirectoryError(f"{folder} is in use by process {holder}{_way_out(holder)}") from error
        except OSError as error:
            raise os_failure(error, "locking", self._name) from error
        if not self._read_only and not self._is_ours(fd):
            return False
        if self._remove:
            with naming("writing", self._name):
                os.ftruncate(fd, 0)
            write_all(fd, f"{os.getpid()}\n".encode(), self._name, 0)
        return True

    def _is_ours(self, fd: int) -> bool:
        with naming("looking for", self._name):
            try:
                return os.path.samestat(os.fstat(fd), os.lstat(self._name))
            except FileNotFoundError:
                return False

    @property
    def held(self) -> bool:
        """Whether it is this process's: not after `close`, and not in a forked child."""
        return bool(self._fds)

    def close(self) -> None:
        """Remove the file and let go of the lock. Idempotent; can be called again wherever it was interrupted.

        Raises:
            StorageError: the file cannot be removed, which is all that is left: the lock is free.
        """
        if self._fds:
            try:
                # Removed while it is still locked: whoever opens the name afterwards makes a new file, see `_take`.
                if self._remove and self._is_ours(self._fds[0]):
                    remove_file(self._name)
            except Exception:  # not an interrupt, after which all of this is done again
                self._let_go()
                raise
            self._let_go()

    def _let_go(self) -> None:
        try:
            with naming("unlocking", self._name):
                # Explicitly, as a child forked past Python may share the description.
                fcntl.flock(self._fds[0], fcntl.LOCK_UN)
        finally:
            close_fds(self._fds)

    def disown(self) -> None:
        """In a forked child: the lock is the parent's."""
        close_fds(self._fds)


def holder_of(folder: Path, name: str = LOCK_NAME) -> str | None:
    """The process that has a folder's lock (``"unknown"`` where it left no number); None where nobody has. Nothing is
    changed.

    A file that a killed process left is tried with a shared lock, for some microseconds.

    Raises:
        OSError: the file cannot be read. StorageError: it is no file.
    """
    try:
        fd = open_file(folder / name, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid_in(fd)
    else:
        fcntl.flock(fd, fcntl.LOCK_UN)
        return None
    finally:
        os.close(fd)


def _pid_in(fd: int) -> str:
    """The process that an open lock file names; what is in the file is anybody's."""
    try:
        said = os.pread(fd, _PID_BYTES, 0).strip()
    except OSError:
        return "unknown"
    return said.decode() if said.isdigit() else "unknown"


def _way_out(holder: str) -> str:
    """What to do about a folder in use; the rest of a sentence."""
    if holder == str(os.getpid()):
        return (
            ", this one: an engine made earlier, as by a notebook cell run twice, still has it. Nothing was changed; "
            "call that engine's close() (optimizer.engine.close() after offload.prepare; of a model that was loaded "
            "and has no engine yet, offload.initialize(model, config).close()), or name another folder."
        )
    return ". Nothing was changed; wait for that run to end, close its engine, or name another folder."
