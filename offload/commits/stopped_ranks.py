"""A stopped run of several ranks, opened for reading; see `offload.commits.stopped_run`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from offload.commits.foreign_commits import OTHERS, ForeignCommits
from offload.commits.stopped_run import choose_commit
from offload.commits.stored_values import CommitPart
from pagemem.durable.manifest import Manifest
from pagemem.errors import CommitError
from pagemem.folders.folder_lock import FolderLock


class StoppedRanks:
    """The commits of a run, of all shapes that its ranks have had; a context manager that holds the run's lock.

    Args:
        run: the folder with the roots of the commits, the first one of the run's ``ssd.paths``.
        paths: others of its folders, in order.

    Attributes:
        whole: the first part of each commit that can be used, by number.
        damaged: what is wrong with the others, by number.

    Raises:
        RunDirectoryError: the folder is in use. CommitError: a root cannot be read. Nothing was changed.
    """

    def __init__(self, run: Path, paths: Sequence[Path] = ()) -> None:
        self.path = run.absolute()
        self._locks = ExitStack()
        with ExitStack() as undo:
            undo.callback(self._locks.close)
            self._locks.callback(FolderLock(self.path, keep=True).close)
            self._commits = ForeignCommits([self.path, *paths], OTHERS)
            self.whole: dict[int, Manifest] = {}
            self.damaged: dict[int, CommitError] = {}
            self._parts: dict[int, list[CommitPart]] = {}
            for number in self._commits.names:
                try:
                    self._parts[number] = self._commits.parts(number)
                    self.whole[number] = self._parts[number][0].manifest
                except CommitError as error:
                    self.damaged[number] = error
            undo.pop_all()

    def choose(self, wanted: str | None) -> Manifest:
        """See `choose_commit`."""
        return choose_commit(self.path, self.whole, self.damaged, wanted)

    def parts(self, manifest: Manifest) -> list[CommitPart]:
        """The parts of a commit, in rank order."""
        return self._parts[manifest.number]

    def close(self) -> None:
        """Let engines use the folder again. Idempotent."""
        self._locks.close()

    def __enter__(self) -> StoppedRanks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
