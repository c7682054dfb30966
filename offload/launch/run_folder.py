"""`output.run`: the folder that a launched run leaves its configuration, metrics and picture in. Locked while a run
uses it.

Nothing in it is changed before `RunFolder.begin`, by when everything that can be wrong has been found. Results of
another run that lie there are set aside under a number, never written over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from pydantic import TypeAdapter

from offload.config import Config
from offload.reporting.metrics_file import FORMATS
from pagemem.errors import RunDirectoryError, StorageError
from pagemem.files.page_file import PAGE_FILE_NAME
from pagemem.folders.folder_lock import LOCK_NAME, FolderLock
from pagemem.folders.own_file import draft_of, kind_of, make_folder, naming, remove_file, remove_folders, replace_file
from pagemem.folders.run_directory import IDENTITY_NAME, folder_use, read_run_id
from pagemem.folders.small_file import Count, Line, Record, checked, parse_json, read_small
from pagemem.units import KiB

CURVE: Final = "loss_curve.png"
CONFIG: Final = "config.json"
DATA: Final = "data"
_RESULTS: Final = (*(log.file_name for log in FORMATS.values()), CURVE, CONFIG)
_IDENTITY: Final = "offload-run.json"
_FORMAT: Final = "offload run 1"
#: What a crash can leave of the first use of a folder that was empty before.
_UNFINISHED_CLAIM: Final = frozenset({LOCK_NAME, draft_of(Path(_IDENTITY)).name})


class _Identity(Record):
    """What tells that a folder is a run's.

    Attributes:
        pages: identity of the page files that its results were made with, once there are any.
        validated_step: the last step of the run, once the validation after it is made.
    """

    format: Literal["offload run 1"]
    pages: Line | None = None
    validated_step: Count | None = None


class RunFolder:
    """The folder of ``output.run``, locked from construction to `close`.

    Attributes:
        begun: whether a run has begun in it, see `begin`.

    Args:
        path: new, empty or of an earlier run; it and its parents are created when absent.

    Raises:
        RunDirectoryError: it holds something else, is in use, or cannot be made; nothing in it was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun = False
        self._claimed = False
        made: list[Path] = []
        try:
            made = make_folder(path)
            names = set(os.listdir(path)) - _UNFINISHED_CLAIM
            if names and _IDENTITY not in names:
                raise RunDirectoryError(
                    f"output.run: {path} holds files that are not of a run; name a new or empty folder"
                )
            self._identity = _read_identity(path / _IDENTITY) if names else _Identity(format=_FORMAT)
            self._lock = FolderLock(path)
        except (OSError, StorageError) as error:
            remove_folders(made)
            raise RunDirectoryError(
                f"output.run: {path} cannot be used: {error.strerror if isinstance(error, OSError) else error}"
            ) from error
        self._made = made

    def claim(self) -> Path:
        """Before data are made: have the folder known as a run's; returns the folder for the data's cache.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        with naming("looking for", self.path / _IDENTITY):
            there = kind_of(self.path / _IDENTITY) is not None
        if not there:
            self._write_identity(_Identity(format=_FORMAT))
            self._claimed = True
        return self.path / DATA

    def begin(self, config: Config, pages_id: str, *, resumes: bool) -> str | None:
        """From here on the run's own: the configuration is written, and results of another run are set aside.

        Args:
            pages_id: identity of the run's page files.
            resumes: the run resumes from a commit in them, so results that were made with them are its own.

        Returns:
            What was set aside, in one line, or None.

        Raises:
            RunDirectoryError: something cannot be written.
        """
        set_aside = None if resumes and self._identity.pages in (None, pages_id) else self._set_aside()
        self._write_identity(_Identity(format=_FORMAT, pages=pages_id))
        self._write(CONFIG, config.dumped())
        self.begun, self._claimed, self._made = True, False, []
        return set_aside

    def note_validation(self, step: int) -> None:
        """The validation after step ``step``, the last one, is made and reported."""
        self._write_identity(self._identity.model_copy(update={"validated_step": step}))

    def lacks_validation(self, pages: Path, step: int) -> bool:
        """Whether the run of the page files in ``pages`` made step ``step`` here, and no validation after it."""
        return self._identity.pages == read_run_id(pages) and self._identity.validated_step != step

    def _set_aside(self) -> str | None:
        there = [name for name in _RESULTS if os.path.lexists(self.path / name)]
        if set(there) <= {CONFIG, *self._without_steps(there)}:
            return None
        number = 1
        while any(os.path.lexists(self.path / _numbered(name, number)) for name in _RESULTS):
            number += 1
        try:
            for name in there:
                (self.path / name).rename(self.path / _numbered(name, number))
        except OSError as error:
            raise RunDirectoryError(f"output.run: {self.path} cannot be used: {error.strerror}") from error
        return (
            f"results of another run in {self.path} are kept as {', '.join(_numbered(name, number) for name in there)}"
        )

    def _without_steps(self, names: Sequence[str]) -> list[str]:
        """Metrics files of these that have no step in them: of a run that ended in its first one."""
        empty_bytes = {log.file_name: len(log.header) for log in FORMATS.values()}
        return [name for name in names if os.lstat(self.path / name).st_size == empty_bytes.get(name)]

    def _write_identity(self, identity: _Identity) -> None:
        self._write(_IDENTITY, identity.model_dump_json(exclude_none=True) + "\n")
        self._identity = identity

    def _write(self, name: str, text: str) -> None:
        """A file, whole or not at all."""
        try:
            replace_file(self.path / name, text.encode())
        except StorageError as error:
            raise RunDirectoryError(f"output.run: {error}") from error

    def close(self) -> None:
        """Give the folder back. A folder that no run began in is as it was. Idempotent."""
        if not self._lock.held:
            return  # closed before, or in a forked child
        claimed, self._claimed = self._claimed, False
        try:
            with naming("listing", self.path):
                names = set(os.listdir(self.path)) if claimed else set()
            if claimed and names <= {_IDENTITY, LOCK_NAME}:
                remove_file(self.path / _IDENTITY)
        finally:
            self._lock.close()
        remove_folders(self._made)
        self._made = []

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_identity(path: Path) -> _Identity:
    """Raises RunDirectoryError where the file cannot be read, or is not an identity of a run."""
    try:
        return checked(TypeAdapter(_Identity), parse_json(read_small(path, 64 * KiB)))
    except OSError as error:
        raise RunDirectoryError(f"output.run: {path} cannot be used: {error.strerror}. Nothing was changed") from error
    except ValueError as error:
        raise RunDirectoryError(
            f"output.run: {path} is not the identity of a run of this version: {error}. Nothing was changed; name "
            "another folder"
        ) from error


def check_free(paths: Sequence[str]) -> None:
    """Check that folders for page files can be used, before anything is made; the engine's lock on them decides.

    Raises:
        RunDirectoryError: one is in use, something else's, cannot be read, or is absent and cannot be made.
    """
    for path in paths:
        try:
            use = folder_use(path)
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be used as a run directory: {error.strerror}") from error
        if use.kind == "foreign":
            raise RunDirectoryError(use.detail)
        if use.kind == "absent":
            try:
                remove_folders(make_folder(Path(path)))
            except StorageError as error:
                raise RunDirectoryError(f"ssd.paths: {path} cannot be made: {error}") from error
        if use.holder is not None:
            ours = use.holder == str(os.getpid())
            way_out = ", this one: call the close() of the engine that has it" if ours else "; wait for that run to end"
            raise RunDirectoryError(
                f"{path} is in use by process {use.holder}{way_out}, or name another folder. Nothing was changed."
            )


@contextmanager
def removed_unless_begun(folder: RunFolder, paths: Sequence[str]) -> Iterator[None]:
    """Remove the folders for page files that the block has made, if it fails before its run has begun in ``folder``."""
    new = [path for path in map(Path, paths) if _is_missing(path)]
    above = [parent for path in new for parent in path.absolute().parents if _is_missing(parent)]
    try:
        yield
    finally:
        if not folder.begun:
            for path in new:
                if path.is_dir() and set(os.listdir(path)) <= {IDENTITY_NAME, PAGE_FILE_NAME}:
                    shutil.rmtree(path)
            remove_folders(above)


def _is_missing(path: Path) -> bool:
    with naming("looking for", path):
        return kind_of(path) is None


def _numbered(name: str, number: int) -> str:
    path = Path(name)
    return f"{path.stem}-{number}{path.suffix}"
