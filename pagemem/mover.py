"""Two-phase moves of paged tensors between host frames and page files.

A move is prepare (frames reserved, tensor in a state that forbids others to touch it) -> copy (I/O threads) -> complete
or abort. The source stays authoritative until the move completes, so a failed or cancelled move loses nothing.

One lock guards all bookkeeping, `Mover.changed`; no I/O is done while it is held. Every change of state notifies it and
calls the listeners, which run with the lock held, on the thread that made the change (an I/O thread for the end of a
copy), and must be cheap. The first error of a background copy is kept and raised on the training thread by `check`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch

from pagemem.allocator import PageAllocator
from pagemem.arena import HostArena
from pagemem.copies import Copies, StoredCopy
from pagemem.errors import OffloadError, TransitionError
from pagemem.events import Event, EventKind, EventSink
from pagemem.page import FrameId, Shortage, TensorId
from pagemem.page_file import PageFiles
from pagemem.page_requests import Route
from pagemem.page_transfer import Done
from pagemem.residency import PagedTensor, Residency
from pagemem.snapshot import Snapshot
from pagemem.tier import Tag, Tier
from pagemem.units import MiB
from pagemem.window import Comparable, Window, best_window

#: Bandwidth assumed until the page files have moved enough to tell, and how much is enough.
ASSUMED_BYTES_PER_S: Final = 1.5e9
TELLING_BYTES: Final = 16 * MiB
#: Stores under way at a time for a snapshot, beside those that training needs.
SNAPSHOT_STORES: Final = 2


class Mover:
    """Owns the residency of every paged tensor of one host arena and one set of page files.

    Methods may be called on any thread unless they say otherwise; they take the lock themselves, and may be called
    with it held (it is re-entrant), which is how a caller makes several steps one.
    """

    def __init__(self, arena: HostArena, files: PageFiles, sink: EventSink) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.arena = arena
        self.files = files
        self.host = PageAllocator(Tier.HOST, arena.page_bytes, arena.n_frames)
        self.copies = Copies(files, arena.page_bytes)
        self.tensors: dict[TensorId, PagedTensor] = {}
        self._sink = sink
        self._failure: BaseException | None = None
        self._told = False
        self._listeners: list[Callable[[], None]] = []
        self._in_flight = 0
        self._next_id = 0
        self._touched = bytearray(arena.n_frames)
        self._n_set_aside = 0
        self._snapshot: Snapshot | None = None
        self._listeners.append(self._store_owed)

    @property
    def ssd(self) -> PageAllocator:
        """Who holds which frame of the page files."""
        return self.copies.book

    # ---- records -----------------------------------------------------------------------------------------------

    def create(self, name: str, tag: Tag, n_bytes: int) -> PagedTensor:
        """A new tensor that reads as zeros and holds no bytes in any tier yet."""
        with self.changed:
            tensor = PagedTensor.sized(TensorId(self._next_id), name, tag, n_bytes, self.arena.page_bytes)
            self._next_id += 1
            self.tensors[tensor.id] = tensor
            return tensor

    def forget(self, tensor: PagedTensor) -> None:
        """Discard a tensor and give all its frames back. It must be neither held nor in flight."""
        with self.changed:
            self.discard(tensor)
            if tensor.copy is not None:
                self.copies.leave(tensor.copy)
            del self.tensors[tensor.id]

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` with the lock held after every change that may let a waiting move go on."""
        self._listeners.append(listener)

    def check(self) -> None:
        """Raise the first error of a background copy since the last call, once. Call on the training thread.

        Raises:
            StorageError: (or what the copy raised) every tensor is still whole where it was before that copy, and
                what moves it next tries again.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            self._told = True
            raise failure

    @property
    def failed(self) -> bool:
        """Whether a background copy failed and nobody has been told yet."""
        return self._failure is not None

    def collect_leases(self) -> list[PagedTensor]:
        """Count ended leases off; returns the tensors that have none left since the last call.

        Until then an exposed tensor may have been written to, whatever was stored of it meanwhile.
        """
        with self.changed:
            freed: list[PagedTensor] = []
            for tensor_id in self.arena.ended_leases():
                tensor = self.tensors.get(tensor_id)
                if tensor is None:
                    continue
                tensor.leases -= 1
                if tensor.leases == 0:
                    freed.append(tensor)
                    if tensor.exposed and tensor.readable:
                        self.touch(tensor)
                    tensor.exposed = False
            return freed

    def droppable(self, tensor_id: TensorId) -> bool:
        """Whether the tensor's host frames can be given up after at most one store."""
        tensor = self.tensors[tensor_id]
        return not tensor.held and tensor.state in (Residency.CLEAN, Residency.DIRTY)

    def choose(self, n_frames: int, cost: Callable[[Sequence[TensorId]], Comparable]) -> Window | None:
        """The cheapest window of host frames whose tenants are all droppable, or None."""
        with self.changed:
            segments = [segment for segment in self.host.segments() if segment[0] < self.n_shared_frames]
            if segments:
                first, length, owner = segments[-1]
                segments[-1] = (first, min(length, self.n_shared_frames - first), owner)
            return best_window(segments, n_frames, self.droppable, cost)

    @property
    def n_shared_frames(self) -> int:
        """Host frames that whoever needs one may use, from the first on; those above have an owner, see `set_aside`."""
        return self.arena.n_frames - self._n_set_aside

    def set_aside(self, n_frames: int) -> FrameId:
        """Keep the last ``n_frames`` host frames for an owner that places tensors in them itself; returns the first.

        Raises:
            AssertionError: they are in use, or there are not as many; nothing was changed.
        """
        with self.changed:
            first = self.arena.n_frames - n_frames
            if n_frames < 0 or first < 0 or any(self.host.owner(frame) is not None for frame in range(first, self.arena.n_frames)):
                raise AssertionError(f"the last {n_frames} of {self.arena.n_frames} host frames are not free")
            self._n_set_aside = n_frames
            return FrameId(first)

    # ---- moves -------------------------------------------------------------------------------------------------

    def start_load(self, tensor: PagedTensor, frame: FrameId, *, fresh: bool = False) -> None:
        """Begin bringing an absent or stored tensor into the free frames from ``frame`` on.

        With ``fresh`` the old content is not wanted: nothing is read and the frames hold whatever was there.

        Raises:
            AssertionError: a frame is taken; nothing was changed.
        """
        with self.changed:
            placed = self.host.allocate(tensor.id, tensor.n_bytes, contiguous=True, at=frame)
            if isinstance(placed, Shortage):
                raise AssertionError(f"{tensor.name}: frames {frame}..{frame + tensor.n_frames} are taken")
            tensor.frame = frame
            self._touched[frame : frame + tensor.n_frames] = b"\1" * tensor.n_frames
            buffer = self.arena.buffer(frame, tensor.n_bytes)
            if fresh or tensor.state is Residency.ABSENT:
                if not fresh:
                    torch.frombuffer(buffer, dtype=torch.uint8).zero_()
                tensor.backed = tensor.backed and not fresh
                tensor.become(Residency.CLEAN)
                self._notify()
                return
            tensor.become(Residency.LOADING)
            self._in_flight += 1
            assert tensor.copy is not None
            started_s = time.perf_counter()
            self._begin(self.files.read, tensor.copy.route, buffer, lambda error: self._loaded(tensor, started_s, error))

    def _loaded(self, tensor: PagedTensor, started_s: float, error: BaseException | None) -> None:
        with self.changed:
            self._in_flight -= 1
            if error is None:
                tensor.become(Residency.CLEAN)
            else:
                tensor.become(Residency.STORED)
                self._give_up_frames(tensor)
                self._failure = self._failure or error
            self._notify()
        self._emit(EventKind.READ, tensor, started_s)

    def start_store(self, tensor: PagedTensor) -> None:
        """Begin copying a dirty tensor to its page-file frames, to fresh ones if it has none or a commit names them.

        Raises:
            DiskFullError: there is no room; the tensor is still dirty and whole.
        """
        with self.changed:
            if tensor.copy is None or tensor.copy.commits:
                fresh = self._take_frames(tensor)
                if tensor.copy is not None:
                    self.copies.leave(tensor.copy)
                tensor.copy = fresh
            tensor.become(Residency.STORING)
            tensor.backed = False
            self._in_flight += 1
            assert tensor.frame is not None
            buffer = self.arena.buffer(tensor.frame, tensor.n_bytes)
            started_s = time.perf_counter()
            self._begin(self.files.write, tensor.copy.route, buffer, lambda error: self._stored(tensor, started_s, error))

    def _stored(self, tensor: PagedTensor, started_s: float, error: BaseException | None) -> None:
        with self.changed:
            self._in_flight -= 1
            if error is None and not tensor.rewritten:
                tensor.backed = True
                tensor.become(Residency.CLEAN)
                self._pay(tensor)
            else:
                tensor.become(Residency.DIRTY)
                self._failure = self._failure or error
                if error is not None:
                    self._give_up_snapshot(error)
            tensor.rewritten = False
            self._notify()
        self._emit(EventKind.WRITE, tensor, started_s)

    def touch(self, tensor: PagedTensor) -> None:
        """Note that compute changed (or is about to change) the host copy, which must be readable and held.

        Raises:
            AssertionError: a snapshot has yet to get what was there; see `make_writable`.
        """
        with self.changed:
            if tensor.owed:
                raise AssertionError(f"{tensor.name} is changed while a snapshot waits for its content")
            if tensor.state is Residency.STORING:
                tensor.rewritten = True
                return
            if tensor.state is not Residency.DIRTY:
                tensor.become(Residency.DIRTY)
            tensor.backed = False

    def drop(self, tensor: PagedTensor) -> None:
        """Give up the host frames of a clean tensor that nobody holds.

        Raises:
            TransitionError: it is not clean; AssertionError: it is held. Nothing was changed.
        """
        with self.changed:
            if tensor.held:
                raise AssertionError(f"{tensor.name} is held ({tensor.pins} pins, {tensor.leases} leases), cannot drop it")
            if tensor.state is not Residency.CLEAN:
                raise TransitionError(f"{tensor.name}: {tensor.state.value} -> dropped is not a legal move: it is not clean")
            tensor.become(Residency.STORED if tensor.backed else Residency.ABSENT)
            self._give_up_frames(tensor)

    def discard(self, tensor: PagedTensor) -> None:
        """Declare the content dead: the next load reads zeros. Page-file frames stay the tensor's for re-use."""
        with self.changed:
            if tensor.state is Residency.ABSENT:
                return
            if tensor.held:
                raise AssertionError(f"{tensor.name} is held ({tensor.pins} pins, {tensor.leases} leases), cannot discard it")
            tensor.become(Residency.ABSENT)
            tensor.backed = False
            if tensor.frame is not None:
                self._give_up_frames(tensor)
            self._notify()

    # ---- waiting -----------------------------------------------------------------------------------------------

    def wait_until(
        self, ready: Callable[[], bool], why: str, n_bytes: int = 0, kind: EventKind = EventKind.WAIT
    ) -> None:
        """Block the calling thread until ``ready()``, and record the wait as an event of ``kind``.

        Raises:
            StorageError: (or what a background copy raised) instead of waiting for ever.
        """
        with self.changed:
            if ready():
                return
            started_s = time.perf_counter()
            while not ready():
                self.check()
                self.changed.wait()
        self._sink.emit(Event(kind, why, n_bytes, started_s, time.perf_counter() - started_s))

    def settle(self) -> None:
        """Wait until no copy is under way, also after an error."""
        with self.changed:
            while self._in_flight:
                self.changed.wait()

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

    def resize_arena(self, n_frames: int) -> None:
        """Go on with an empty arena of another size. Every tensor must be stored or absent.

        Raises:
            AssertionError: a tensor still holds host frames; nothing was changed.
            MemoryError: the arena cannot be mapped; there is none then.
        """
        with self.changed:
            if self.host.used_frames:
                raise AssertionError(f"{self.host.used_frames} host frames are still in use")
            # The old one goes first: a limit on memory need not hold both.
            self.arena.close()
            self.arena = HostArena(n_frames, self.arena.page_bytes)
            self.host = PageAllocator(Tier.HOST, self.arena.page_bytes, n_frames)
            self._n_set_aside = 0
            self.reset_touched()

    def reset_touched(self) -> None:
        """Count touched host frames anew, from those in use now."""
        with self.changed:
            self._touched = bytearray(self.arena.n_frames)
            for tensor in self.tensors.values():
                if tensor.frame is not None:
                    self._touched[tensor.frame : tensor.frame + tensor.n_frames] = b"\1" * tensor.n_frames

    @property
    def touched_frames(self) -> int:
        """Distinct host frames in use at any time since `reset_touched`."""
        return self._touched.count(1)

    def bandwidth(self) -> tuple[float, float]:
        """Bytes/s of the page files so far while they were reading, and while they were writing."""
        stats = self.files.stats()
        return _bytes_per_s(stats.bytes_read, stats.read_busy_s), _bytes_per_s(stats.bytes_written, stats.write_busy_s)

    def planned_page_file_frames(self, stored: Iterable[TensorId]) -> int:
        """Page-file frames in use once every tensor of ``stored`` has been stored, for the first time in that order."""
        with self.changed:
            new = [self.tensors[t] for t in dict.fromkeys(stored) if self.tensors[t].copy is None]
            return self.copies.used_frames_after(tensor.n_bytes for tensor in new)

    # ---- snapshots ---------------------------------------------------------------------------------------------

    def begin_snapshot(self, tensors: Iterable[PagedTensor]) -> Snapshot:
        """Begin to make what ``tensors`` hold now whole in the page files. Training thread, between two ops.

        Raises:
            DiskFullError: there is no room for it, and for all that will be stored beside it; nothing was changed.
            AssertionError: another one is being made, or a tensor is being used.
        """
        with self.changed:
            if self._snapshot is not None:
                raise AssertionError("a snapshot is being made already")
            whole = [t for t in tensors if t.state is not Residency.ABSENT]
            owing = [t for t in whole if t.state in (Residency.DIRTY, Residency.STORING)]
            if any(tensor.pins for tensor in owing):
                raise AssertionError("a snapshot inside an op")
            # Every copy that it names will have to be written elsewhere once its tensor has changed.
            self.copies.reserve(sum(tensor.n_frames for tensor in whole))
            snapshot = Snapshot(self.copies)
            for tensor in whole:
                if tensor.backed:
                    assert tensor.copy is not None
                    snapshot.add(tensor.id, tensor.copy)
            for tensor in sorted(owing, key=lambda t: t.last_use):
                tensor.owed = True
                snapshot.owing[tensor.id] = None
            snapshot.settle()
            if snapshot.owing:
                self._snapshot = snapshot
                self._store_owed()
            return snapshot

    def resume(self, tensor: PagedTensor, stored: StoredCopy | None) -> None:
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
                tensor.copy, tensor.backed = stored, True
                tensor.become(Residency.STORED)

    def make_writable(self, tensor: PagedTensor) -> None:
        """Before a tensor is changed: have a snapshot that waits for its content get it, and wait for that.

        Raises:
            StorageError: it could not be stored (or what else failed); the snapshot is given up.
        """
        with self.changed:
            if not tensor.owed:
                return
            if tensor.state is Residency.DIRTY:
                self.start_store(tensor)
            self.wait_until(lambda: not tensor.owed, f"commit of {tensor.name}", tensor.n_bytes)

    def _store_owed(self) -> None:
        """Keep a few stores for the snapshot under way."""
        snapshot = self._snapshot
        if snapshot is None or self._failure is not None:
            return
        owing = [self.tensors[tensor] for tensor in snapshot.owing]
        n_more = SNAPSHOT_STORES - sum(tensor.state is Residency.STORING for tensor in owing)
        for tensor in owing:
            if n_more > 0 and tensor.state is Residency.DIRTY:
                n_more -= 1
                self.start_store(tensor)

    def _pay(self, tensor: PagedTensor) -> None:
        snapshot = self._snapshot
        if not tensor.owed or snapshot is None:
            return
        assert tensor.copy is not None
        tensor.owed = False
        snapshot.add(tensor.id, tensor.copy)
        snapshot.settle()
        if not snapshot.owing:
            self._snapshot = None

    def abandon(self, snapshot: Snapshot) -> None:
        """Give a snapshot up, complete or not; nothing is owed to it any more."""
        with self.changed:
            if snapshot is self._snapshot:
                self._give_up_snapshot(None)
            else:
                snapshot.release()

    def _give_up_snapshot(self, error: BaseException | None) -> None:
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None:
            for tensor in snapshot.owing:
                self.tensors[tensor].owed = False
            snapshot.release(error)
            self.changed.notify_all()

    def validate(self) -> None:
        """Check every cross reference between records and allocators.

        Raises:
            AssertionError: one does not hold.
        """
        with self.changed:
            self.host.validate()
            self.ssd.validate()
            for tensor in self.tensors.values():
                placed = self.host.placement(tensor.id)
                if (placed is None) != (tensor.frame is None):
                    raise AssertionError(f"{tensor.name}: frame {tensor.frame} but host placement {placed}")
                in_host = tensor.readable or tensor.state is Residency.LOADING
                if in_host != (tensor.frame is not None):
                    raise AssertionError(f"{tensor.name}: {tensor.state.value} with frame {tensor.frame}")
                if tensor.state is Residency.STORED and not tensor.backed:
                    raise AssertionError(f"{tensor.name}: stored, but the page file does not hold it")

    # ---- inside ------------------------------------------------------------------------------------------------

    def _take_frames(self, tensor: PagedTensor) -> StoredCopy:
        try:
            return self.copies.take(tensor.n_bytes)
        except OffloadError as error:
            if tensor.owed:
                self._give_up_snapshot(error)
            raise

    def _begin(self, move: Callable[[Route, memoryview, Done], None], route: Route, buffer: memoryview, done: Done) -> None:
        try:
            move(route, buffer, done)
        except BaseException as error:
            # Refused before it began: whoever waits for it hears of it as of one that failed.
            done(error)

    def _give_up_frames(self, tensor: PagedTensor) -> None:
        self.host.release(tensor.id)
        tensor.frame = None

    def _notify(self) -> None:
        for listener in self._listeners:
            try:
                listener()
            except OffloadError as error:
                self._failure = self._failure or error
        self.changed.notify_all()

    def _emit(self, kind: EventKind, tensor: PagedTensor, started_s: float) -> None:
        self._sink.emit(Event(kind, tensor.name, tensor.n_bytes, started_s, time.perf_counter() - started_s))


def _bytes_per_s(n_bytes: int, busy_s: float) -> float:
    return n_bytes / busy_s if n_bytes >= TELLING_BYTES and busy_s else ASSUMED_BYTES_PER_S
