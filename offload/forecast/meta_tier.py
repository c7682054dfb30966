"""What holds bytes in an engine, without any: an arena and a device of meta tensors, and page files that move nothing.

Everything else is as in the real ones, so their users run unchanged. And attention of meta tensors as a CPU computes
it: in one kernel, where torch would take it apart into a dozen; in rows of one sequence each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from pagemem.devices.accelerator import Copy, DeviceEvent, RamDevice, TimedCopy
from pagemem.devices.arena import Arena
from pagemem.files.page_file import SLAB_BYTES, PageFiles
from pagemem.files.requests import Route, tabulate
from pagemem.files.stats import IoMeter
from pagemem.files.striping import Striping
from pagemem.files.transfer import Done, Part
from pagemem.frames.page import Extent, FrameId, TensorId
from pagemem.sources.source_files import Origin, SourceFile
from pagemem.sources.source_transfers import SourceFiles
from pagemem.units import ceil_div

#: In transformers.masking_utils: looks into positions, and returns None where no row holds several sequences.
_PACKED: Final = "find_packed_sequence_indices"
_ATTENTION: Final = functional.scaled_dot_product_attention


class MetaArena(Arena):
    """Frames without bytes: every view is a meta tensor of its own, and a lease is known by its storage."""

    def __init__(self, n_frames: int, page_bytes: int) -> None:
        super().__init__(n_frames, page_bytes)
        self._leases: WeakKeyDictionary[torch.UntypedStorage, tuple[FrameId, int]] = WeakKeyDictionary()
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
        self._watched.watch(flat.untyped_storage(), tensor)
        self._leases[flat.untyped_storage()] = frame, offset_bytes
        return flat

    def locate(self, tensor: Tensor) -> tuple[FrameId, int] | None:
        """As `Arena.locate`, of views of what is leased."""
        leased = self._leases.get(tensor.untyped_storage()) if tensor.layout is torch.strided else None
        if leased is None:
            return None
        frame, offset_bytes = leased
        offset_bytes += int(tensor.storage_offset()) * tensor.element_size()
        return FrameId(frame + offset_bytes // self.page_bytes), offset_bytes % self.page_bytes

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
        self.reads, self.writes = IoMeter(), IoMeter()
        self.throttle = None
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


class NoSources(SourceFiles):
    """Source files of which nothing is read; loads are over when they begin."""

    def open(self, files: Iterable[SourceFile]) -> None:
        """Nothing."""

    def read(
        self, origin: Origin, into: memoryview, done: Done, *, background: bool = False, part: Part | None = None
    ) -> None:
        """Done, without parts."""
        done(None)


class AttentionOfCpu:
    """While it is entered, attention is dispatched as torch's kernel for CPUs wherever torch would choose that on a
    CPU.

    For callers of ``torch.nn.functional.scaled_dot_product_attention`` by that name, in the whole process: a mode of
    torch's would be off in what backward recomputes.
    """

    def __enter__(self) -> None:
        functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        functional.scaled_dot_product_attention = _ATTENTION


class RowsOfOneSequence:
    """While it is entered, transformers takes each row of tokens as one sequence, as it does where positions say so:
    it would look into them for several packed into a row, and on meta they have no values.

    In the whole process, where transformers is imported by then.
    """

    def __enter__(self) -> None:
        self._masks = sys.modules.get("transformers.masking_utils")
        self._looks: Any = getattr(self._masks, _PACKED, None)
        if self._looks is not None:
            setattr(self._masks, _PACKED, self._found)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._looks is not None:
            setattr(self._masks, _PACKED, self._looks)

    def _found(self, position_ids: Tensor) -> Any:
        return None if position_ids.is_meta else self._looks(position_ids)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    if attn_mask is not None or dropout_p or options.get("enable_gqa") or not _in_one_kernel(query, key, value):
        return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **options)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = kernel(query, key, value, dropout_p, is_causal, scale=options.get("scale"))[0]
    return result


def _in_one_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """What torch asks for (aten/src/ATen/native/transformers/sdp_utils_cpp.cpp), for tensors without a mask."""
    enabled: bool = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    alike = all(
        t.dim() == 4 and t.stride(-1) == 1 and t.size(-1) == query.size(-1) and t.numel() for t in (query, key, value)
    )
    return alike and query.shape[:2] == key.shape[:2] == value.shape[:2] and enabled
