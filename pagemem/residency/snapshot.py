"""What the tensors hold at one moment, made whole in the page files while training goes on.

Tensors whose current copy is whole are in the snapshot at once. The others are *pending*: they are stored in the
background, a few at a time, and whoever wants to change one before has it stored first and waits. A snapshot is
complete when nothing is pending. It is given up when a store fails; then nothing is named by it.

    OPEN --nothing pending--> COMPLETE --release--> RELEASED
    OPEN --a store failed, release--> RELEASED

Guarded by the mover's lock.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pagemem import knobs
from pagemem.errors import StorageError
from pagemem.frames.page import TensorId
from pagemem.residency.disk_versions import DiskVersion, DiskVersions
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.sources.source_files import Origin
from pagemem.state_machine import StateMachine


class SnapshotState(enum.Enum):
    """See the diagram at the top of this module."""

    OPEN = "open"
    COMPLETE = "complete"
    RELEASED = "released"


_MOVES: Final = StateMachine(
    "snapshot",
    {
        SnapshotState.OPEN: {SnapshotState.COMPLETE, SnapshotState.RELEASED},
        SnapshotState.COMPLETE: {SnapshotState.RELEASED},
    },
)


@dataclass(slots=True, eq=False)
class Snapshot:
    """One moment's copies. Made by `Snapshots.begin`.

    Attributes:
        copies: of every tensor that had content, once it is stored.
        origins: of every tensor that other programs' files have the content of.
        pending: tensors that are yet to be stored, those to be stored soonest first.
        error: why it was given up.
    """

    store: DiskVersions
    pending: dict[TensorId, None] = field(default_factory=dict)
    copies: dict[TensorId, DiskVersion] = field(default_factory=dict)
    origins: dict[TensorId, Origin] = field(default_factory=dict)
    state: SnapshotState = SnapshotState.OPEN
    error: BaseException | None = None

    def add(self, tensor: TensorId, stored: DiskVersion) -> None:
        """The tensor's copy is whole."""
        self.store.hold(stored)
        self.copies[tensor] = stored
        self.pending.pop(tensor, None)

    def complete_if_done(self) -> None:
        """Become COMPLETE if nothing is pending any more."""
        if self.state is SnapshotState.OPEN and not self.pending:
            self.state = _MOVES.move(self.state, SnapshotState.COMPLETE)

    def release(self, error: BaseException | None = None) -> None:
        """Name nothing any more; frames that nobody else names are free."""
        self.state = _MOVES.move(self.state, SnapshotState.RELEASED)
        self.error = error
        self.pending.clear()
        for stored in self.copies.values():
            self.store.let_go(stored)


class Snapshots:
    """Makes one snapshot at a time. With the mover's lock held.

    Args:
        tensors: all paged tensors, by id.
        store: their copies.
        start_store: begins to store a dirty tensor.
    """

    def __init__(
        self, tensors: Mapping[TensorId, PagedTensor], store: DiskVersions, start_store: Callable[[PagedTensor], None]
    ) -> None:
        self._tensors = tensors
        self._store = store
        self._start_store = start_store
        self._open: Snapshot | None = None

    def begin(self, tensors: Iterable[PagedTensor]) -> Snapshot:
        """Begin to make what ``tensors`` hold now whole in the page files. Training thread, between two ops.

        What is ``may_be_aliased`` is stored, as it may have been written to; the caller has that wait, see
        `Mover.make_writable`.

        Raises:
            StorageError: a sync has failed, and something written before that is not in host memory; nothing was
                changed.
            DiskFullError: there is no room for it, and for all that will be stored beside it; nothing was changed.
            AssertionError: another one is being made, or a tensor is being used.
        """
        if self._open is not None:
            raise AssertionError("a snapshot is being made already")
        whole = [tensor for tensor in tensors if tensor.state is not Residency.ABSENT]
        lost = [tensor for tensor in whole if tensor.ssd_valid and tensor.copy is not None and tensor.copy.lost]
        if lost:
            raise StorageError(
                f"{lost[0].name}{f' and {len(lost) - 1} other tensors' if len(lost) > 1 else ''} cannot be committed: "
                "written before a sync of the page files failed, and not in RAM any more, so the disk may not have "
                "them. Earlier commits are whole: train on until each has been used again, or go on from one of them "
                "(engine.resume)"
            )
        for tensor in whole:
            tensor.note_writes()
            if tensor.may_be_aliased and tensor.state is Residency.CLEAN:
                tensor.become(Residency.DIRTY)
                tensor.ssd_valid = False
            tensor.dirtied_during_store |= tensor.may_be_aliased and tensor.state is Residency.STORING
        pending = [tensor for tensor in whole if tensor.state in (Residency.DIRTY, Residency.STORING)]
        if any(tensor.pins for tensor in pending):
            raise AssertionError("a snapshot inside an op")
        # Every copy that it names will have to be written elsewhere once its tensor has changed.
        self._store.reserve(sum(tensor.n_frames for tensor in whole if tensor.origin is None))
        snapshot = Snapshot(self._store)
        for tensor in whole:
            if tensor.origin is not None:
                snapshot.origins[tensor.id] = tensor.origin
            elif tensor.ssd_valid:
                assert tensor.copy is not None
                snapshot.add(tensor.id, tensor.copy)
        for tensor in sorted(pending, key=lambda t: t.last_use):
            tensor.snapshot_pending = True
            snapshot.pending[tensor.id] = None
        snapshot.complete_if_done()
        if snapshot.pending:
            self._open = snapshot
            self.store_pending()
        return snapshot

    def store_pending(self) -> None:
        """Have a few stores under way for the open snapshot."""
        if self._open is None:
            return
        pending = [self._tensors[tensor] for tensor in self._open.pending]
        n_more = knobs.STORES_AT_A_TIME - sum(tensor.state is Residency.STORING for tensor in pending)
        for tensor in pending:
            if n_more > 0 and tensor.state is Residency.DIRTY:
                n_more -= 1
                self._start_store(tensor)

    def snapshot_done(self, tensor: PagedTensor) -> None:
        """A tensor's current copy is whole: if it was pending, it is in the snapshot now."""
        snapshot = self._open
        if not tensor.snapshot_pending or snapshot is None:
            return
        assert tensor.copy is not None
        tensor.snapshot_pending = False
        snapshot.add(tensor.id, tensor.copy)
        snapshot.complete_if_done()
        if not snapshot.pending:
            self._open = None

    def give_up(self, error: BaseException | None) -> None:
        """Give the open snapshot up, if there is one; nothing is pending any more."""
        snapshot, self._open = self._open, None
        if snapshot is not None:
            for tensor in snapshot.pending:
                self._tensors[tensor].snapshot_pending = False
            snapshot.release(error)

    def abandon(self, snapshot: Snapshot) -> None:
        """Give a snapshot up, open or complete; nothing if it is released already."""
        if snapshot is self._open:
            self.give_up(None)
        elif snapshot.state is not SnapshotState.RELEASED:
            snapshot.release()
