"""Commits of a run that were made by another number of ranks, or by ranks that shared the model otherwise.

They lie in folders of their own, which this process only reads: a run goes on from one by reading all values of it, see
`offload.commits.stored_values`. They are kept, and removed, like its own ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from offload.commits.commit_state import read_commit
from offload.commits.stored_values import CommitPart
from pagemem.durable.commit_folder import CommitFolder
from pagemem.durable.root_folder import RootFolder, RootRecord, digest_of
from pagemem.errors import CommitError
from pagemem.folders.own_file import kind_of, naming, sync_folder

#: The shape of a single process, whose page files lie in the run's folder itself.
SINGLE: Final = 0
#: No shape: all commits are another one's.
OTHERS: Final = -1


class ForeignCommits:
    """Of one run. Nothing is changed but by `retire`. One thread at a time.

    Args:
        paths: the run's ``ssd.paths``. shape: the own one, `SINGLE` for a single process.

    Attributes:
        names, steps: the name of each, or None, and its step, by number. shapes: of which shape each is.

    Raises:
        CommitError: one cannot be read.
    """

    def __init__(self, paths: Sequence[Path], shape: int) -> None:
        self._paths = [path.absolute() for path in paths]
        self._roots = RootFolder(self._paths[0])
        self._single = CommitFolder(self._paths[0])
        self.names: dict[int, str | None] = {}
        self.shapes: dict[int, int] = {}
        self.steps: dict[int, int] = {}
        for root in map(self._roots.read, self._roots.numbers()):
            if root.shape != shape:
                self.names[root.number], self.shapes[root.number] = root.name, root.shape
                self.steps[root.number] = root.step
        if shape != SINGLE:
            for number in self._single.numbers():
                manifest = read_commit(self._single, number)
                self.names[number], self.shapes[number], self.steps[number] = manifest.name, SINGLE, manifest.step

    def newest(self, name: str | None = None) -> int:
        """The greatest number, or that of those with this name; 0 where there is none."""
        return max((number for number, named in self.names.items() if name in (None, named)), default=0)

    def parts(self, number: int) -> list[CommitPart]:
        """The parts of one, in rank order.

        Raises:
            CommitError: a part is gone, damaged, or not the one that all ranks made.
        """
        if self.shapes[number] == SINGLE:
            return [CommitPart(tuple(self._paths), read_commit(self._single, number))]
        root = self._roots.read(number)
        return [self._part(root, rank) for rank in range(root.n_ranks)]

    def folder_of(self, number: int, rank: int) -> CommitFolder:
        """Where a part of one lies: of this rank, or of the first where there was no such rank."""
        shape = self.shapes[number]
        if shape == SINGLE:
            return self._single
        n_ranks = self._roots.read(number).n_ranks
        return CommitFolder(self._roots.rank_path(shape, rank if rank < n_ranks else 0))

    def _part(self, root: RootRecord, rank: int) -> CommitPart:
        folders = tuple(RootFolder(path).rank_path(root.shape, rank) for path in self._paths)
        folder = CommitFolder(folders[0])
        manifest = read_commit(folder, root.number)
        if digest_of(manifest.encode()) != root.part_digests[rank]:
            raise CommitError(f"{folder.manifest(root.number)} is not the part that rank {rank} made of this commit")
        return CommitPart(folders, manifest)

    def retire(self, numbers: Collection[int], *, removes: bool) -> None:
        """Some are not kept any more, nor the folders of ranks of which none is left.

        Args:
            removes: whether this process removes them: one does.

        Raises:
            StorageError: one may still be there.
        """
        before, leaving = set(self.shapes.values()), {number: self.shapes.pop(number) for number in numbers}
        for number in numbers:
            del self.names[number]
        if not removes:
            return
        for number, shape in leaving.items():
            (self._single if shape == SINGLE else self._roots).remove(number)
        for shape in before - set(self.shapes.values()) - {SINGLE}:
            for path in self._paths:
                self._remove_shape(RootFolder(path).rank_path(shape, 0).parent)

    def _remove_shape(self, folder: Path) -> None:
        if kind_of(folder) == "a folder":
            with naming("removing", folder):
                shutil.rmtree(folder)
            sync_folder(folder.parent)
