"""Two-phase moves of paged tensors between host frames and page files.

A move is prepare (frames reserved, tensor in a state that forbids others to touch it) -> copy (I/O threads) -> complete
or abort. The source stays authoritative until the move completes, so a failed or cancelled move loses nothing.

One lock guards all bookkeeping, see `pagemem.residency.monitor`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

import torch

from pagemem.devices.arena import Arena
from pagemem.errors import OffloadError, StorageError
from pagemem.files.page_file import PageFiles
from pagemem.files.transfer import Completion
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.disk_versions import DiskVersion, DiskVersions
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.residency.snapshot import Snapshots
from pagemem.residency.tenants import Tenants
from pagemem.telemetry.events import Event, EventKind, EventSink, Watcher
from pagemem.tier import Tag, Tier
from pagemem.units import MiB

#: Bandwidth assumed until the page files have moved enough to tell, and how much is enough.
ASSUMED_BYTES_PER_S: Final = 1.5e9
TELLING_BYTES: Final = 16 * MiB


class Mover(Tenants):
    """Owns the residency of every paged tensor of one host arena and one set of page files.

    Methods may be called on any thread unless they say otherwise; they take the lock themselves, and may be called
    with it held (it is re-entrant), which is how a caller makes several steps one.

    Attributes:
        on_part: called with the lock held, on an I/O thread, when bytes of a load are there before all are; see
            `PagedTensor.arrived`.
            None: nobody wants to know.
    """

    def __init__(self, arena: Arena, files: PageFiles, sink: EventSink) -> None:
        super().__init__(arena, sink)
        self.files = files
        self.on_part: Callable[[], None] | None = None
        self.copies = DiskVersions(files, arena.page_bytes)
        self.snapshots = Snapshots(self.tensors, self.copies, lambda tensor: self.start_store(tensor, background=True))
        self.on_change(self.snapshots.store_owed)

    @property
    def ssd(self) -> PageAllocator:
        """Who holds which frame of the page files."""
        return self.copies.book

    def watch(self, watcher: Watcher | None) -> dict[tuple[Tier, Tag], int]:
        """Tell ``watcher`` (None: nobody) of every change of what tensors hold from now on; returns what they hold
        then.

        In host memory that is whole frames, in the page files the bytes of copies.
        """
        with self.changed:
            self.watcher = self.copies.watcher = watcher
            found = {(Tier.SSD, tag): n_bytes for tag, n_bytes in self.copies.held().items()}
            for tensor in self.tensors.values():
                if tensor.frame is not None:
                    key = (self.tier, tensor.tag)
                    found[key] = found.get(key, 0) + tensor.n_frames * self.arena.page_bytes
            return found

    # ---- records -----------------------------------------------------------------------------------------------

    def forget(self, tensor: PagedTensor) -> None:
        """Discard a tensor and give all its frames back. It must be neither held nor in flight."""
        with self.changed:
            self.discard(tensor)
            if tensor.copy is not None:
                self.copies.leave(tensor.copy)
            del self.tensors[tensor.id]

    def collect_leases(self) -> list[PagedTensor]:
        """Count ended leases off and discard what has expired; returns tensors that nobody has views of, or a use for,
        any more.

        Until then an exposed tensor may have been written to, whatever was stored of it meanwhile.
        """
        with self.changed:
            freed = self._discard_expired()
            for tensor_id in self.arena.ended_leases():
                tensor = self.tensors.get(tensor_id)
                if tensor is None:
                    continue
                tensor.leases -= 1
                if tensor.leases == 0:
                    freed.append(tensor)
                    if tensor.may_be_aliased and tensor.readable:
                        self.make_writable(tensor)
                        self.touch(tensor)
                    tensor.may_be_aliased = False
            return freed

    # ---- moves -------------------------------------------------------------------------------------------------

    def start_load(self, tensor: PagedTensor, frame: FrameId, *, fresh: bool = False, background: bool = False) -> None:
        """Begin bringing an absent or stored tensor into the free frames from ``frame`` on.

        With ``fresh`` the old content is not wanted: nothing is read and the frames hold whatever was there. A
        ``background`` copy gives way to others.

        Raises:
            AssertionError: a frame is taken; nothing was changed.
        """
        with self.changed:
            self._move_in(tensor, frame)
            tensor.arrived = []
            if fresh or tensor.state is Residency.ABSENT:
                if not fresh:
                    self.bytes_of(tensor).zero_()
                tensor.ssd_valid = tensor.ssd_valid and not fresh
                tensor.become(Residency.CLEAN)
                self._notify()
                return
            started_s = time.perf_counter()
            done = Completion(lambda error: self._loaded(tensor, started_s, error))
            self._begin(tensor, Residency.LOADING, done, partial(self._read, background=background))

    def _read(self, tensor: PagedTensor, done: Completion, *, background: bool) -> None:
        """Begin to fill a tensor's frames from the tier below."""
        assert tensor.copy is not None and tensor.frame is not None
        buffer = self.arena.buffer(tensor.frame, tensor.n_bytes)
        read: Callable[..., None] = self.files.read
        if self.on_part is not None:
            read = partial(read, part=partial(self._part_arrived, tensor.arrived))
        read(tensor.copy.route, buffer, done, background=background)

    def _part_arrived(self, arrived: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> None:
        with self.changed:
            arrived.extend(spans)
            if self.on_part is not None:
                self.on_part()

    def take_back_load(self, tensor: PagedTensor) -> bool:
        """Undo a load whose copy has not begun; returns whether it was one. Reads of page files cannot be undone."""
        return False

    def _loaded(self, tensor: PagedTensor, started_s: float, error: BaseException | None) -> None:
        with self.changed:
            lost = tensor.copy is not None and tensor.copy.lost
            if lost and error is None and not self.files.checksums:
                error = StorageError(
                    f"{tensor.name} was written before a sync of the page files failed, and without ssd.checksums "
                    "nothing tells whether the disk has it: go on from the last commit"
                )
            self._ended(error)
            if error is None:
                tensor.become(Residency.CLEAN)
                if lost:  # its checksum was right, so here it is whole: to be written again
                    self.touch(tensor)
            else:
                tensor.become(Residency.STORED)
                self._move_out(tensor)
            self._notify()
        self._emit(EventKind.READ, tensor, started_s)

    def start_store(self, tensor: PagedTensor, *, background: bool = False) -> None:
        """Begin copying a dirty tensor to its page-file frames, to fresh ones if it has none, a commit names them, or a
        sync has lost them.

        A ``background`` copy gives way to others.

        Raises:
            DiskFullError: there is no room; the tensor is still dirty and whole.
        """
        with self.changed:
            if tensor.copy is None or tensor.copy.commits or tensor.copy.lost:
                fresh = self._take_frames(tensor)
                if tensor.copy is not None:
                    self.copies.leave(tensor.copy)
                tensor.copy = fresh
            started_s = time.perf_counter()
            done = Completion(lambda error: self._stored(tensor, started_s, error))
            self._begin(tensor, Residency.STORING, done, partial(self._write, background=background))

    def _write(self, tensor: PagedTensor, done: Completion, *, background: bool) -> None:
        """Begin to copy a tensor's frames to its page-file frames, which do not hold its content before that has
        ended."""
        assert tensor.copy is not None and tensor.frame is not None
        tensor.ssd_valid = False
        self.files.write(
            tensor.copy.route, self.arena.buffer(tensor.frame, tensor.n_bytes), done, background=background
        )

    def _stored(self, tensor: PagedTensor, started_s: float, error: BaseException | None) -> None:
        with self.changed:
            self._ended(error)
            if error is None and not tensor.dirtied_during_store:
                tensor.ssd_valid = True
                tensor.become(Residency.CLEAN)
                assert tensor.copy is not None
                self.copies.wrote(tensor.copy)
                self.snapshots.snapshot_done(tensor)
            else:
                tensor.become(Residency.DIRTY)
                if error is not None:
                    self.snapshots.give_up(error)
            tensor.dirtied_during_store = False
            self._discard_if_expired(tensor)
            self._notify()
        self._emit(EventKind.WRITE, tensor, started_s)

    def touch(self, tensor: PagedTensor) -> None:
        """Note that compute changed (or is about to change) the host copy, which must be readable and held.

        Raises:
            AssertionError: a snapshot has yet to get what was there; see `make_writable`.
        """
        with self.changed:
            if tensor.snapshot_pending:
                raise AssertionError(f"{tensor.name} is changed while a snapshot waits for its content")
            if tensor.state is Residency.STORING:
                tensor.dirtied_during_store = True
                return
            if tensor.state is not Residency.DIRTY:
                tensor.become(Residency.DIRTY)
            tensor.ssd_valid = False

    def make_writable(self, tensor: PagedTensor) -> None:
        """Before a tensor is changed: have a snapshot that waits for its content get it, and wait for that.

        Raises:
            StorageError: it could not be stored (or what else failed); the snapshot is given up.
        """
        with self.changed:
            if not tensor.snapshot_pending:
                return
            if tensor.state is Residency.DIRTY:
                self.start_store(tensor)
            self.wait_until(lambda: not tensor.snapshot_pending, f"commit of {tensor.name}", tensor.n_bytes)

    def resume(self, tensor: PagedTensor, stored: DiskVersion | None) -> None:
        """Take a commit's copy for the content of a tensor that nobody holds; None: it reads as zeros from now on.

        Raises:
            AssertionError: it is held; nothing was changed.
        """
        with self.changed:
            self.discard(tensor)
            if tensor.copy is not None:
                self.copies.leave(tensor.copy)
                tensor.copy = None
            if stored is not None:
                stored.current = True
                tensor.copy, tensor.ssd_valid = stored, True
                tensor.become(Residency.STORED)

    def begin_upload(self, tensor: PagedTensor) -> torch.Tensor:
        """The bytes of a tensor, uint8, which stay as they are until `end_upload`; of one that is being loaded those
        that have arrived.

        Should the load fail, they are not looked at any more: the frames are given up at once.
        """
        with self.changed:
            assert tensor.readable or tensor.state is Residency.LOADING
            tensor.uploads += 1
            self._in_flight += 1  # no call between the two, so that no signal is
            return self.bytes_of(tensor)

    def end_upload(self, tensor: PagedTensor) -> None:
        """The bytes that `begin_upload` gave are not looked at any more."""
        with self.changed:
            tensor.uploads -= 1
            self._ended(None)
            self._discard_if_expired(tensor)
            self._notify()

    def begin_arrival(self, tensor: PagedTensor) -> torch.Tensor:
        """The bytes of a dirty tensor, uint8, which a device fills with its own until `end_arrival`; nobody reads them
        before."""
        with self.changed:
            tensor.become(Residency.ARRIVING)
            self._in_flight += 1  # likewise
            return self.bytes_of(tensor)

    def end_arrival(self, tensor: PagedTensor) -> None:
        """What a device filled is there; if it was to be stored by now, that begins. Any thread.

        Raises:
            DiskFullError: there is no room for that; the tensor is dirty and whole.
        """
        with self.changed:
            tensor.become(Residency.DIRTY)
            self._ended(None)
            self._discard_if_expired(tensor)
            to_store, tensor.to_store = tensor.to_store and tensor.state is Residency.DIRTY, False
            try:
                if to_store:
                    self.start_store(tensor)
            finally:
                self._notify()

    # ---- durability --------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make durable all that has been stored. Any thread but an I/O thread; while no snapshot is open.

        Raises:
            StorageError: it failed, so whatever was stored since the last sync may not be on the disk, and no later
                sync will tell. What of it is in host memory is dirty again; the rest is when it is read next, and until
                then there can be no snapshot.
        """
        with self.changed:
            written = self.copies.begin_sync()
        try:
            self.files.sync()
        except BaseException:
            with self.changed:
                # Of what is being written, a part may have been before the sync.
                under_way = {
                    t.copy for t in self.tensors.values() if t.state is Residency.STORING and t.copy is not None
                }
                self.copies.sync_failed(written | under_way)
                for tensor in self.tensors.values():
                    if tensor.state is Residency.STORING:
                        tensor.dirtied_during_store = True
                    elif (
                        tensor.state is Residency.CLEAN
                        and tensor.ssd_valid
                        and tensor.copy is not None
                        and tensor.copy.lost
                    ):
                        self.touch(tensor)
                self._notify()
            raise

    # ---- waiting -----------------------------------------------------------------------------------------------

    def store_all(self) -> None:
        """Copy every dirty tensor to the page files and wait for it.

        Raises:
            OffloadError: a copy failed or there is no room; what was not copied is still dirty and whole.
        """
        self.settle()
        with self.changed:
            for tensor in self.tensors.values():
                if tensor.state is Residency.DIRTY:
                    self.start_store(tensor)
        self.settle()
        self.check()

    def close(self) -> None:
        """Wait until no copy is under way. Idempotent; the page files stay open.

        Raises:
            StorageError: (or what a background copy raised) if `check` has never raised one before.
        """
        self.settle()
        if not self._told:
            self.check()

    def bandwidth(self) -> tuple[float, float]:
        """Bytes/s of the page files so far while they were reading, and while they were writing."""
        stats = self.files.stats()
        return _bytes_per_s(stats.bytes_read, stats.read_busy_s), _bytes_per_s(stats.bytes_written, stats.write_busy_s)

    def planned_page_file_frames(self, stored: Iterable[TensorId]) -> int:
        """Page-file frames in use once every tensor of ``stored`` has been stored, for the first time in that order."""
        with self.changed:
            new = [self.tensors[t] for t in dict.fromkeys(stored) if self.tensors[t].copy is None]
            return self.copies.used_frames_after(tensor.n_bytes for tensor in new)

    def validate(self) -> None:
        """Check every cross reference between records and allocators.

        Raises:
            AssertionError: one does not hold.
        """
        with self.changed:
            super().validate()
            self.ssd.validate()
            for tensor in self.tensors.values():
                if tensor.state is Residency.STORED and not tensor.ssd_valid:
                    raise AssertionError(f"{tensor.name}: stored, but the page file does not hold it")

    # ---- inside ------------------------------------------------------------------------------------------------

    def _take_frames(self, tensor: PagedTensor) -> DiskVersion:
        try:
            return self.copies.take(tensor.n_bytes, tensor.tag)
        except OffloadError as error:
            if tensor.snapshot_pending:
                self.snapshots.give_up(error)
            raise

    def _begin(
        self, tensor: PagedTensor, state: Residency, done: Completion, move: Callable[[PagedTensor, Completion], None]
    ) -> None:
        """Change the state of a tensor and begin what ends that state again, by ``done``, once, whatever is raised
        here."""
        self._begun()
        moving = False
        try:
            tensor.become(state)
            moving = True
            move(tensor, done)
        except BaseException as error:
            if done.begun:
                raise  # It goes on: a signal's handler has raised behind it.
            if not moving:
                self._ended(None)
                raise
            # Refused before it began: whoever waits for it hears of it as of one that failed.
            done(error)
            if not isinstance(error, Exception):
                self._failure = None if self._failure is error else self._failure
                raise

    def _emit(self, kind: EventKind, tensor: PagedTensor, started_s: float) -> None:
        self._sink.emit(Event(kind, tensor.name, tensor.n_bytes, started_s, time.perf_counter() - started_s))


def _bytes_per_s(n_bytes: int, busy_s: float) -> float:
    return n_bytes / busy_s if n_bytes >= TELLING_BYTES and busy_s else ASSUMED_BYTES_PER_S
