"""The paged tensors of one arena, and which of its frames each one has. Nothing is copied here.

A tensor that has frames is their *tenant*. Tenants leave when they are dropped (the content is whole in the tier below)
or discarded (the content is dead). Which tenants are to make room for another tensor is a question of cost, and whoever
asks says what that is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch

from pagemem.devices.arena import Arena
from pagemem.errors import TransitionError
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import FrameId, Shortage, TensorId
from pagemem.frames.window import MANY_TENANTS, Comparable, Window, best_window, window_near
from pagemem.process.gone import Gone
from pagemem.residency.monitor import CopyMonitor
from pagemem.residency.paged_tensor import IN_FLIGHT, PagedTensor, Residency
from pagemem.telemetry.events import EventSink
from pagemem.tier import Tag, Tier


class Tenants(CopyMonitor):
    """Records of paged tensors and of the frames they have. Any thread, as `pagemem.residency.monitor.CopyMonitor`.

    Attributes:
        host: who has which frame of ``arena``.
        tensors: every record.
    """

    #: The tier of the arena, and the budget that is too small when it is.
    tier: ClassVar[Tier] = Tier.HOST
    setting: ClassVar[str] = "memory.ram"

    def __init__(self, arena: Arena, sink: EventSink) -> None:
        super().__init__(sink)
        self.arena = arena
        self.host = PageAllocator(self.tier, arena.page_bytes, arena.n_frames)
        self.tensors: dict[TensorId, PagedTensor] = {}
        self._next_id = 0
        self._expired: deque[PagedTensor] = deque()
        self._bound: Gone[Iterable[PagedTensor]] = Gone()
        self._touched = bytearray(arena.n_frames)
        self._n_set_aside = 0
        self._by_use: dict[TensorId, None] = {}  # tenants, the least recently used first

    # ---- records -----------------------------------------------------------------------------------------------

    def create(self, name: str, tag: Tag, n_bytes: int) -> PagedTensor:
        """A new tensor that reads as zeros and holds no bytes in any tier yet."""
        with self.changed:
            tensor = PagedTensor.sized(TensorId(self._next_id), name, tag, n_bytes, self.arena.page_bytes)
            self._next_id += 1
            self.tensors[tensor.id] = tensor
            return tensor

    def expire_with(self, thing: object, tensors: Iterable[PagedTensor]) -> None:
        """Have the content of tensors discarded before the next op after ``thing`` is gone: of those that ``tensors``
        has then."""
        self._bound.watch(thing, tensors)

    def _note_expired(self) -> None:
        for tensors in self._bound.take():
            self._expired.extend(tensors)

    def end_expiry(self, tensor: PagedTensor) -> None:
        """Discard a tensor now if it has expired, waiting for a copy under way: it may be created anew then."""
        with self.changed:
            # It counts as expired as long as it is waited for: whoever looks meanwhile must not take it for what is to
            # come.
            self.wait_until(lambda: not (self.expires(tensor) and tensor.moving), tensor.name, tensor.n_bytes)
            self._discard_if_expired(tensor)

    def _discard_expired(self) -> list[PagedTensor]:
        self._note_expired()
        discarded: list[PagedTensor] = []
        for _ in range(len(self._expired)):
            tensor = self._expired.popleft()
            if tensor.held or tensor.moving:
                self._expired.append(tensor)
            else:
                self.discard(tensor)
                discarded.append(tensor)
        return discarded

    def discard_soon(self, tensor: PagedTensor) -> None:
        """Discard a tensor now, or once what is moving it, or holding it, lets go of it. Does not wait."""
        with self.changed:
            self._expired.append(tensor)
            self._discard_if_expired(tensor)

    def expires(self, tensor: PagedTensor) -> bool:
        """Whether what there is of a tensor is about to be discarded."""
        self._note_expired()
        return tensor in self._expired

    def _discard_if_expired(self, tensor: PagedTensor) -> None:
        """Discard a tensor at once that was noted down as expired, if nothing speaks against it."""
        if self.expires(tensor) and not tensor.held and not tensor.moving:
            self._expired.remove(tensor)
            self.discard(tensor)

    def discard(self, tensor: PagedTensor) -> None:
        """Declare the content dead: the next load reads zeros. Page-file frames stay the tensor's for re-use."""
        with self.changed:
            if tensor.state is Residency.ABSENT:
                return
            if tensor.held or tensor.uploads:
                raise AssertionError(
                    f"{tensor.name} is held ({tensor.pins} pins, {tensor.leases} leases), cannot discard it"
                )
            tensor.become(Residency.ABSENT)
            tensor.ssd_valid = False
            if tensor.frame is not None:
                self._move_out(tensor)
            self._notify()

    def drop(self, tensor: PagedTensor) -> None:
        """Give up the host frames of a clean tensor that nobody holds.

        Raises:
            TransitionError: it is not clean; AssertionError: it is held. Nothing was changed.
        """
        with self.changed:
            if tensor.held or tensor.uploads:
                raise AssertionError(
                    f"{tensor.name} is held ({tensor.pins} pins, {tensor.leases} leases), cannot drop it"
                )
            if tensor.state is not Residency.CLEAN:
                raise TransitionError(
                    f"{tensor.name}: {tensor.state.value} -> dropped is not a legal move: it is not clean"
                )
            tensor.become(Residency.STORED if tensor.ssd_valid else Residency.ABSENT)
            self._move_out(tensor)

    # ---- frames ------------------------------------------------------------------------------------------------

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
            bound: what a window with this tenant costs at least, more for those used later; given, windows are looked
                for near the least recently used tenants if there are very many.
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
            if (
                n_frames < 0
                or first < 0
                or any(self.host.owner(frame) is not None for frame in range(first, self.arena.n_frames))
            ):
                raise AssertionError(f"the last {n_frames} of {self.arena.n_frames} host frames are not free")
            self._n_set_aside = n_frames
            return FrameId(first)

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

    def bytes_of(self, tensor: PagedTensor) -> torch.Tensor:
        """The bytes of a tensor that has frames, uint8, flat."""
        assert tensor.frame is not None
        return self.arena.view(tensor.frame, 0, torch.uint8, tensor.n_bytes)

    def _move_in(self, tensor: PagedTensor, frame: FrameId) -> None:
        """Make a tensor the tenant of the free frames from ``frame`` on.

        Raises:
            AssertionError: one is taken; nothing was changed.
        """
        placed = self.host.allocate(tensor.id, tensor.n_bytes, contiguous=True, at=frame)
        if isinstance(placed, Shortage):
            raise AssertionError(f"{tensor.name}: frames {frame}..{frame + tensor.n_frames} are taken")
        tensor.frame = frame
        self._by_use[tensor.id] = None
        if self.watcher is not None:
            self.watcher.held(self.tier, tensor.tag, tensor.n_frames * self.arena.page_bytes)
        self._touched[frame : frame + tensor.n_frames] = b"\1" * tensor.n_frames

    def _move_out(self, tensor: PagedTensor) -> None:
        """Have a tenant's frames free."""
        self.host.release(tensor.id)
        self._by_use.pop(tensor.id, None)
        tensor.frame = None
        if self.watcher is not None:
            self.watcher.held(self.tier, tensor.tag, -tensor.n_frames * self.arena.page_bytes)

    def validate(self) -> None:
        """Check every cross reference between records and the allocator.

        Raises:
            AssertionError: one does not hold.
        """
        with self.changed:
            self.host.validate()
            for tensor in self.tensors.values():
                placed = self.host.placement(tensor.id)
                if (placed is None) != (tensor.frame is None):
                    raise AssertionError(f"{tensor.name}: frame {tensor.frame} but host placement {placed}")
                in_host = tensor.readable or tensor.state in IN_FLIGHT
                if in_host != (tensor.frame is not None):
                    raise AssertionError(f"{tensor.name}: {tensor.state.value} with frame {tensor.frame}")
