"""Files that belong to a run: opened without following a link, replaced whole and durably, and errors that name them.

Whatever lies in the place of one of them and is no regular file (a link, a FIFO, a device, a folder) is refused and
left as it is; so is a file that has a second name where it would be written in place, as that would change what the
other name leads to. Everything goes through functions of `os`, so that a test can have any call fail.

After a failed fsync the kernel may call the same bytes clean: a second fsync says nothing about them. So nothing here
syncs the same bytes twice; whoever tries again writes again.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from pagemem.errors import DiskFullError, StorageError
from pagemem.units import format_bytes

StrPath = str | os.PathLike[str]

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_MORE_ROOM: Final = "Free some, or name another or one more path in ssd.paths."
_KINDS: Final = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


# ---- errors ----------------------------------------------------------------------------------------------------------


def os_failure(
    error: OSError,
    doing: str,
    path: StrPath,
    offset_bytes: int | None = None,
    n_bytes: int | None = None,
    remedy: str = _MORE_ROOM,
) -> StorageError:
    """What to raise from a failure of the operating system; `DiskFullError` where room ran out.

    Args:
        doing: "reading", "syncing", ...
        offset_bytes, n_bytes: what was to be moved, where that is known.
        remedy: what to do where room ran out.
    """
    where = "" if offset_bytes is None else f" at offset {offset_bytes}"
    what = f"{doing} {path}{where}{'' if n_bytes is None else f', {n_bytes} bytes'}: {error.strerror or error}"
    if error.errno not in _NO_ROOM:
        return StorageError(what)
    wanted = "" if n_bytes is None else f"wanted {n_bytes} bytes ({format_bytes(n_bytes)}), "
    return DiskFullError(f"{what}; {wanted}free are {_free(path)}. {remedy}")


def _free(path: StrPath) -> str:
    for place in (path, os.path.dirname(path)):  # the file itself may not be there
        with suppress(OSError):
            free_bytes = shutil.disk_usage(place).free
            return f"{free_bytes} ({format_bytes(free_bytes)})"
    return "an unknown number"


@contextmanager
def naming(doing: str, path: StrPath) -> Iterator[None]:
    """Have an OSError of the block raised as what `os_failure` makes of it."""
    try:
        yield
    except OSError as error:
        raise os_failure(error, doing, path) from error


# ---- what lies in a place --------------------------------------------------------------------------------------------


def kind_of(path: StrPath) -> str | None:
    """What lies there, in words: "a file", "a symbolic link", ...; None: nothing.

    Raises:
        OSError: the system does not say.
    """
    try:
        return kind_in_words(os.lstat(path))
    except FileNotFoundError:
        return None


def kind_in_words(found: os.stat_result) -> str:
    """As `kind_of`."""
    return next((words for is_one, words in _KINDS if is_one(found.st_mode)), "a file")


def has_folder(path: StrPath) -> bool:
    """Whether there is a folder of ours.

    Raises:
        StorageError: something else is there, a link to a folder included, or the system does not say.
    """
    with naming("looking for", path):
        kind = kind_of(path)
    if kind not in (None, "a folder"):
        raise StorageError(
            f"{path} is {kind}, not a folder of this run. Nothing was changed; remove it, or name another folder"
        )
    return kind is not None


def open_file(path: StrPath, flags: int, *, mode: int = 0o644) -> int:
    """Open a regular file of ours; returns the descriptor. Never waits for the other end of a FIFO.

    Args:
        flags: as `os.open` has them; what keeps links from being followed is added.

    Raises:
        StorageError: something else lies there, or the file is to be written and has a second name. Nothing was
            changed.
        OSError: it cannot be opened.
    """
    kind = kind_of(path)
    if kind not in (None, "a file"):
        raise _not_ours(path, f"is {kind}, not a file")
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _not_ours(path, f"is {kind_in_words(found)}, not a file")
        if found.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR):
            raise _not_ours(
                path,
                f"has {found.st_nlink} names (hard links), and what is written to it would change under all of them: "
                "it is not a file",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _not_ours(path: StrPath, what: str) -> StorageError:
    return StorageError(f"{path} {what} of this run. Nothing was changed; remove it, or name another folder")


# ---- whole files -----------------------------------------------------------------------------------------------------


def draft_of(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(path.name + ".new")


def replace_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Have a file with this content, durably: after a crash there is the one before or this one, whole.

    A draft that a crash left is removed first. One engine at a time may do this to a file. Any thread.

    Raises:
        StorageError, DiskFullError: the one before is there, or none where there was none. Where it is the folder that
            could not be synced, the new one is in the place of one before, and it is not known which of the two there
            is after a crash.
    """
    draft = draft_of(path)
    with naming("looking for", path):
        kind = kind_of(path)
    if kind not in (None, "a file"):
        raise _not_ours(path, f"is {kind}, not a file")
    remove_draft(draft)
    try:
        with naming("making", draft):
            fd = open_file(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            position_bytes = 0
            for part in [content] if isinstance(content, bytes) else content:
                write_all(fd, part, draft, position_bytes)
                position_bytes += len(part)
            with naming("syncing", draft):
                os.fsync(fd)
        finally:
            with naming("closing", draft):
                os.close(fd)
        with naming("renaming", draft):
            os.rename(draft, path)
    except BaseException:
        # What failed is what to raise; a draft that stays is removed by whoever writes the next one.
        with suppress(OSError):
            os.unlink(draft)
        raise
    try:
        sync_folder(path.parent)
    except BaseException:
        if kind is None:  # whoever tries again must not find a file that a crash can take back
            with suppress(OSError):
                os.unlink(path)
        raise


def write_all(
    fd: int, content: bytes | memoryview, path: StrPath, offset_bytes: int, *, remedy: str = _MORE_ROOM
) -> None:
    """Write all of ``content`` at an offset, going on after short writes.

    Raises:
        StorageError, DiskFullError: some of it may be there.
    """
    left = memoryview(content).cast("B")
    while left:
        try:
            n_bytes = os.pwrite(fd, left, offset_bytes)
        except OSError as error:
            raise os_failure(error, "writing", path, offset_bytes, len(left), remedy) from error
        if not n_bytes:
            raise StorageError(f"writing {path} at offset {offset_bytes}: none of {len(left)} bytes moved")
        offset_bytes, left = offset_bytes + n_bytes, left[n_bytes:]


def remove_draft(draft: Path) -> None:
    """Remove a draft that a crash left, if there is one.

    Raises:
        StorageError: something else lies there, or it cannot be removed.
    """
    with naming("removing", draft):
        kind = kind_of(draft)
        if kind == "a file":
            os.unlink(draft)
    if kind not in (None, "a file"):
        raise _not_ours(draft, f"is {kind}, not a draft")


def remove_file(path: StrPath) -> None:
    """Remove a file. There may be none. That it is gone is durable once the folder is synced.

    Raises:
        StorageError: it cannot be removed.
    """
    with naming("removing", path), suppress(FileNotFoundError):
        os.unlink(path)


# ---- folders ---------------------------------------------------------------------------------------------------------


def sync_folder(path: StrPath) -> None:
    """Make durable which names the folder has; syncing a file does not say that its name is there after a crash.

    Raises:
        StorageError: it cannot be synced, and no later sync tells whether the present names are durable.
    """
    _sync(path, os.O_DIRECTORY)


def sync_files(folder: Path) -> None:
    """Make what the files of a folder hold durable.

    Raises:
        StorageError: one cannot be synced.
    """
    for path in folder.iterdir():
        _sync(path, os.O_NOFOLLOW)


def _sync(path: StrPath, flags: int) -> None:
    with naming("syncing", path):
        fd = os.open(path, os.O_RDONLY | flags | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_folder(path: Path) -> list[Path]:
    """Have a folder and its parents, durably; returns those that were made, the deepest first.

    Raises:
        StorageError: one cannot be made, or something else is there; those made are removed again.
    """
    missing: list[Path] = []
    at = path
    with naming("looking for", at):
        while kind_of(at) is None and at.parent != at:
            missing.append(at)
            at = at.parent
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            with naming("making", folder):
                try:
                    os.mkdir(folder)
                except FileExistsError:  # somebody else was faster; whether it is a folder is seen below
                    continue
            made.insert(0, folder)
            sync_folder(folder.parent)
        with naming("looking for", path):
            if not stat.S_ISDIR(os.stat(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except BaseException:
        remove_folders(made)
        raise
    return made


def remove_folders(folders: Iterable[Path]) -> None:
    """Remove those that are empty, on the way out of an error: what else there is to say about them does not matter
    then."""
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)
