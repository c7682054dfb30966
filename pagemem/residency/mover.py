"""Residency of paged tensors in one arena: records, loads, drops, and when content expires.

A move is prepare (frames reserved, tensor in a state that forbids others to touch it) -> copy (I/O threads) -> complete
or abort. The source stays authoritative until the move completes, so a failed or cancelled move loses nothing. What is
below the arena, page files or host memory, is known to `pagemem.residency.host_mover` and
`pagemem.residency.device_mover`. One lock guards all bookkeeping, see `pagemem.residency.monitor`.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

import torch

from pagemem.devices.arena import Arena
from pagemem.errors import TransitionError
from pagemem.files.transfer import Completion
from pagemem.frames.page import FrameId, TensorId
from pagemem.process.gone import Gone
from pagemem.residency.gathered import GatheredTensors
from pagemem.residency.monitor import CopyMonitor
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.residency.tenants import Tenants
from pagemem.telemetry.events import EventSink
from pagemem.telemetry.recorder import Recorder
from pagemem.tier import Tag, Tier


class Mover(ABC):
    """Owns the residency of every paged tensor of one arena.

    Methods may be called on any thread unless they say otherwise; they take the lock themselves, and may be called
    with it held (it is re-entrant), which is how a caller makes several steps one.

    Attributes:
        tensors: every record.
        monitor: copies under way, waits for them and their errors; ``changed`` is its lock.
        tenants: who has which frames; ``arena`` and ``host`` are its arena and allocator.
        gathered: those of the tensors that are gathered from the shards of all ranks.
    """

    #: The tier of the arena, and the budget that is too small when it is.
    tier: ClassVar[Tier]
    setting: ClassVar[str]

    def __init__(self, arena: Arena, sink: EventSink) -> None:
        self.monitor = CopyMonitor(sink, f"{self.tier.value} pages")
        self.changed = self.monitor.changed
        self.tensors: dict[TensorId, PagedTensor] = {}
        self._ids = itertools.count()
        self._expired: deque[PagedTensor] = deque()
        self._expiring: Gone[Iterable[PagedTensor]] = Gone()
        self.gathered = GatheredTensors(self)
        self._use(Tenants(arena, self.tier, self.tensors))

    def _use(self, tenants: Tenants) -> None:
        self.tenants, self.arena, self.host = tenants, tenants.arena, tenants.host

    def replace_arena(self, make: Callable[[], Arena]) -> None:
        """Go on with an empty arena of another size; the one before is closed. Every tensor must be stored or absent.

        Raises:
            AssertionError: a tensor still holds frames; nothing was changed.
            MemoryError: the arena cannot be mapped; there is none then.
        """
        with self.changed:
            if self.host.used_frames:
                raise AssertionError(f"{self.host.used_frames} host frames are still in use")
            self.arena.close()  # first: a limit on memory need not hold both
            self._use(Tenants(make(), self.tier, self.tensors))

    def watch(self, watcher: Recorder | None) -> dict[tuple[Tier, Tag], int]:
        """Tell ``watcher`` (None: nobody) of every change of what tensors hold from now on; returns what they hold
        then: in an arena whole frames, in page files the bytes of copies."""
        with self.changed:
            self.monitor.watcher = watcher
            found = Counter[tuple[Tier, Tag]]()
            for tensor in self.tensors.values():
                if tensor.frame is not None:
                    found[self.tier, tensor.tag] += tensor.n_frames * self.arena.page_bytes
            return dict(found)

    @abstractmethod
    def _read(self, tensor: PagedTensor, done: Completion, *, background: bool) -> None:
        """Begin to fill a tensor's frames from the tier below."""

    @abstractmethod
    def _loaded(self, tensor: PagedTensor, started_s: float, error: BaseException | None) -> None:
        """A load that began at ``started_s`` has ended; see `_end_load`."""

    @abstractmethod
    def take_back_load(self, tensor: PagedTensor) -> bool:
        """Undo a load whose copy has not begun; returns whether it was one."""

    @abstractmethod
    def start_store(self, tensor: PagedTensor, *, background: bool = False) -> None:
        """Begin to bring what a dirty tensor has to the tier below. A ``background`` copy gives way to others."""

    @abstractmethod
    def bandwidth(self) -> tuple[float, float]:
        """Bytes/s from the tier below so far, and to it."""

    # ---- records -----------------------------------------------------------------------------------------------

    def create(self, name: str, tag: Tag, n_bytes: int) -> PagedTensor:
        """A new tensor that reads as zeros and holds no bytes in any tier yet."""
        with self.changed:
            number = TensorId(next(self._ids))
            return self.tensors.setdefault(number, PagedTensor.sized(number, name, tag, n_bytes, self.arena.page_bytes))

    def expire_with(self, thing: object, tensors: Iterable[PagedTensor]) -> None:
        """Have the content of tensors discarded before the next op after ``thing`` is gone: of those that ``tensors``
        has then."""
        self._expiring.watch(thing, tensors)

    def _note_expired(self) -> None:
        for tensors in self._expiring.take():
            self._expired.extend(tensors)

    def end_expiry(self, tensor: PagedTensor) -> None:
        """Discard a tensor now if it has expired, waiting for a copy under way: it may be created anew then."""
        with self.changed:
            # It counts as expired as long as it is waited for: whoever looks meanwhile must not take it for what is to
            # come.
            self.monitor.wait_until(lambda: not (self.expires(tensor) and tensor.busy), tensor.name, tensor.n_bytes)
            self.discard_if_expired(tensor)

    def _discard_expired(self) -> list[PagedTensor]:
        self._note_expired()
        discarded: list[PagedTensor] = []
        for _ in range(len(self._expired)):
            tensor = self._expired.popleft()
            if tensor.held or tensor.busy:
                self._expired.append(tensor)
            else:
                self.discard(tensor)
                discarded.append(tensor)
        return discarded

    def discard_soon(self, tensor: PagedTensor) -> None:
        """Discard a tensor now, or once what is moving it, or holding it, lets go of it. Does not wait."""
        with self.changed:
            self._expired.append(tensor)
            self.discard_if_expired(tensor)

    def expires(self, tensor: PagedTensor) -> bool:
        """Whether what there is of a tensor is about to be discarded."""
        self._note_expired()
        return tensor in self._expired

    def discard_if_expired(self, tensor: PagedTensor) -> None:
        """Discard a tensor at once that was noted down as expired, if nothing speaks against it."""
        if self.expires(tensor) and not (tensor.held or tensor.busy):
            self._expired.remove(tensor)
            self.discard(tensor)

    def discard(self, tensor: PagedTensor) -> None:
        """Declare the content dead: the next load reads zeros. Page-file frames stay the tensor's for re-use."""
        with self.changed:
            if tensor.state is Residency.ABSENT:
                return
            if self.gathered.discards(tensor):
                return
            tensor.refuse_held("discard")
            tensor.become(Residency.ABSENT)
            tensor.ssd_valid = False
            if tensor.frame is not None:
                self._move_out(tensor)
            self.monitor.notify()

    def drop(self, tensor: PagedTensor) -> None:
        """Give up the host frames of a clean tensor that nobody holds.

        Raises:
            TransitionError: it is not clean; AssertionError: it is held. Nothing was changed.
        """
        with self.changed:
            tensor.refuse_held("drop")
            if tensor.state is not Residency.CLEAN:
                state = tensor.state.value
                raise TransitionError(f"{tensor.name}: {state} -> dropped is not a legal move: it is not clean")
            tensor.become(Residency.STORED if tensor.ssd_valid else Residency.ABSENT)
            self._move_out(tensor)

    def forget(self, tensor: PagedTensor) -> None:
        """Discard a tensor and give all its frames back. It must be neither held nor in flight."""
        with self.changed:
            self.discard(tensor)
            self.gathered.forget(tensor)
            del self.tensors[tensor.id]

    def lease(self, tensor: PagedTensor, offset_bytes: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """A flat view of a pinned tensor, which stays where it is until the view's last alias is gone."""
        assert tensor.frame is not None
        tensor.leases += 1
        return self.arena.lease(tensor.id, tensor.frame, offset_bytes, dtype, numel)

    def collect_leases(self) -> list[PagedTensor]:
        """Count ended leases off and discard what has expired; returns tensors that nobody has views of, or a use for,
        any more.

        Until then an exposed tensor may have been written to, whatever was stored of it meanwhile.
        """
        with self.changed:
            freed = self._discard_expired()
            for tensor in map(self.tensors.get, self.arena.ended_leases()):
                if tensor is None:
                    continue
                tensor.leases -= 1
                if tensor.leases == 0:
                    freed.append(tensor)
                    tensor.note_writes()
                    aliased = tensor.may_be_aliased and tensor.readable
                    if aliased and not self.gathered.note_write(tensor):
                        self.make_writable(tensor)
                        self.touch(tensor)
                    tensor.may_be_aliased, tensor.written = False, None
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
                if fresh:
                    tensor.ssd_valid, tensor.origin = False, None
                else:
                    self.tenants.bytes_of(tensor).zero_()
                tensor.become(Residency.CLEAN)
                self.monitor.notify()
            elif tensor.id in self.gathered:
                ended = Completion(partial(self._end_load, tensor))
                self._begin(tensor, Residency.LOADING, ended, self.gathered.fill)
            else:
                done = Completion(partial(self._loaded, tensor, time.perf_counter()))
                self._begin(tensor, Residency.LOADING, done, partial(self._read, background=background))

    def _begin(
        self, tensor: PagedTensor, state: Residency, done: Completion, move: Callable[[PagedTensor, Completion], None]
    ) -> None:
        """Change a tensor's state and begin what ends it again, by ``done``, once, whatever is raised here."""
        self.monitor.in_flight += 1
        moving = False
        try:
            tensor.become(state)
            moving = True
            move(tensor, done)
        except BaseException as error:
            if done.begun:
                raise  # It goes on: a signal's handler has raised behind it.
            if not moving:
                self.monitor.ended(None)
                raise
            # Refused before it began: whoever waits for it hears of it as of one that failed.
            done(error)
            if not isinstance(error, Exception):
                self.monitor.forget_failure(error)
                raise

    def _end_load(self, tensor: PagedTensor, error: BaseException | None, *, rewrite: bool = False) -> None:
        """A load has ended, for good or bad. With the lock held.

        Args:
            rewrite: what came is whole, but is to be written anew below.
        """
        self.monitor.ended(None if tensor.tentative else error)
        tensor.tentative = False
        if error is None:
            tensor.become(Residency.CLEAN)
            if rewrite:
                self.touch(tensor)
        else:
            tensor.become(Residency.STORED)
            self._move_out(tensor)
        self.monitor.notify()

    def _move_in(self, tensor: PagedTensor, frame: FrameId) -> None:
        self.tenants.move_in(tensor, frame)
        if self.monitor.watcher is not None:
            self.monitor.watcher.held(self.tier, tensor.tag, tensor.n_frames * self.arena.page_bytes)

    def _move_out(self, tensor: PagedTensor) -> None:
        self.tenants.move_out(tensor)
        if self.monitor.watcher is not None:
            self.monitor.watcher.held(self.tier, tensor.tag, -tensor.n_frames * self.arena.page_bytes)

    def touch(self, tensor: PagedTensor) -> None:
        """Note that compute changed (or is about to change) the host copy, which must be readable and held.

        Raises:
            AssertionError: a snapshot has yet to get what was there; see `make_writable`.
        """
        with self.changed:
            if tensor.snapshot_pending:
                raise AssertionError(f"{tensor.name} is changed while a snapshot waits for its content")
            self.gathered.changed(tensor)
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
            self.monitor.wait_until(lambda: not tensor.snapshot_pending, f"commit of {tensor.name}", tensor.n_bytes)

    def store_all(self) -> None:
        """Copy every dirty tensor to the page files and wait for it.

        Raises:
            OffloadError: a copy failed or there is no room; what was not copied is still dirty and whole.
        """
        self.monitor.settle()
        with self.changed:
            for tensor in self.tensors.values():
                if tensor.state is Residency.DIRTY:
                    self.start_store(tensor)
        self.monitor.settle()
        self.monitor.check()

    def close(self) -> None:
        """As `CopyMonitor.close`. Idempotent."""
        self.monitor.close()
