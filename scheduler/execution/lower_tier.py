"""Host memory as the driver of a device sees it: what is to be copied up is brought there, what was edited goes back.

The first use of a tensor after a load is an op of the driver below, too, which reads the tensor there: so the plan
below has it in host memory by then, mostly long before, and the copy, which waits for nothing else, is made as early.
What the device keeps from one use to the next asks for nothing below, and neither do device-resident tensors.

Two drivers, one above the other, each have a trace and a plan of their own. For both traces to be the same in every
step, each planned step of the device has the same moves (`single_step_cycle`). Its ops are timed by the device's own
clock: the training thread is ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from pagemem.frames.page import TensorId
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.telemetry.recorder import WaitCause
from scheduler.execution.wait_explainer import DeviceCauses
from scheduler.planning.trace import Access, AccessMode, OpKey, OpKind


class DriverBelow(Protocol):
    """What is asked of the driver of host memory."""

    mover: Mover

    def op(self, key: OpKey, name: str, accesses: Sequence[Access]) -> AbstractContextManager[None]:
        """See `Driver.op`."""

    def untraced(self) -> AbstractContextManager[None]:
        """See `Driver.untraced`."""

    def announce(self, tensors: Sequence[TensorId]) -> None:
        """See `Driver.announce`."""

    def evaluating(self) -> AbstractContextManager[None]:
        """See `Driver.evaluating`."""

    def causes(self) -> Callable[[str], WaitCause]:
        """See `Driver.causes`."""


class LowerTier:
    """Brings tensors to host memory for a device, and writes them back. Training thread only.

    Args:
        device: owner of residency on the device.
        below: the driver of host memory.
    """

    def __init__(self, device: DeviceMover, below: DriverBelow) -> None:
        self._device = device
        self._below = below
        self._kind = OpKind.FORWARD

    def op_begins(self, kind: OpKind) -> None:
        """An op begins on the device; ops below that it needs are of its kind.

        Raises:
            DeviceError: the calling thread's compute goes where copies are not ordered with it.
        """
        self._device.accelerator.check()
        self._kind = kind

    def step_begins(self) -> None:
        """A planned step begins. What the device still has, and from when, differs from step to step; what is asked for
        below must not."""
        self._device.prefetched_unused.update(
            tensor.id for tensor in self._device.tensors.values() if tensor.frame is not None and not tensor.resident
        )

    def holds(
        self, tensors: Sequence[TensorId], name: str, mode: AccessMode = AccessMode.READ
    ) -> AbstractContextManager[None]:
        """Have tensors in host memory inside the block, as one op there."""
        lower = [self._device.lower(tensor) for tensor in tensors]
        key = (self._kind, (mode.value, *(tensor.id for tensor in lower)))
        return self._below.op(key, name, [Access(tensor.id, mode) for tensor in lower])

    def must_be_op_below(self, tensor: PagedTensor) -> bool:
        """Whether the next use of a tensor has to be an op below, too."""
        return tensor.id in self._device.prefetched_unused

    def copied(self, tensors: Iterable[PagedTensor]) -> None:
        """Tensors are being copied up and are used now: compute waits for the copies."""
        for tensor in tensors:
            self._device.prefetched_unused.discard(tensor.id)
            self._device.wait_for(tensor)

    def fill(self, tensor: PagedTensor) -> None:
        """Copy what is below into the frames that a tensor has."""
        self._device.accelerator.check()
        with self.holds([tensor.id], tensor.name):
            self._device.tenants.bytes_of(tensor).copy_(
                self._below.mover.tenants.bytes_of(self._device.lower(tensor.id))
            )

    def write_back(self, tensor: PagedTensor, mode: AccessMode) -> None:
        """Copy a tensor down.

        Raises:
            StorageError: a page file failed. The device still has it.
        """
        self._device.accelerator.check()
        with self.holds([tensor.id], tensor.name, mode):
            self._below.mover.tenants.bytes_of(self._device.lower(tensor.id)).copy_(
                self._device.tenants.bytes_of(tensor)
            )
        self._device.written_back(tensor)

    def write_back_edited(self) -> None:
        """Copy down what was edited on the device."""
        for tensor in list(self._device.edited.values()):
            self.write_back(tensor, AccessMode.MODIFY)

    def cancel_loads(self) -> None:
        """Undo all loads whose copies have not begun."""
        self._device.take_back_loads()

    def untraced(self) -> AbstractContextManager[None]:
        """Ops inside are no part of a step below."""
        return self._below.untraced()

    def announce(self, tensors: Sequence[TensorId]) -> None:
        """Have tensors in host memory soon. They are copied up by the ops that use them."""
        lower = [
            self._device.lower(tensor).id for tensor in tensors if self._device.mirrors(self._device.tensors[tensor])
        ]
        self._below.announce(lower)

    def evaluating(self) -> AbstractContextManager[None]:
        """Ops below are those of a pass that evaluates, too."""
        return self._below.evaluating()

    def causes(self) -> Callable[[str], WaitCause]:
        """Explains waits for tensors of the device, here or below."""
        return DeviceCauses(self._device, self._below.causes())
