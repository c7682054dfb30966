"""One folder per SSD path that belongs to this engine: its identity file and its lock.

Whatever is not provably ours is never changed: a folder is taken only when it is absent, empty, or carries our
identity, and only while we hold the lock in it. What lies in the folder besides these two files is
`pagemem.files.page_file`'s business.
"""

from __future__ import annotations

import json
import os
import reprlib
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter

from pagemem.errors import RunDirectoryError, StorageError
from pagemem.folders.folder_lock import LOCK_NAME, FolderLock, holder_of
from pagemem.folders.own_file import draft_of, kind_of, make_folder, remove_draft, remove_folders, replace_file
from pagemem.folders.small_file import Line, Record, checked, parse_json, read_small

IDENTITY_NAME: Final = "pagemem.json"
FORMAT: Final = "pagemem-run-directory-1"

#: What a crash between taking the lock and publishing the identity can leave in a folder that was empty before.
_UNFINISHED_CLAIM: Final = frozenset({LOCK_NAME, f"{IDENTITY_NAME}.new"})


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
    try:
        holder = holder_of(folder)
        _refuse_foreign(folder, names)
        return (
            FolderUse("run", read_run_id(folder), holder)
            if IDENTITY_NAME in names
            else FolderUse("empty", holder=holder)
        )
    except (RunDirectoryError, StorageError) as error:
        return FolderUse("foreign", str(error))


class RunDirectory:
    """A locked folder of ours; from construction to `close` no other engine can use it, see `FolderLock`.

    Methods may be called on any one thread.

    Args:
        path: the folder; it and its parents are created when absent.

    Raises:
        RunDirectoryError: the folder holds something else, is in use, or cannot be written. Nothing in it was changed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            made = make_folder(self.path)
            try:
                _refuse_foreign(self.path, os.listdir(self.path))
                self._lock = FolderLock(self.path)
                try:
                    self.run_id = self._identity()
                except BaseException:
                    self.close()
                    raise
            except BaseException:
                remove_folders(made)
                raise
        except (OSError, StorageError) as error:
            what = str(error) if isinstance(error, StorageError) else error.strerror or str(error)
            raise RunDirectoryError(
                f"{self.path} cannot be used as a run directory: {what}. Name a folder on a local disk that this user "
                "can create and write."
            ) from error

    def _identity(self) -> str:
        """The folder's run id; a new one where it has none."""
        path, run_id = self.path / IDENTITY_NAME, str(uuid.uuid4())
        if kind_of(path) is not None:
            return read_run_id(self.path)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            replace_file(path, json.dumps({"format": FORMAT, "run_id": run_id, "created": created}).encode())
        except BaseException:
            remove_draft(draft_of(path))
            raise
        return run_id

    def close(self) -> None:
        """Remove and release the lock; the folder stays ours and can be opened again. Idempotent.

        Raises:
            StorageError: the lock's file cannot be removed; the lock is released all the same, and the file is none.
        """
        self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_foreign(path: Path, names: Collection[str]) -> None:
    """Raise unless the folder is empty, ours, or left by a claim of ours that was cut short."""
    if IDENTITY_NAME in names:
        read_run_id(path)
        return
    others = set(names) - _UNFINISHED_CLAIM
    if others:
        raise RunDirectoryError(
            f"{path} is not empty and is not a run directory of this engine (it has no {IDENTITY_NAME}; it holds "
            f"{sorted(others)[0]!r}, {len(names)} entries in all). Nothing was changed; name an empty or new folder."
        )
    for name in sorted(names):
        if (kind := kind_of(path / name)) not in (None, "a file"):
            raise RunDirectoryError(
                f"{path} is not empty: its {name!r} is {kind}, which no engine left there. Nothing was changed; name "
                "an empty or new folder."
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
                f"{path} was made by another version: format {reprlib.repr(found['format'])}, this one reads "
                f"{FORMAT!r}. Nothing was changed; name an empty or new folder."
            )
        return checked(_IDENTITY, found).run_id
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RunDirectoryError(
            f"{name} is not an identity file of this engine ({why}). Nothing was changed; name an empty or new folder."
        ) from error
