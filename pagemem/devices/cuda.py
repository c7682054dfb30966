"""A CUDA device: its memory cut into frames, and streams for copies up and down beside the one that computes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

import torch

from pagemem import knobs
from pagemem.devices.accelerator import Copy, DeviceEvent
from pagemem.devices.arena import Arena
from pagemem.errors import DeviceError
from pagemem.frames.page import FrameId, TensorId
from pagemem.units import GiB, format_bytes

#: Large parts of it have no types.
_CUDA: Final[Any] = torch.cuda
_LOG: Final = logging.getLogger(__name__)
#: Host memory is registered in pieces of so many bytes: drivers from r580 on refuse 512 GiB in one. A multiple of every
#: page size.
PIN_BYTES: Final = 64 * GiB


class _DeviceBytes:
    """Bytes of an arena as other libraries hand device memory over; torch keeps it as long as a storage made of it
    lives."""

    __slots__ = ("__cuda_array_interface__", "__weakref__", "_whole")

    def __init__(self, whole: torch.Tensor, address: int, n_bytes: int) -> None:
        self._whole = whole  # the memory outlives the arena for as long as views of it do
        self.__cuda_array_interface__ = {
            "shape": (n_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class CudaArena(Arena):
    """Frames in one allocation on a CUDA device.

    Raises:
        MemoryError: the device has no room for it.
    """

    def __init__(self, n_frames: int, page_bytes: int, device: torch.device) -> None:
        super().__init__(n_frames, page_bytes)
        self._device = device
        self._warn_if_tight()
        try:
            self._whole = torch.empty(self.n_bytes, dtype=torch.uint8, device=device)
        except _CUDA.OutOfMemoryError as error:
            free_bytes, _ = _CUDA.mem_get_info(device)
            raise MemoryError(
                f"{device} has {format_bytes(free_bytes)} free, memory.device is {format_bytes(self.n_bytes)}; lower "
                "memory.device"
            ) from error
        self.address = self._whole.data_ptr()

    def buffer(self, frame: FrameId, n_bytes: int) -> memoryview:
        """As `Arena.buffer`: always raises."""
        raise TypeError(f"frame {frame} is in the memory of {self._device}: files are not read into it")

    def view(self, frame: FrameId, offset_bytes: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """As `Arena.view`."""
        start = frame * self.page_bytes + offset_bytes
        return self._whole[start : start + numel * dtype.itemsize].view(dtype)

    def lease(
        self, tensor: TensorId, frame: FrameId, offset_bytes: int, dtype: torch.dtype, numel: int
    ) -> torch.Tensor:
        """As `Arena.lease`."""
        window = _DeviceBytes(
            self._whole, self.address + frame * self.page_bytes + offset_bytes, numel * dtype.itemsize
        )
        self._watched.watch(window, tensor)
        return torch.as_tensor(window, device=self._device).view(dtype)

    def close(self) -> None:
        """As `Arena.close`; asks nothing of the device, which may have failed. Views made from here on are of
        nothing."""
        self._whole = torch.empty(0, dtype=torch.uint8)

    def _warn_if_tight(self) -> None:
        free_bytes, _ = _CUDA.mem_get_info(self._device)
        # What torch has got and does not use is free, too.
        free_bytes += _CUDA.memory_reserved(self._device) - _CUDA.memory_allocated(self._device)
        if knobs.TIGHT_SHARE * free_bytes < self.n_bytes <= free_bytes:
            warnings.warn(
                f"memory.device is {format_bytes(self.n_bytes)} of {format_bytes(free_bytes)} free on {self._device}: "
                "little is left for activations and the workspaces of kernels, which are not in it. Lower "
                f"memory.device to at most {format_bytes(int(knobs.TIGHT_SHARE * free_bytes))} if the device runs out "
                "of memory",
                RuntimeWarning,
                stacklevel=2,
            )


class CudaEvent:
    """An event of a stream (`torch.cuda.Event`)."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def reached(self) -> bool:
        """As `DeviceEvent.reached`."""
        return bool(self.event.query())

    def wait(self) -> None:
        """As `DeviceEvent.wait`."""
        self.event.synchronize()


class CudaCopy(CudaEvent):
    """An event behind a copy, and the one before it."""

    def __init__(self, begun: Any, ended: Any) -> None:
        super().__init__(ended)
        self._begun = begun

    def seconds(self) -> float:
        """As `Copy.seconds`."""
        return float(self._begun.elapsed_time(self.event)) / 1e3


