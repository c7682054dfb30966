"""The host tier's memory: one anonymous mapping cut into frames, and leases that say when a view of it is dead.

A *lease* is a view of the arena that somebody else may keep: a bound parameter, a weight saved by autograd. The arena
learns of its death from the storage's own reference count, so it holds for every alias (views, detached tensors, saved
tensors) however it was made, and frames with a living alias are never reused. Bookkeeping of the frames is the
allocator's; who may move what is the mover's.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import torch

from pagemem.page import FrameId, TensorId


class HostArena:
    """``n_frames`` frames of ``page_bytes`` bytes in one private anonymous mapping.

    The mapping is charged whole against RLIMIT_DATA when it is made; resident memory grows as frames are touched.
    Views may be made on any thread.

    Raises:
        MemoryError: the mapping was refused (RLIMIT_DATA, overcommit); the message names the size.
    """

    def __init__(self, n_frames: int, page_bytes: int) -> None:
        self.n_frames = n_frames
        self.page_bytes = page_bytes
        self.n_bytes = n_frames * page_bytes
        try:
            self._map = mmap.mmap(-1, self.n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"cannot map {self.n_bytes} bytes for the host arena: {error}; lower memory.ram") from error
        # Frames live for the whole run and are streamed through: huge pages save TLB misses in the matrix products.
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = memoryview(self._map)
        self.address = torch.frombuffer(self._bytes, dtype=torch.uint8, count=1).data_ptr()
        self._dead: deque[TensorId] = deque()
        self._watch: dict[int, weakref.ref[memoryview]] = {}

    def buffer(self, frame: FrameId, n_bytes: int) -> memoryview:
        """The bytes from the start of ``frame`` on, for I/O. The caller keeps the frames pinned while it is used."""
        start = frame * self.page_bytes
        return self._bytes[start : start + n_bytes]

    def view(self, frame: FrameId, offset_bytes: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """A flat tensor over ``numel`` elements, for use inside one pinned operation; its life is not tracked."""
        start = frame * self.page_bytes + offset_bytes
        return torch.frombuffer(self._bytes, dtype=dtype, count=numel, offset=start)

    def lease(self, tensor: TensorId, frame: FrameId, offset_bytes: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """A flat tensor whose last alias's death is reported by `ended_leases`. The caller counts it as begun."""
        start = frame * self.page_bytes + offset_bytes
        window = self._bytes[start : start + numel * dtype.itemsize]
        key = id(window)
        watch, dead = self._watch, self._dead

        def ended(_: weakref.ref[memoryview]) -> None:
            # May run inside any reference drop, with any lock held: it must not take one. deque.append is atomic.
            watch.pop(key, None)
            dead.append(tensor)

        watch[key] = weakref.ref(window, ended)
        return torch.frombuffer(window, dtype=dtype, count=numel)

    def ended_leases(self) -> list[TensorId]:
        """Tensors of the leases that ended since the last call, once per lease."""
        ended: list[TensorId] = []
        while self._dead:
            ended.append(self._dead.popleft())
        return ended

    def locate(self, address: int) -> tuple[FrameId, int] | None:
        """Frame and offset in it of a memory address, or None when it lies outside the arena."""
        distance = address - self.address
        if 0 <= distance < self.n_bytes:
            return FrameId(distance // self.page_bytes), distance % self.page_bytes
        return None

    def close(self) -> None:
        """Give the mapping back, at once when no lease lives, else when the last one ends. Idempotent."""
        self._bytes.release()
        try:
            self._map.close()
        except BufferError:
            # A lease still exports the mapping: its views stay valid and the last one's end unmaps it.
            self._map.madvise(mmap.MADV_NORMAL)
