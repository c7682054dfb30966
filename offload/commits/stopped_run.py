"""A stopped run, opened for reading: its folders, locked against engines, and its commits.

Nothing in the folders is changed, but for a lock file where there was none, which is removed at the end. So no engine
can reuse frames of a commit that is being read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from offload.commits.commit_state import read_commit
from offload.commits.stored_values import CommitPart
from offload.config_file import ConfigError, read_config_file
from pagemem.durable.commit_folder import CommitFolder
from pagemem.durable.manifest import Manifest
from pagemem.errors import CommitError, RunDirectoryError
from pagemem.files.page_file import PAGE_FILE_NAME
from pagemem.folders.folder_lock import FolderLock
from pagemem.folders.run_directory import IDENTITY_NAME, read_run_id


class StoppedRun:
    """The folders and commits of a run; a context manager that holds the folders' locks.

    Args:
        run: the folder with the commits, the first one of the run's ``ssd.paths``.
        paths: others of its folders. Where they are not named, those in the run's configuration are tried.

    Attributes:
        folders, page_files: in the order of their striping.
        commits: reads what lies beside the manifests.
        whole: the commits that can be used, by number.
        damaged: what is wrong with the others, by number.

    Raises:
        RunDirectoryError: a folder is no run directory, is in use, or cannot be found. Nothing was changed.
    """

    def __init__(self, run: Path, paths: Sequence[Path] = ()) -> None:
        self.path = run.absolute()
        known = {_run_id(path): path.absolute() for path in [*reversed(paths), run]}
        self._locks = ExitStack()
        with ExitStack() as undo:
            undo.callback(self._locks.close)
            self._locks.callback(FolderLock(self.path, keep=True).close)
            self.commits = CommitFolder(self.path)
            self._read_commits()
            self.folders = self._find_folders(known)
            self.page_files = [folder / PAGE_FILE_NAME for folder in self.folders]
            for folder in self.folders[1:]:
                self._locks.callback(FolderLock(folder, keep=True).close)
            undo.pop_all()

    def choose(self, wanted: str | None) -> Manifest:
        """See `choose_commit`."""
        return choose_commit(self.path, self.whole, self.damaged, wanted)

    def parts(self, manifest: Manifest) -> list[CommitPart]:
        """The parts of a commit: it is one."""
        return [CommitPart(tuple(self.folders), manifest)]

    def close(self) -> None:
        """Let engines use the folders again. Idempotent."""
        self._locks.close()

    def __enter__(self) -> StoppedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- finding things ----------------------------------------------------------------------------------------

    def _read_commits(self) -> None:
        self.whole: dict[int, Manifest] = {}
        self.damaged: dict[int, CommitError] = {}
        numbers = self.commits.numbers()
        if not numbers:
            raise RunDirectoryError(
                f"{self.path} holds no commits: either none was made, or they are in another folder of the run; "
                "name the first one of its ssd.paths"
            )
        for number in numbers:
            try:
                self.whole[number] = read_commit(self.commits, number)
            except CommitError as error:
                self.damaged[number] = error
        own = _run_id(self.path)
        expected = self.whole[max(self.whole)].run_ids if self.whole else ()
        for number, manifest in list(self.whole.items()):
            if manifest.run_ids != expected or manifest.run_ids[:1] != (own,):
                del self.whole[number]
                self.damaged[number] = CommitError(
                    f"commit {number} in {self.commits.path} names other page files than those of this run"
                )

    def _find_folders(self, known: dict[str, Path]) -> list[Path]:
        if not self.whole:
            return [self.path]
        newest = self.whole[max(self.whole)]
        tried = [Path(path) for path in newest.state["config"]["ssd"]["paths"]]
        for path in tried:
            try:
                known.setdefault(_run_id(path), path.absolute())
            except RunDirectoryError:
                continue  # moved since, or of another machine; what is missing is said below
        missing = [place for place, run_id in enumerate(newest.run_ids) if run_id not in known]
        if missing:
            which = ", ".join(f"number {place + 1} (run id {newest.run_ids[place]})" for place in missing)
            looked = ", ".join(str(path) for path in [*known.values(), *tried])
            raise RunDirectoryError(
                f"the pages of {self.path} are in {len(newest.run_ids)} folders, not found: {which}; looked at "
                f"{looked}. Name the others with --path"
            )
        return [known[run_id] for run_id in newest.run_ids]


def choose_commit(
    path: Path, whole: Mapping[int, Manifest], damaged: Mapping[int, CommitError], wanted: str | None
) -> Manifest:
    """The newest whole commit, or the one of this number or, where no commit has it for its number, name.

    Args:
        path: of the run, for messages.

    Raises:
        CommitError: there is none, or it is damaged.
    """
    if wanted is None:
        if not whole:
            wrong = "; ".join(str(error) for _, error in sorted(damaged.items()))
            raise CommitError(f"{path} has no whole commit{': ' + wrong if wrong else ''}")
        return whole[max(whole)]
    number = int(wanted) if wanted.isascii() and wanted.isdigit() else 0
    if number in damaged:
        raise damaged[number]
    named = [manifest.number for manifest in whole.values() if manifest.name == wanted]
    if number not in whole and not named:
        there = ", ".join(str(n) + (f" ({m.name})" if m.name else "") for n, m in sorted(whole.items())) or "none"
        raise CommitError(f"{path} has no commit {wanted!r}; whole ones are: {there}")
    return whole[number if number in whole else max(named)]


def _run_id(path: Path) -> str:
    """The identity of a run directory.

    Raises:
        RunDirectoryError: it has none that this version can read.
    """
    try:
        return read_run_id(path)
    except FileNotFoundError:
        what = f"it has no {IDENTITY_NAME}" if path.is_dir() else "there is no such folder"
        below = sorted(folder.parent for folder in path.glob(f"*/{IDENTITY_NAME}")) if path.is_dir() else []
        hint = f"; {', '.join(map(str, below[:3]))} below it {'is one' if len(below) == 1 else 'are'}" if below else ""
        raise RunDirectoryError(f"{path} is not a run directory: {what}{hint or _pages_elsewhere(path)}") from None


def _pages_elsewhere(path: Path) -> str:
    """For errors: where the pages of a run are, whose ``output.run`` a folder is; empty where it is none."""
    try:
        pages = read_config_file(path / "config.json")["ssd"]["paths"]
    except (ConfigError, LookupError, TypeError):
        return ""
    return f"; its config.json is of a run whose ssd.paths are {pages}: name the first of them"
