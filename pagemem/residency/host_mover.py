"""Residency in host memory: paged tensors between the host arena and page files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from pagemem import knobs
from pagemem.devices.arena import Arena
from pagemem.errors import OffloadError, StorageError
from pagemem.files.page_file import PageFiles
from pagemem.files.stats import IoMeter
from pagemem.files.transfer import Completion
from pagemem.frames.page import TensorId
from pagemem.residency.disk_versions import DiskVersion, DiskVersions
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.residency.snapshot import Snapshots
from pagemem.sources.source_files import Origin
from pagemem.sources.source_transfers import SourceFiles
from pagemem.telemetry.events import Event, EventKind, EventSink
from pagemem.telemetry.recorder import Recorder
from pagemem.tier import Tag, Tier


class HostMover(Mover):
    """Owns the residency of every paged tensor of one host arena and one set of page files. Threads as `Mover`.

    Args:
        sources: files of others that tensors may come from; None: there are none, see `originate`.

    Attributes:
        on_part: called with the lock held, on an I/O thread, when bytes of a load are there before all are; see
            `PagedTensor.arrived`. None: nobody wants to know.
        copies: the tensors' bytes in the page files; ``ssd`` is their allocator. snapshots: what commits are made of.
    """

    tier = Tier.HOST
    setting = "memory.ram"

    def __init__(self, arena: Arena, files: PageFiles, sink: EventSink, sources: SourceFiles | None = None) -> None:
        super().__init__(arena, sink)
        self.files = files
        self.sources = sources
        self.on_part: Callable[[], None] | None = None
        self.copies = DiskVersions(files, arena.page_bytes)
        self.ssd = self.copies.book
        self.snapshots = Snapshots(self.tensors, self.copies, lambda tensor: self.start_store(tensor, background=True))
        self.monitor.on_change(self.snapshots.store_pending)

    def watch(self, watcher: Recorder | None) -> dict[tuple[Tier, Tag], int]:
        """As `Mover.watch`."""
        with self.changed:
            self.copies.watcher = watcher
            return super().watch(watcher) | {(Tier.SSD, tag): n_bytes for tag, n_bytes in self.copies.held().items()}

    def forget(self, tensor: PagedTensor) -> None:
        """As `Mover.forget`."""
        with self.changed:
            super().forget(tensor)
            if tensor.copy is not None:
                self.copies.leave(tensor.copy)

    # ---- moves -------------------------------------------------------------------------------------------------

    def _read(self, tensor: PagedTensor, done: Completion, *, background: bool) -> None:
        """Begin to fill a tensor's frames from the tier below."""
        assert tensor.frame is not None
        buffer = self.arena.buffer(tensor.frame, tensor.n_bytes)
        part = None if self.on_part is None else partial(self._part_arrived, tensor.arrived)
        if tensor.origin is not None:
            assert self.sources is not None
            self.sources.read(tensor.origin, buffer, done, background=background, part=part)
            return
        assert tensor.copy is not None
        self.files.read(tensor.copy.route, buffer, done, background=background, part=part)

    def _part_arrived(self, arrived: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> None:
        with self.changed:
            arrived.extend(spans)
            if self.on_part is not None:
                self.on_part()

    def _loaded(self, tensor: PagedTensor, started_s: float, error: BaseException | None) -> None:
        with self.changed:
            lost = tensor.copy is not None and tensor.copy.lost
            if lost and error is None and not self.files.checksums:
                error = StorageError(
                    f"{tensor.name} was written before a sync of the page files failed, and without ssd.checksums "
                    "nothing tells whether the disk has it: go on from the last commit"
                )
            # A lost one's checksum was right, so here it is whole; and of two places the one with fewer bytes is read.
            self._end_load(tensor, error, rewrite=lost or _shrinks(tensor.origin))
        self._emit(EventKind.READ, tensor, started_s)

    def take_back_load(self, tensor: PagedTensor) -> bool:
        """False: a read of page files cannot be undone."""
        return False

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
            done = Completion(partial(self._stored, tensor, time.perf_counter()))
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
            self.monitor.ended(error)
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
            self.discard_if_expired(tensor)
            self.monitor.notify()
        self._emit(EventKind.WRITE, tensor, started_s)

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

    def originate(self, tensor: PagedTensor, origin: Origin) -> None:
        """Take pieces of other programs' files for the content of a tensor that nobody holds; nothing is read yet.

        From there it is loaded, as often as it is wanted, until it is changed.

        Raises:
            StorageError: a file cannot be opened, or is not as it was; nothing was changed.
            AssertionError: it is held, or has another size; likewise.
        """
        if self.sources is None or origin.n_bytes != tensor.n_bytes:
            raise AssertionError(f"{tensor.name}: {origin.n_bytes} bytes of sources for {tensor.n_bytes}")
        self.sources.open(origin.files)
        with self.changed:
            self.resume(tensor, None)
            tensor.origin, tensor.ssd_valid = origin, True
            tensor.become(Residency.STORED)

    def begin_upload(self, tensor: PagedTensor) -> torch.Tensor:
        """The bytes of a tensor, uint8, which stay as they are until `end_upload`; of one that is being loaded those
        that have arrived.

        Should the load fail, they are not looked at any more: the frames are given up at once.
        """
        with self.changed:
            assert tensor.readable or tensor.state is Residency.LOADING
            tensor.uploads += 1
            self.monitor.in_flight += 1  # no call between the two, so that no signal is
            return self.tenants.bytes_of(tensor)

    def end_upload(self, tensor: PagedTensor) -> None:
        """The bytes that `begin_upload` gave are not looked at any more."""
        with self.changed:
            tensor.uploads -= 1
            self.monitor.ended(None)
            self.discard_if_expired(tensor)
            self.monitor.notify()

    def begin_arrival(self, tensor: PagedTensor) -> torch.Tensor:
        """The bytes of a dirty tensor, uint8, which a device fills with its own until `end_arrival`; nobody reads them
        before."""
        with self.changed:
            tensor.become(Residency.ARRIVING)
            self.monitor.in_flight += 1  # likewise
            return self.tenants.bytes_of(tensor)

    def end_arrival(self, tensor: PagedTensor) -> None:
        """What a device filled is there; if it was to be stored by now, that begins. Any thread.

        Raises:
            DiskFullError: there is no room for that; the tensor is dirty and whole.
        """
        with self.changed:
            tensor.become(Residency.DIRTY)
            self.monitor.ended(None)
            self.discard_if_expired(tensor)
            to_store, tensor.to_store = tensor.to_store and tensor.state is Residency.DIRTY, False
            try:
                if to_store:
                    self.start_store(tensor)
            finally:
                self.monitor.notify()

    def end_update(self, tensor: PagedTensor) -> None:
        """One of the changes that `PagedTensor.updates` counts is over, or given up: what was put off until then is
        done. Any thread.

        Raises:
            DiskFullError: there is no room to store it; the tensor is dirty and whole.
        """
        with self.changed:
            tensor.updates -= 1
            self.discard_if_expired(tensor)
            if not tensor.updates:
                to_store, tensor.to_store = tensor.to_store, False
                if to_store and tensor.state is Residency.DIRTY and not tensor.pins:
                    self.start_store(tensor)

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
                self.monitor.notify()
            raise

    # ---- looking -----------------------------------------------------------------------------------------------

    def bandwidth(self) -> tuple[float, float]:
        """Bytes/s of the page files so far while they were reading, and while they were writing."""
        return _bytes_per_s(self.files.reads), _bytes_per_s(self.files.writes)

    def planned_page_file_frames(self, stored: Iterable[TensorId]) -> int:
        """Page-file frames in use once every tensor of ``stored`` has been stored, for the first time in that order."""
        with self.changed:
            new = [self.tensors[t] for t in dict.fromkeys(stored) if self.tensors[t].copy is None]
            return self.copies.used_frames_after(tensor.n_bytes for tensor in new)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _take_frames(self, tensor: PagedTensor) -> DiskVersion:
        try:
            return self.copies.take(tensor.n_bytes, tensor.tag)
        except OffloadError as error:
            if tensor.snapshot_pending:
                self.snapshots.give_up(error)
            raise

    def _emit(self, kind: EventKind, tensor: PagedTensor, started_s: float) -> None:
        self.monitor.sink.emit(Event(kind, tensor.name, tensor.n_bytes, started_s, time.perf_counter() - started_s))


def _shrinks(origin: Origin | None) -> bool:
    """Whether a load from there reads more than the tensor has."""
    return origin is not None and origin.read_bytes > origin.n_bytes


def _bytes_per_s(meter: IoMeter) -> float:
    busy_s = meter.busy_s
    return meter.n_bytes / busy_s if meter.n_bytes >= knobs.TELLING_BYTES and busy_s else knobs.ASSUMED_BYTES_PER_S
