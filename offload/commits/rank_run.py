"""The folders of a run of several ranks, and which of its commits count.

    <ssd.paths[0]>/ranks/commit-00000007.json     the root of a commit, see `pagemem.durable.root_folder`
    <ssd.paths[i]>/ranks/shape-1/rank-0/...       the folder of each rank, like that of a single process

A *shape* is how ranks share the model: their number, the mesh and the degrees. A run that goes on in another one gets
folders of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from offload.config import Config
from pagemem.durable.root_folder import RootFolder, RootRecord
from pagemem.errors import CommitError
from pagemem.folders.run_directory import RunDirectory
from pagemem.ranks.collectives import Collectives

#: Roots that ranks tell each other of: the newest.
_MOST_ROOTS: Final = 64


@dataclass(slots=True)
class RankRun:
    """What all ranks know of their run.

    Attributes:
        folder: of the roots. shape: number of the own one's folders. sharing: what it is, as JSON text.
        numbers: of the commits of that shape that count, ascending. last_number: the greatest of any shape.
        locked: rank 0: the run's own folders.
    """

    folder: RootFolder
    collectives: Collectives
    shape: int
    sharing: str
    numbers: list[int]
    last_number: int
    locked: list[RunDirectory] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.collectives.rank


def sharing_of(config: Config, collectives: Collectives) -> str:
    """How ranks share a model, as JSON text; equal for two runs whose folders fit each other."""
    parallel = config.parallel
    found = {
        "ranks": collectives.n_ranks, "shards": collectives.n_shards, "degree": parallel.degree,
        "degree_of": list(parallel.degree_of.items()),
    }  # fmt: skip
    return json.dumps(found, sort_keys=True)


def open_rank_run(config: Config, collectives: Collectives, undo: ExitStack) -> tuple[RankRun, list[RunDirectory]]:
    """Open this rank's folders; on all ranks. Rank 0 locks the run's own folders as well.

    Args:
        undo: closes what was opened.

    Raises:
        RunDirectoryError: a folder is foreign, locked or not writable; it was not changed.
        CommitError: a root cannot be read. RankError: another rank failed.
    """
    paths = [Path(path) for path in config.ssd.paths]
    run = RankRun(RootFolder(paths[0].absolute()), collectives, 0, sharing_of(config, collectives), [], 0)
    found: list[float] = []
    if collectives.rank == 0:
        for path in paths:
            run.locked.append(RunDirectory(path))
            undo.callback(run.locked[-1].close)
        found = _shape_and_numbers(run)
    # All ranks send as many: what rank 0 says counts.
    told = [int(value) for value in collectives.agree([*found, *[0.0] * (_MOST_ROOTS + 3 - len(found))])[0]]
    run.shape, run.last_number, n_own = told[:3]
    run.numbers = told[3 : 3 + n_own]
    directories = []
    for path in paths:
        directory = RunDirectory(RootFolder(path.absolute()).rank_path(run.shape, collectives.rank))
        undo.callback(directory.close)
        directories.append(directory)
    return run, directories


def _shape_and_numbers(run: RankRun) -> list[float]:
    """Number of the own shape, the last commit's, how many there are of the shape, and their numbers."""
    roots = [_read(run.folder, number) for number in run.folder.numbers()]
    shapes = {root.shape for root in roots}
    same = [root for root in roots if root.sharing == run.sharing]
    newest = roots[-1] if roots else None
    if newest is None or newest.sharing == run.sharing:
        shape = newest.shape if newest is not None else 1
    else:
        shape = max(shapes) + 1
    own = [root.number for root in same if root.shape == shape][-_MOST_ROOTS:]
    return [shape, max((root.number for root in roots), default=0), len(own), *own]


def _read(folder: RootFolder, number: int) -> RootRecord:
    try:
        return folder.read(number)
    except CommitError as error:
        raise type(error)(f"{error}. Nothing was changed; move it away to go on without that commit") from error


def check_parts(run: RankRun, whole: Sequence[int]) -> list[int]:
    """Of the commits that count, those of which every rank's part can be used; on all ranks.

    Args:
        whole: those of which this rank's can.
    """
    said = run.collectives.agree([float(number in whole) for number in run.numbers] or [0.0])
    return [number for place, number in enumerate(run.numbers) if all(rank[place] for rank in said)]