class CudaDevice:
    """One CUDA device, whose compute is enqueued on the stream that is current when this is made; see `Accelerator`.

    Args:
        index: of the device; None: the current one.

    Raises:
        DeviceError: torch cannot use CUDA here, or has no such device; says why.
    """

    stages_gradients = True

    def __init__(self, index: int | None = None) -> None:
        if not _CUDA.is_available():
            build = (
                "this torch is a build without CUDA"
                if torch.version.cuda is None
                else "torch finds no device that it can use"
            )
            raise DeviceError(
                f'device is "cuda", but {build}; `offload doctor` says more. Set device to "cpu" to train without one'
            )
        n_devices = _CUDA.device_count()
        if index is not None and index >= n_devices:
            raise DeviceError(f'device is "cuda:{index}", but there are {n_devices}, numbered from 0')
        self.torch_device = torch.device("cuda", _CUDA.current_device() if index is None else index)
        self._compute = _CUDA.current_stream(self.torch_device)
        self._up = _CUDA.Stream(self.torch_device)
        self._down = _CUDA.Stream(self.torch_device)
        self._warned = False
        self._cuts: tuple[
            int, ...
        ] = ()  # where one pinned piece of host memory ends and the next begins, sorted; replaced, never changed

    def use_in_thread(self) -> None:
        """As `Accelerator.use_in_thread`: otherwise a new thread's calls go to the first device, and make a context
        there."""
        _CUDA.set_device(self.torch_device)

    def make_arena(self, n_frames: int, page_bytes: int) -> Arena:
        """As `Accelerator.make_arena`."""
        return CudaArena(n_frames, page_bytes, self.torch_device)

    def pin(self, address: int, n_bytes: int) -> Callable[[], None]:
        """Lock host memory in place for copies at full speed, all of it or nothing.

        Where the system refuses, it stays as it is, with one warning.

        Returns:
            What unlocks it. Raises RuntimeError, after every piece was tried, if one cannot be: then the device has
            failed.
        """
        starts = range(address, address + n_bytes, PIN_BYTES)
        for number, start in enumerate(starts):
            with _CUDA.device(self.torch_device):
                refused = int(_CUDA.cudart().cudaHostRegister(start, min(PIN_BYTES, address + n_bytes - start), 0))
            if refused:
                self._forget_refusal()
                self._unpin(starts[:number])
                self._warn_of_refusal(n_bytes, refused)
                return lambda: None
        self._cuts = tuple(sorted({*self._cuts, *starts[1:]}))
        return lambda: self._unpin(starts)

    def _unpin(self, starts: Sequence[int]) -> None:
        """Unlock pieces, the last one first; every one is tried.

        Raises:
            RuntimeError: some could not be; what is wrong with the first of them.
        """
        failed: list[RuntimeError] = []
        for start in reversed(starts):
            try:
                with _CUDA.device(self.torch_device):
                    refused = int(_CUDA.cudart().cudaHostUnregister(start))
                if refused:
                    raise RuntimeError(f"host memory at {start:#x} cannot be unpinned: CUDA error {refused}")
            except RuntimeError as error:
                failed.append(error)
        self._cuts = tuple(cut for cut in self._cuts if cut not in starts)
        if failed:
            raise failed[0]

    def _warn_of_refusal(self, n_bytes: int, refused: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{format_bytes(n_bytes)} of host memory cannot be pinned (CUDA error {refused}): copies to "
                f"{self.torch_device} are slower and hold the thread that asks for them up. Lower memory.ram; in a "
                "container or a virtual machine it may be refused at any size",
                RuntimeWarning,
                stacklevel=3,
            )

    def _forget_refusal(self) -> None:
        """CUDA keeps the error of a refused call for whoever asks next, which would be the next kernel: let it be this
        one."""
        try:
            torch.zeros(1, device=self.torch_device)
        except RuntimeError as error:
            # What went wrong is in the warning; anything worse fails again at once.
            _LOG.debug("after a refused pinning: %s", error)

    def record_event(self) -> DeviceEvent:
        """As `Accelerator.record_event`."""
        return CudaEvent(self._recorded(self._compute))

    def wait_for(self, event: DeviceEvent) -> None:
        """As `Accelerator.wait_for`."""
        self._compute.wait_event(_event(event))

    def stamp(self) -> Any:
        """As `Accelerator.stamp`: an event of the stream that computes."""
        return self._recorded(self._compute, timed=True)

    def seconds(self, begun: Any, ended: Any) -> float:
        """As `Accelerator.seconds`."""
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3

    def check(self) -> None:
        """As `Accelerator.check`."""
        current = _CUDA.current_stream(self.torch_device)
        if current != self._compute:
            raise DeviceError(
                f"the model is used on {current}, but the engine was made on {self._compute} and orders its copies by "
                "that; make and use it on one stream"
            )

    def copy_up(self, source: torch.Tensor, into: torch.Tensor, after: DeviceEvent) -> Copy:
        """As `Accelerator.copy_up`; copies follow one another."""
        self._up.wait_event(_event(after))
        begun = self._recorded(self._up, timed=True)
        with _CUDA.stream(self._up):
            self._copy(source, into, source)
        return CudaCopy(begun, self._recorded(self._up, timed=True))

    def copy_out(self, source: torch.Tensor, into: torch.Tensor) -> DeviceEvent:
        """As `Accelerator.copy_out`; copies follow one another."""
        self._down.wait_event(self._recorded(self._compute))
        with _CUDA.stream(self._down):
            self._copy(source, into, into)
        return CudaEvent(self._recorded(self._down))

    def _copy(self, source: torch.Tensor, into: torch.Tensor, host: torch.Tensor) -> None:
        """Copy flat bytes, of which ``host`` are those in host memory, in pieces: CUDA refuses a copy that is of two
        pinned pieces."""
        address, n_bytes = host.data_ptr(), host.numel()
        bounds = [cut - address for cut in self._cuts if address < cut < address + n_bytes]
        if not bounds:
            into.copy_(source, non_blocking=True)
            return
        for start, end in pairwise((0, *bounds, n_bytes)):
            into[start:end].copy_(source[start:end], non_blocking=True)

    def _recorded(self, stream: Any, *, timed: bool = False) -> Any:
        # A thread that waits for one sleeps; otherwise it would spin, on a core that has updates to make.
        event = _CUDA.Event(enable_timing=timed, blocking=True)
        event.record(stream)
        return event


def _event(event: DeviceEvent) -> Any:
    if not isinstance(event, CudaEvent):
        raise TypeError(f"{event!r} is no event of a CUDA device")
    return event.event
