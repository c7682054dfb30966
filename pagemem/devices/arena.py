"""A tier's memory: one stretch of addresses cut into frames, and leases that say when a view of it is dead.

A *lease* is a view of the arena that somebody else may keep: a bound parameter, a weight saved by autograd. The arena
learns of its death from the storage's own reference count, so it holds for every alias (views, detached tensors, saved
tensors) however it was made, and frames with a living alias are never reused. Bookkeeping of the frames is the
allocator's; who may move what is the mover's.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from pagemem.frames.page import FrameId, TensorId
from pagemem.process.gone import Gone

#: Makes so many bytes from an address on fit for copies by a device; returns what undoes that.
Pin = Callable[[int, int], Callable[[], None]]


class Arena(ABC):
    """``n_frames`` frames of ``page_bytes`` bytes. Views may be made on any thread.

    Attributes:
        address: of the first byte.
    """

    address: int

    def __init__(self, n_frames: int, page_bytes: int) -> None:
        self.n_frames = n_frames
        self.page_bytes = page_bytes
        self.n_bytes = n_frames * page_bytes
        self._watched: Gone[TensorId] = Gone()

    @abstractmethod
    def buffer(self, frame: FrameId, n_bytes: int) -> memoryview:
        """The bytes from the start of ``frame`` on, for I/O. The caller keeps the frames pinned while it is used.

        Raises:
            TypeError: it is the memory of a device, which I/O does not reach.
        """

    @abstractmethod
    def view(self, frame: FrameId, offset_bytes: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """A flat tensor over ``numel`` elements, for use inside one pinned operation; its life is not tracked."""

    @abstractmethod
    def lease(
        self, tensor: TensorId, frame: FrameId, offset_bytes: int, dtype: torch.dtype, numel: int
    ) -> torch.Tensor:
        """A flat tensor whose last alias's death is reported by `ended_leases`. The caller counts it as begun."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back, at once when no lease lives, else when the last one ends. Idempotent."""

    def ended_leases(self) -> list[TensorId]:
        """Tensors of the leases that ended since the last call, once per lease."""
        return self._watched.take()

    def locate(self, tensor: torch.Tensor) -> tuple[FrameId, int] | None:
        """Frame and offset in it of a tensor's first element, or None when it lies outside the arena."""
        distance = tensor.data_ptr() - self.address
        if 0 <= distance < self.n_bytes:
            return FrameId(distance // self.page_bytes), distance % self.page_bytes
        return None


class HostArena(Arena):
    """Frames in one private anonymous mapping.

    The mapping is charged whole against RLIMIT_DATA when it is made; resident memory grows as frames are touched, or is
    all there at once where it is pinned.

    Args:
        pin: see `pin`; None: not now.

    Raises:
        MemoryError: the mapping was refused (RLIMIT_DATA, overcommit); the message names the size.
    """

    def __init__(self, n_frames: int, page_bytes: int, pin: Pin | None = None) -> None:
        super().__init__(n_frames, page_bytes)
        try:
            self._map = mmap.mmap(-1, self.n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(
                f"cannot map {self.n_bytes} bytes for the host arena: {error}; lower memory.ram"
            ) from error
        # Frames live for the whole run and are streamed through: huge pages save TLB misses in the matrix products.
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = memoryview(self._map)
        self.address = torch.frombuffer(self._bytes, dtype=torch.uint8, count=1).data_ptr()
        self._unpin: Callable[[], None] | None = None
        if pin is not None:
            self.pin(pin)

    def pin(self, pin: Pin) -> None:
        """Have all of it fit for copies by a device until `close`; once. A child process does not get it from then
        on."""
        if self._unpin is None and self.n_bytes:
            # After a fork whoever writes first gets a copy of the page, the other keeps the one that the device knows:
            # that must not be the child. Kernels that avoid it copy every locked page at the fork, as much memory
            # again.
            self._map.madvise(mmap.MADV_DONTFORK)
            self._unpin = pin(self.address, self.n_bytes)

    def buffer(self, frame: FrameId, n_bytes: int) -> memoryview:
        """As `Arena.buffer`; never raises."""
        start = frame * self.page_bytes
        return self._bytes[start : start + n_bytes]

    def view(self, frame: FrameId, offset_bytes: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """As `Arena.view`."""
        if not numel:
            return torch.empty(0, dtype=dtype)
        start = frame * self.page_bytes + offset_bytes
        return torch.frombuffer(self._bytes, dtype=dtype, count=numel, offset=start)

    def lease(
        self, tensor: TensorId, frame: FrameId, offset_bytes: int, dtype: torch.dtype, numel: int
    ) -> torch.Tensor:
        """As `Arena.lease`."""
        start = frame * self.page_bytes + offset_bytes
        window = self._bytes[start : start + numel * dtype.itemsize]
        self._watched.watch(window, tensor)
        return torch.frombuffer(window, dtype=dtype, count=numel)

    def close(self) -> None:
        """As `Arena.close`; no copy by a device may be under way.

        Raises:
            RuntimeError: the device failed, so that it cannot be unpinned; the memory is given back all the same.
        """
        unpin, self._unpin = self._unpin, None
        try:
            if unpin is not None:
                unpin()
        finally:
            self._bytes.release()
            try:
                self._map.close()
            except BufferError:
                # A lease still exports the mapping: its views stay valid and the last one's end unmaps it.
                self._map.madvise(mmap.MADV_NORMAL)
