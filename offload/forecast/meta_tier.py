"""What holds bytes in an engine, without any: an arena and a device of meta tensors, and page files that move nothing.

Everything else is as in the real ones, so their users run unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from pagemem.devices.accelerator import Copy, DeviceEvent, RamDevice, TimedCopy
from pagemem.devices.arena import Arena
from pagemem.files.page_file import SLAB_BYTES, PageFiles
from pagemem.files.requests import Route, tabulate
from pagemem.files.stats import IoMeter
from pagemem.files.striping import Striping
from pagemem.files.transfer import Done, Part
from pagemem.frames.page import Extent, FrameId, TensorId
from pagemem.units import ceil_div


class MetaArena(Arena):
    """Frames without bytes: every view is a meta tensor of its own, and a lease is known by its storage."""

    def __init__(self, n_frames: int, page_bytes: int) -> None:
        super().__init__(n_frames, page_bytes)
        self._leases: dict[int, tuple[StorageWeakRef, TensorId, int]] = {}
        self._scratch = memoryview(bytearray(1))

    def buffer(self, frame: FrameId, n_bytes: int) -> memoryview:
        """One byte that stands for all of them."""
        return self._scratch

    def view(self, frame: FrameId, offset_bytes: int, dtype: torch.dtype, numel: int) -> Tensor:
        """A flat tensor without bytes, which is not counted."""
        with _disable_current_modes():
            return torch.empty(numel, dtype=dtype, device="meta")

    def lease(self, tensor: TensorId, frame: FrameId, offset_bytes: int, dtype: torch.dtype, numel: int) -> Tensor:
        """A flat tensor without bytes whose storage is watched."""
        flat = self.view(frame, offset_bytes, dtype, numel)
        watch = StorageWeakRef(flat.untyped_storage())  # type: ignore[no-untyped-call]
        self._leases[watch.cdata] = (watch, tensor, offset_bytes)
        return flat

    def ended_leases(self) -> list[TensorId]:
        """Tensors of the leases whose storage is gone."""
        ended = [(key, tensor) for key, (watch, tensor, _) in self._leases.items() if watch.expired()]  # type: ignore[no-untyped-call]
        for key, _ in ended:
            del self._leases[key]
        return [tensor for _, tensor in ended]

    def leased(self, tensor: Tensor) -> tuple[TensorId, int] | None:
        """Whose lease a meta tensor is a view of, and the bytes from that one's beginning to the view's; or None."""
        if tensor.device.type != "meta" or tensor.layout is not torch.strided:
            return None
        found = self._leases.get(tensor.untyped_storage()._cdata)
        return None if found is None else (found[1], found[2] + int(tensor.storage_offset()) * tensor.element_size())

    def close(self) -> None:
        """Nothing is to be given back."""


class MetaDevice(RamDevice):
    """A device without bytes."""

    torch_device = torch.device("meta")

    def make_arena(self, n_frames: int, page_bytes: int) -> Arena:
        """Frames without bytes."""
        return MetaArena(n_frames, page_bytes)

    def copy_up(self, source: Tensor, into: Tensor, after: DeviceEvent) -> Copy:
        """Nothing to copy."""
        return TimedCopy(0.0)


class NoFiles(PageFiles):
    """Page files whose transfers move nothing and are over when they begin. They grow as real ones do."""

    def __init__(self, n_paths: int, page_bytes: int, max_request_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.paths = [""] * n_paths
        self._striping = Striping(n_paths)
        self._max_request_bytes = max_request_bytes
        self._slab_frames = max(1, SLAB_BYTES // page_bytes)
        self.n_frames = 0
        self._meter = IoMeter()
        self._nowhere = tabulate([Extent(FrameId(0), 0, page_bytes)], self._striping, page_bytes, 1)

    def grow(self, n_frames: int) -> None:
        """Have at least so many frames, in whole slabs."""
        if n_frames > self.n_frames:
            self.n_frames = ceil_div(n_frames, self._slab_frames) * self._slab_frames

    def route(self, extents: Sequence[Extent]) -> Route:
        """Requests that move nothing, whatever the extents."""
        return Route(self._nowhere, (), sum(extent.length_bytes for extent in extents))

    def read(
        self,
        where: Route | Sequence[Extent],
        into: memoryview,
        done: Done,
        *,
        background: bool = False,
        part: Part | None = None,
    ) -> None:
        """Done, without parts."""
        done(None)

    def write(
        self, where: Route | Sequence[Extent], source: memoryview, done: Done, *, background: bool = False
    ) -> None:
        """Done."""
        done(None)

    def close(self) -> None:
        """Nothing is to be given back."""
