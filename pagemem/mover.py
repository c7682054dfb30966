"""Two-phase moves of paged tensors between host frames and page files.

A move is prepare (frames reserved, tensor in a state that forbids others to touch it) -> copy (I/O threads) -> complete
or abort. The source stays authoritative until the move completes, so a failed or cancelled move loses nothing.

One lock guards all bookkeeping, see `pagemem.monitor`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Final

import torch

from pagemem.allocator import PageAllocator
from pagemem.arena import Arena
from pagemem.copies import Copies, StoredCopy
from pagemem.errors import OffloadError, TransitionError
from pagemem.events import Event, EventKind, EventSink, Watcher
from pagemem.page import FrameId, Shortage, TensorId
from pagemem.page_file import PageFiles
from pagemem.page_requests import Route
from pagemem.page_transfer import Done
from pagemem.residency import PagedTensor, Residency
from pagemem.monitor import CopyMonitor
from pagemem.snapshot import Snapshots
from pagemem.tier import Tag, Tier
from pagemem.units import MiB
from pagemem.window import MANY_TENANTS, Comparable, Window, best_window, window_near

#: Bandwidth assumed until the page files have moved enough to tell, and how much is enough.
ASSUMED_BYTES_PER_S: Final = 1.5e9
TELLING_BYTES: Final = 16 * MiB


class Mover(CopyMonitor):
    """Owns the residency of every paged tensor of one host arena and one set of page files.

    Methods may be called on any thread unless they say otherwise; they take the lock themselves, and may be called
    with it held (it is re-entrant), which is how a caller makes several steps one.
    """

    #: The tier of the arena, and the budget that is too small when it is.
    tier: ClassVar[Tier] = Tier.HOST
    setting: ClassVar[str] = "memory.ram"

    def __init__(self, arena: Arena, files: PageFiles, sink: EventSink) -> None:
        super().__init__(sink)
        self.arena = arena
        self.files = files
        self.host = PageAllocator(self.tier, arena.page_bytes, arena.n_frames)
        self.copies = Copies(files, arena.page_bytes)
        self.tensors: dict[TensorId, PagedTensor] = {}
        self._next_id = 0
        self._expired: deque[PagedTensor] = deque()
        self._touched = bytearray(arena.n_frames)
        self._n_set_aside = 0
        self._by_use: dict[TensorId, None] = {}  # what has host frames, the least recently used first
        self.snapshots = Snapshots(
            self.tensors, self.copies, lambda tensor: self.start_store(tensor, background=True)
        )
        self.on_change(self.snapshots.store_owed)

    @property
    def ssd(self) -> PageAllocator:
        """Who holds which frame of the page files."""
        return self.copies.book

    def watch(self, watcher: Watcher | None) -> dict[tuple[Tier, Tag], int]:
        """Tell ``watcher`` (None: nobody) of every change of what tensors hold from now on; returns what they hold then.

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

    def expire(self, tensor: PagedTensor) -> None:
        """Have a tensor's content discarded before the next op. Any thread, also finalizers: it is only noted down."""
        self._expired.append(tensor)

    def end_expiry(self, tensor: PagedTensor) -> None:
        """Discard a tensor now if it has expired, waiting for a copy under way: it may be created anew then."""
        with self.changed:
            if tensor in self._expired:
                self._expired.remove(tensor)
                self.wait_until(lambda: tensor.state not in (Residency.LOADING, Residency.STORING), tensor.name, tensor.n_bytes)
                self.discard(tensor)

    def _discard_expired(self) -> list[PagedTensor]:
        discarded: list[PagedTensor] = []
        for _ in range(len(self._expired)):
            tensor = self._expired.popleft()
            if tensor.held or tensor.state in (Residency.LOADING, Residency.STORING):
                self._expired.append(tensor)
            else:
                self.discard(tensor)
                discarded.append(tensor)
        return discarded

    def collect_leases(self) -> list[PagedTensor]:
        """Count ended leases off and discard what has expired; returns tensors that nobody has views of, or a use for, any more.

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
                    if tensor.exposed and tensor.readable:
                        self.make_writable(tensor)
                        self.touch(tensor)
                    tensor.exposed = False
            return freed

    def droppable(self, tensor_id: TensorId) -> bool:
        """Whether the tensor's host frames can be given up after at most one store."""
        tensor = self.tensors[tensor_id]
        return not tensor.held and not tensor.uploads and tensor.state in (Residency.CLEAN, Residency.DIRTY)

    def choose(
        self,
        n_frames: int,
        cost: Callable[[Sequence[TensorId]], Comparable],
        bound: Callable[[TensorId], Comparable] | None = None,
    ) -> Window | None:
        """The cheapest window of host frames whose tenants are all droppable, or None.

        Args:
            bound: what a window with this tenant costs at least, more for those used later; given, windows are looked for near
                the least recently used tenants if there are very many.
        """
        with self.changed:
            if bound is not None and len(self.host) > MANY_TENANTS:
                near = window_near(self.host, n_frames, self._by_use, self.droppable, cost, bound, self.n_shared_frames)
                if near is not None:
                    return near
            return best_window(list(self.host.segments(0, self.n_shared_frames)), n_frames, self.droppable, cost)

    def used(self, tensor: PagedTensor, number: int) -> None:
        """Note the use of a tensor in host frames; uses are numbered."""
        with self.changed:
            tensor.last_use = number
            self._by_use.pop(tensor.id, None)
            self._by_use[tensor.id] = None

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

    def start_load(
        self, tensor: PagedTensor, frame: FrameId, *, fresh: bool = False, background: bool = False
    ) -> None:
        """Begin bringing an absent or stored tensor into the free frames from ``frame`` on.

        With ``fresh`` the old content is not wanted: nothing is read and the frames hold whatever was there. A
        ``background`` copy gives way to others.

        Raises:
            AssertionError: a frame is taken; nothing was changed.
        """
        with self.changed:
            placed = self.host.allocate(tensor.id, tensor.n_bytes, contiguous=True, at=frame)
            if isinstance(placed, Shortage):
                raise AssertionError(f"{tensor.name}: frames {frame}..{frame + tensor.n_frames} are taken")
            tensor.frame = frame
            self._by_use[tensor.id] = None
            if self.watcher is not None:
                self.watcher.held(self.tier, tensor.tag, tensor.n_frames * self.arena.page_bytes)
            self._touched[frame : frame + tensor.n_frames] = b"\1" * tensor.n_frames
            if fresh or tensor.state is Residency.ABSENT:
                if not fresh:
                    self.arena.view(frame, 0, torch.uint8, tensor.n_bytes).zero_()
                tensor.backed = tensor.backed and not fresh
                tensor.become(Residency.CLEAN)
                self._notify()
                return
            tensor.become(Residency.LOADING)
            self._begun()
            started_s = time.perf_counter()
            self._read(tensor, lambda error: self._loaded(tensor, started_s, error), background=background)

    def _read(self, tensor: PagedTensor, done: Done, *, background: bool) -> None:
        """Begin to fill a tensor's frames from the tier below."""
        assert tensor.copy is not None and tensor.frame is not None
        buffer = self.arena.buffer(tensor.frame, tensor.n_bytes)
        self._begin(self.files.read, tensor.copy.route, buffer, done, background)

    def take_back_load(self, tensor: PagedTensor) -> bool:
        """Undo a load whose copy has not begun; returns whether it was one. Reads of page files cannot be undone."""
        return False

    def _loaded(self, tensor: PagedTensor, started_s: float, error: BaseException | None) -> None:
        with self.changed:
            self._ended(error)
            if error is None:
                tensor.become(Residency.CLEAN)
            else:
                tensor.become(Residency.STORED)
                self._give_up_frames(tensor)
            self._notify()
        self._emit(EventKind.READ, tensor, started_s)

    def start_store(self, tensor: PagedTensor, *, background: bool = False) -> None:
        """Begin copying a dirty tensor to its page-file frames, to fresh ones if it has none or a commit names them.

        A ``background`` copy gives way to others.

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
            self._begun()
            assert tensor.frame is not None
            buffer = self.arena.buffer(tensor.frame, tensor.n_bytes)
            started_s = time.perf_counter()
            self._begin(self.files.write, tensor.copy.route, buffer, lambda error: self._stored(tensor, started_s, error), background)

    def _stored(self, tensor: PagedTensor, started_s: float, error: BaseException | None) -> None:
        with self.changed:
            self._ended(error)
            if error is None and not tensor.rewritten:
                tensor.backed = True
                tensor.become(Residency.CLEAN)
                self.snapshots.paid(tensor)
            else:
                tensor.become(Residency.DIRTY)
                if error is not None:
                    self.snapshots.give_up(error)
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

    def drop(self, tensor: PagedTensor) -> None:
        """Give up the host frames of a clean tensor that nobody holds.

        Raises:
            TransitionError: it is not clean; AssertionError: it is held. Nothing was changed.
        """
        with self.changed:
            if tensor.held or tensor.uploads:
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
            if tensor.held or tensor.uploads:
                raise AssertionError(f"{tensor.name} is held ({tensor.pins} pins, {tensor.leases} leases), cannot discard it")
            tensor.become(Residency.ABSENT)
            tensor.backed = False
            if tensor.frame is not None:
                self._give_up_frames(tensor)
            self._notify()

    def begin_upload(self, tensor: PagedTensor) -> torch.Tensor:
        """The bytes of a readable tensor, uint8, which stay as they are until `end_upload`."""
        with self.changed:
            assert tensor.readable and tensor.frame is not None
            tensor.uploads += 1
            self._begun()
            return self.arena.view(tensor.frame, 0, torch.uint8, tensor.n_bytes)

    def end_upload(self, tensor: PagedTensor) -> None:
        """The bytes that `begin_upload` gave are not looked at any more."""
        with self.changed:
            tensor.uploads -= 1
            self._ended(None)
            self._notify()

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
            self.arena = self.arena.resized(n_frames)
            self.host = PageAllocator(self.tier, self.arena.page_bytes, n_frames)
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
            return self.copies.take(tensor.n_bytes, tensor.tag)
        except OffloadError as error:
            if tensor.owed:
                self.snapshots.give_up(error)
            raise

    def _begin(
        self, move: Callable[..., None], route: Route, buffer: memoryview, done: Done, background: bool
    ) -> None:
        try:
            move(route, buffer, done, background=background)
        except BaseException as error:
            # Refused before it began: whoever waits for it hears of it as of one that failed.
            done(error)

    def _give_up_frames(self, tensor: PagedTensor) -> None:
        self.host.release(tensor.id)
        self._by_use.pop(tensor.id, None)
        tensor.frame = None
        if self.watcher is not None:
            self.watcher.held(self.tier, tensor.tag, -tensor.n_frames * self.arena.page_bytes)

    def _emit(self, kind: EventKind, tensor: PagedTensor, started_s: float) -> None:
        self._sink.emit(Event(kind, tensor.name, tensor.n_bytes, started_s, time.perf_counter() - started_s))


def _bytes_per_s(n_bytes: int, busy_s: float) -> float:
    return n_bytes / busy_s if n_bytes >= TELLING_BYTES and busy_s else ASSUMED_BYTES_PER_S
