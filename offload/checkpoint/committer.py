"""Commits: a step made durable in the background, those that are kept, and continuing from one.

`begin` runs on the training thread between two steps: it takes a snapshot of all paged tensors, which costs no copy,
and the state beside them. The commit thread waits until the page files have the whole snapshot, syncs them, writes the
manifest, and removes the commits that are not kept any more. A failed commit leaves the earlier ones as they are; its
error is raised on the training thread by the next call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from offload.checkpoint.commit_thread import CommitThread
from offload.checkpoint.rank_commits import PartRefusedError, RankCommits
from offload.checkpoint.retention import retired
from offload.commits.commit_state import encoded
from offload.commits.run_commits import Commit, EarlierCommits
from offload.store.page_store import PageStore
from pagemem.durable.manifest import Manifest, StoredTensor
from pagemem.durable.references import ReferencedFile, ReferencedTensor, refer_to
from pagemem.errors import CommitError, DamagedCommitError, StorageError
from pagemem.frames.page import TensorId
from pagemem.residency.disk_versions import DiskVersion
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.residency.snapshot import Snapshot, SnapshotState
from pagemem.tier import TRANSIENT


@dataclass(frozen=True, slots=True)
class CommitContent:
    """What a commit has beside the paged tensors.

    Attributes:
        state: JSON. beside: small tensors (buffers) as a safetensors file, or empty.
    """

    step: int
    name: str | None
    state: dict[str, Any]
    sidecar: bytes


def _has_arrived(tensor: PagedTensor) -> bool:
    return tensor.state is not Residency.ARRIVING


class Committer:
    """Makes, keeps and removes a run's commits. Methods belong to the training thread.

    Args:
        store: whose tensors are committed.
        keep: unnamed commits to keep; named ones are kept until their name is given again.
    """

    def __init__(self, store: PageStore, keep: int) -> None:
        self._store = store
        self._keep = keep
        self._earlier: EarlierCommits = store.earlier
        self.commits: dict[int, Commit] = dict(store.earlier.whole)
        #: What is wrong with commits that cannot be used, by number.
        self.damaged = store.earlier.damaged
        self._number = store.earlier.last_number
        self._ranks: RankCommits | None = None
        if store.rank_run is not None:
            self._ranks, self._number = RankCommits(store.rank_run), store.rank_run.last_number
        self._left: list[int] = []
        #: Snapshots of commits that failed when their manifest may have been there already.
        self._doubtful: dict[int, Snapshot] = {}
        #: Snapshots of commits whose parts are durable, of which other ranks may know more.
        self._doubtful_parts: list[Snapshot] = []
        self._foreign = store.foreign
        self._number = max(self._number, self._foreign.newest())
        self._own_course = not self.commits and not store.earlier.damaged and not self._foreign.names
        self._snapshot: Snapshot | None = None  # of the commit that is being written
        self._thread = CommitThread()

    @property
    def busy(self) -> bool:
        """Whether a commit is being written."""
        return self._thread.busy

    def wait(self) -> None:
        """Wait for the commit that is being written.

        Raises:
            BaseException: what it failed of, once; earlier commits are whole, and the next `begin` tries anew.
            KeyboardInterrupt: Ctrl-C; the commit continues.
        """
        self._thread.wait()

    def check(self) -> None:
        """Raise what a commit failed of, once. Does not wait."""
        self._thread.check()

    def close(self) -> None:
        """Complete the commit that is being written and end the thread. Idempotent. An interrupt abandons the commit.

        Raises:
            BaseException: what the last commit failed of, unless that was raised before; all is closed then, too.
        """
        try:
            self._thread.close(self._hurry)
        finally:
            self._snapshot = None

    def _hurry(self) -> None:
        """Abandon a commit that still waits for pages; earlier ones are whole."""
        with self._store.mover.changed:
            if self._snapshot is not None and self._snapshot.state is SnapshotState.OPEN:
                self._abandon(self._snapshot)

    # ---- continuing from a commit ---------------------------------------------------------------------------------

    def choose(self, name: str | None, *, allow_older: bool) -> Commit | None:
        """The newest commit, or the one with this name; None when the run has none at all. Waits for one being written.

        Raises:
            CommitError: it is damaged, or there is none of that name. With ``allow_older`` a damaged newest one is
                passed over; what is wrong with it is in ``damaged``.
            BaseException: what the last commit failed of, once.
        """
        self.wait()
        if name is not None:
            named = [commit for _, commit in sorted(self.commits.items()) if commit.manifest.name == name]
            if not named:
                known = ", ".join(repr(c.manifest.name) for c in self.commits.values() if c.manifest.name) or "none"
                raise CommitError(f"{self._earlier.folder.path} has no commit named {name!r}; there are: {known}")
            return named[-1]
        newest = max((number for number in self.commits if number not in self.damaged), default=0)
        later = [number for number in self.damaged if number > newest]
        if later and not allow_older:
            older = (
                f"commit {newest} (step {self.commits[newest].manifest.step}) is whole"
                if newest
                else "no other one is whole"
            )
            raise CommitError(
                f"{self.damaged[max(later)]}. {older}; allow_older=True resumes from the newest whole one"
            )
        return self.commits[newest] if newest else None

    def newest(self, name: str | None) -> int:
        """The greatest number of a commit of the own shape, damaged or not, or of those with this name; 0: none."""
        named = [number for number, commit in self.commits.items() if name in (None, commit.manifest.name)]
        found: int = max([0, *named, *(self.damaged if name is None else ())])
        return found

    def follow(self, number: int) -> None:
        """The run resumes from a commit: the next one removes later unnamed ones."""
        self._own_course = True
        self._left = [n for n, commit in self.commits.items() if n > number and commit.manifest.name is None]

    def check_own_course(self) -> None:
        """Raise CommitError where the folder has commits of another course of the run."""
        if not self._own_course:
            raise CommitError(
                f"{self._earlier.folder.path} holds commits, and this run did not go on from one; resume from it, or "
                "name another folder in ssd.paths"
            )

    # ---- making one ---------------------------------------------------------------------------------------------

    def begin(self, content: CommitContent) -> int:
        """Begin to commit what the tensors hold now; returns the commit's number. Waits for one that is being written.

        Raises:
            DiskFullError: there is no room for it; nothing was begun. StorageError: the system starts no more threads;
                likewise.
            CommitError: the folder has commits of another course of the run, which would be removed in time.
            BaseException: what the last commit failed of, once.
        """
        self.wait()
        self.check_own_course()
        self._thread.start()
        mover = self._store.mover
        tensors = [tensor for tensor in self._store.lasting() if tensor.tag not in TRANSIENT]
        with mover.changed:
            for tensor in tensors:  # what other ranks have updated may be on its way
                mover.monitor.wait_until(partial(_has_arrived, tensor), tensor.name, tensor.n_bytes)
            snapshot = mover.snapshots.begin(tensors)
            try:
                for tensor in tensors:
                    # A view of it could be written to before it is stored.
                    if tensor.may_be_aliased or tensor.written is not None:
                        mover.make_writable(tensor)
            except BaseException:
                mover.snapshots.abandon(snapshot)
                raise
        self._snapshot = snapshot
        names = {tensor.id: (tensor.name, tensor.tag.value, tensor.n_bytes) for tensor in tensors}
        self._number += 1
        number = self._number
        self._thread.run(lambda: self._write(number, content, snapshot, names))
        return number

    # ---- on the commit thread -----------------------------------------------------------------------------------

    def _write(
        self, number: int, content: CommitContent, snapshot: Snapshot, names: Mapping[TensorId, tuple[str, str, int]]
    ) -> None:
        """Make a commit durable.

        Args:
            names: name, tag and bytes of each tensor when the snapshot was taken.
        """
        attempted = False
        try:
            self._await(snapshot)
            self._settle_doubtful()
            self._store.mover.sync()
            self._earlier.claim_parts()
            stored = tuple(self._stored(names[tensor], copy) for tensor, copy in snapshot.copies.items())
            referenced = refer_to((names[tensor], origin) for tensor, origin in snapshot.origins.items())
            manifest = self._manifest(number, content, stored, referenced)
            attempted, text = True, encoded(manifest)
            self._earlier.folder.write(manifest, text)
        except BaseException:
            self._give_up(number, snapshot, attempted)
            if self._ranks is not None:
                self._ranks.fail(number)
            raise
        if self._ranks is not None:
            self._complete(self._ranks, manifest, text, snapshot)
        by_key = {tensor.key: copy for tensor, copy in zip(manifest.tensors, snapshot.copies.values(), strict=True)}
        self.commits[number] = Commit(manifest, by_key)
        self._retire()

    def _complete(self, ranks: RankCommits, manifest: Manifest, text: bytes, snapshot: Snapshot) -> None:
        try:
            ranks.complete(manifest, text)
        except PartRefusedError:
            self._give_up(manifest.number, snapshot, attempted=True)
            raise
        except BaseException:
            self._doubtful_parts.append(snapshot)  # the commit may count: its frames stay as they are
            raise

    def _stored(self, named: tuple[str, str, int], copy: DiskVersion) -> StoredTensor:
        """What a manifest says of a tensor of this name, tag and size."""
        placed = copy.placement
        tail = placed.tail
        return StoredTensor(
            *named, tuple((run.first, run.n_frames) for run in placed.runs),
            None if tail is None else (tail.frame, tail.offset_bytes, tail.length_bytes),
            tuple(self._store.page_files.sums(copy.route).tolist()),
        )  # fmt: skip

    def _manifest(
        self,
        number: int,
        content: CommitContent,
        stored: tuple[StoredTensor, ...],
        referenced: tuple[tuple[ReferencedFile, ...], tuple[ReferencedTensor, ...]],
    ) -> Manifest:
        """The manifest of a commit; what belongs beside it is written."""
        state = dict(content.state)
        if content.sidecar:
            state["sidecar"] = self._earlier.folder.write_sidecar(number, content.sidecar)
        return Manifest(
            number=number,
            name=content.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            step=content.step,
            page_bytes=self._store.page_bytes,
            run_ids=tuple(directory.run_id for directory in self._store.directories),
            checksums=self._store.config.ssd.checksums,
            tensors=stored,
            state=state,
            files=referenced[0],
            referenced=referenced[1],
        )

    def _give_up(self, number: int, snapshot: Snapshot, attempted: bool) -> None:
        """A commit has failed: its frames are free once it is certain that no manifest names them.

        Args:
            attempted: there may be a manifest.
        """
        if attempted:
            try:
                self._earlier.folder.remove(number)
            except StorageError:  # The commit's own error is the one to raise; the frames wait for `_settle_doubtful`.
                self._doubtful[number] = snapshot
                return
        self._abandon(snapshot)

    def _settle_doubtful(self) -> None:
        """Remove what failed commits may have left; nothing is committed while that cannot be done.

        Where it stays uncertain whether there is one, its frames stay as they are until the run ends.
        """
        folder = self._earlier.folder
        for number in [number for number in self._doubtful if number not in folder.uncertain]:
            folder.remove(number)
            self._abandon(self._doubtful.pop(number))

    def _abandon(self, snapshot: Snapshot) -> None:
        mover = self._store.mover
        with mover.changed:
            mover.snapshots.abandon(snapshot)
            mover.changed.notify_all()

    def _await(self, snapshot: Snapshot) -> None:
        mover = self._store.mover
        with mover.changed:
            while snapshot.state is SnapshotState.OPEN:
                mover.changed.wait()
        if snapshot.state is SnapshotState.RELEASED:
            raise CommitError(f"the commit was abandoned, earlier ones are whole: {snapshot.error}") from snapshot.error

    def _retire(self) -> None:
        """Remove what is not kept any more; its frames are free once that is durable.

        A damaged commit goes only if its file was read and is not what was written; what could not be used for another
        reason stays, with its frames.
        """
        left, self._left = self._left, []
        damaged = [number for number, error in self.damaged.items() if isinstance(error, DamagedCommitError)]
        names = {number: commit.manifest.name for number, commit in self.commits.items() if number not in self.damaged}
        own, foreign = retired(names, self._foreign.names, left, self._number, self._keep)
        if self._ranks is not None:
            self._ranks.retire(own)
        for number in own:
            self._retire_one(number)
        self._foreign.retire(foreign, removes=self._ranks is None or self._ranks.is_first)
        for number in damaged:
            self._earlier.folder.remove(number)
            del self.damaged[number]
        self._earlier.folder.sweep()

    def _retire_one(self, number: int) -> None:
        folder = self._earlier.folder
        try:
            folder.remove(number)
        except StorageError:
            if (
                number in folder.uncertain
            ):  # a crash may bring it back, so its frames stay as they are until the run ends
                del self.commits[number]
            raise
        commit = self.commits.pop(number)
        with self._store.mover.changed:
            for stored in commit.copies.values():
                self._store.mover.copies.let_go(stored)
