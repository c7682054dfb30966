"""Which paged tensor has which frames of one arena. Nothing is copied here.

A tensor that has frames is their *tenant*. Which tenants are to make room for another tensor is a question of cost, and
whoever asks says what that is. Guarded by the mover's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from pagemem import knobs
from pagemem.devices.arena import Arena
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import FrameId, Shortage, TensorId
from pagemem.frames.window import Comparable, Window, best_window, window_near
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.tier import Tier


class Tenants:
    """Frames of one arena and the tensors in them.

    Args:
        tier: of the arena.
        tensors: every record, by id.

    Attributes:
        host: who has which frame of ``arena``.
        latest_use: number of the latest use.
    """

    def __init__(self, arena: Arena, tier: Tier, tensors: Mapping[TensorId, PagedTensor]) -> None:
        self.arena = arena
        self.host = PageAllocator(tier, arena.page_bytes, arena.n_frames)
        self._tensors = tensors
        self._touched = bytearray(arena.n_frames)
        self._n_set_aside = 0
        self.latest_use = 0
        self._by_use: dict[TensorId, None] = {}  # tenants, the least recently used first

    def droppable(self, tensor_id: TensorId) -> bool:
        """Whether the tensor's host frames can be given up after at most one store."""
        tensor = self._tensors[tensor_id]
        free = not tensor.held and tensor.kept_at is None and not tensor.uploads
        return free and tensor.state in (Residency.CLEAN, Residency.DIRTY)

    def choose(
        self,
        n_frames: int,
        cost: Callable[[Sequence[TensorId]], Comparable],
        bound: Callable[[TensorId], Comparable] | None = None,
        movable: Callable[[TensorId], bool] | None = None,
    ) -> Window | None:
        """The cheapest window of host frames whose tenants may all leave, or None.

        Args:
            bound: what a window with this tenant costs at least, more for those used later; given, windows are looked
                for near the least recently used tenants if there are very many.
            movable: whether a tenant may leave; None: if it is droppable.
        """
        movable = movable or self.droppable
        if bound is not None and len(self.host.placements) > knobs.MANY_TENANTS:
            near = window_near(self.host, n_frames, self._by_use, movable, cost, bound, self.n_shared_frames)
            if near is not None:
                return near
        return best_window(list(self.host.segments(0, self.n_shared_frames)), n_frames, movable, cost)

    def used(self, tensor: PagedTensor, number: int) -> None:
        """Note the use of a tensor in host frames; uses are numbered."""
        tensor.last_use = self.latest_use = number
        self._by_use.pop(tensor.id, None)
        self._by_use[tensor.id] = None

    def by_use(self) -> list[TensorId]:
        """Tenants, the least recently used first."""
        return list(self._by_use)

    @property
    def n_shared_frames(self) -> int:
        """Host frames that whoever needs one may use, from the first on; those above have an owner, see `set_aside`."""
        return self.arena.n_frames - self._n_set_aside

    def set_aside(self, n_frames: int) -> FrameId:
        """Keep the last ``n_frames`` host frames for an owner that places tensors in them itself; returns the first.

        Raises:
            AssertionError: they are in use, or there are not as many; nothing was changed.
        """
        first = self.arena.n_frames - n_frames
        if (
            n_frames < 0
            or first < 0
            or any(self.host.owner(frame) is not None for frame in range(first, self.arena.n_frames))
        ):
            raise AssertionError(f"the last {n_frames} of {self.arena.n_frames} host frames are not free")
        self._n_set_aside = n_frames
        return FrameId(first)

    def reset_touched(self) -> None:
        """Count touched host frames anew, from those in use now."""
        self._touched = bytearray(self.arena.n_frames)
        for tensor in self._tensors.values():
            if tensor.frame is not None:
                self._touched[tensor.frame : tensor.frame + tensor.n_frames] = b"\1" * tensor.n_frames

    @property
    def touched_frames(self) -> int:
        """Distinct host frames in use at any time since `reset_touched`."""
        return self._touched.count(1)

    def bytes_of(self, tensor: PagedTensor) -> torch.Tensor:
        """The bytes of a tensor that has frames, uint8, flat."""
        return self.view(tensor, torch.uint8, 0, tensor.n_bytes)

    def view(self, tensor: PagedTensor, dtype: torch.dtype, begin: int, numel: int) -> torch.Tensor:
        """Elements [begin, begin + numel) of a tensor that has frames, flat, for use while they are pinned."""
        assert tensor.frame is not None
        return self.arena.view(tensor.frame, begin * dtype.itemsize, dtype, numel)

    def move_in(self, tensor: PagedTensor, frame: FrameId) -> None:
        """Make a tensor the tenant of the free frames from ``frame`` on.

        Raises:
            AssertionError: one is taken; nothing was changed.
        """
        placed = self.host.allocate(tensor.id, tensor.n_bytes, at=frame)
        if isinstance(placed, Shortage):
            raise AssertionError(f"{tensor.name}: frames {frame}..{frame + tensor.n_frames} are taken")
        tensor.frame = frame
        self._by_use[tensor.id] = None
        self._touched[frame : frame + tensor.n_frames] = b"\1" * tensor.n_frames

    def move_out(self, tensor: PagedTensor) -> None:
        """Have a tenant's frames free."""
        self.host.release(tensor.id)
        self._by_use.pop(tensor.id, None)
        tensor.frame = None
