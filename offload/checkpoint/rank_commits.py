"""The two phases of a commit of several ranks, on the commit thread of each.

    part durable on this rank --all say so--> rank 0 writes the root --all hear of it--> older ones are removed

Once a rank has said that its part is durable, it does not remove it for whatever happens but what all have said: the
root may be there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from offload.commits.rank_run import RankRun
from pagemem.durable.manifest import Manifest
from pagemem.durable.root_folder import RootRecord, digest_of
from pagemem.errors import CommitError

#: Hexadecimal digits of a digest in a float, exactly.
_DIGITS: Final = 12
_N_WORDS: Final = -(-32 // _DIGITS)


class PartRefusedError(CommitError):
    """Some rank could not make its part of a commit: there is no such commit, and parts of it can be removed."""


class RankCommits:
    """Of one rank. Commit thread."""

    def __init__(self, run: RankRun) -> None:
        self._run = run

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and removes roots."""
        return self._run.rank == 0

    def fail(self, number: int) -> None:
        """This rank could not make its part of a commit, and has removed what there was.

        Raises:
            RankError: another rank failed.
        """
        self._say(number, None)

    def complete(self, manifest: Manifest, content: bytes) -> None:
        """This rank's part is durable: have the commit count, if all are.

        Raises:
            PartRefusedError: one is not. RankError: another rank failed, and it is not known whether the commit counts.
            StorageError: rank 0 could not write the root; likewise.
        """
        digests = self._say(manifest.number, digest_of(content))
        missing = [rank for rank, digest in enumerate(digests) if digest is None]
        if missing:
            raise PartRefusedError(
                f"commit {manifest.number} was not made: rank {missing[0]} could not make its part; earlier ones are "
                "whole"
            )
        error: BaseException | None = None
        if self._run.rank == 0:
            try:
                self._run.folder.write(self._record(manifest, [digest or "" for digest in digests]))
            except BaseException as raised:
                error = raised
        (first, *_) = self._run.collectives.agree_beside([float(error is None)])
        if error is not None:
            raise error
        if not first[0]:
            raise CommitError(f"rank 0 could not write the root of commit {manifest.number}; earlier ones are whole")

    def retire(self, numbers: Collection[int]) -> None:
        """Have commits count no more, before their parts are removed; the same on all ranks.

        Raises:
            RankError: another rank failed. StorageError: a root may still be there.
        """
        if not numbers:
            return
        error: BaseException | None = None
        if self._run.rank == 0:
            try:
                for number in numbers:
                    self._run.folder.remove(number)
            except BaseException as raised:
                error = raised
        (first, *_) = self._run.collectives.agree_beside([float(error is None)])
        if error is not None:
            raise error
        if not first[0]:
            raise CommitError(f"rank 0 could not remove the roots of commits {sorted(numbers)}; they are kept")

    def _say(self, number: int, digest: str | None) -> list[str | None]:
        """What every rank says of its part; None: it has none."""
        words = [0.0] * _N_WORDS
        if digest is not None:
            words = [float(int(digest[at : at + _DIGITS], 16)) for at in range(0, len(digest), _DIGITS)]
        said = self._run.collectives.agree_beside([float(number), float(digest is not None), *words])
        for rank, (other, *_) in enumerate(said):
            if other != number:
                raise AssertionError(f"rank {rank} makes commit {other}, rank {self._run.rank} commit {number}")
        return [_text(words) if there else None for _, there, *words in said]

    def _record(self, manifest: Manifest, digests: list[str]) -> RootRecord:
        return RootRecord(
            number=manifest.number, name=manifest.name, created=manifest.created, step=manifest.step,
            shape=self._run.shape, n_ranks=self._run.collectives.n_ranks, sharing=self._run.sharing,
            part_digests=tuple(digests),
        )  # fmt: skip


def _text(words: list[float]) -> str:
    lengths = [min(_DIGITS, 32 - at) for at in range(0, 32, _DIGITS)]
    return "".join(f"{int(word):0{length}x}" for word, length in zip(words, lengths, strict=True))
