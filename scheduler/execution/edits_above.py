"""What compute edits on a device goes back to host memory at once, which is authoritative. Training thread only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor
from scheduler.planning.trace import Access, AccessMode, OpKey, OpKind


class OpsBelow(Protocol):
    """What is asked of the driver."""

    mover: Mover

    def op(self, key: OpKey, name: str, accesses: Sequence[Access]) -> AbstractContextManager[None]:
        """See `Driver.op`."""


class EditsAbove:
    """Writes back what was edited on a device.

    Args:
        device: owner of residency there.
        driver: gives the pages below.

    Attributes:
        kind: of the last op, which is that of writing back what it edited.
    """

    def __init__(self, device: DeviceMover, driver: OpsBelow) -> None:
        self._device = device
        self._driver = driver
        self.kind = OpKind.FORWARD

    def check(self) -> None:
        """Raise DeviceError where the calling thread's compute is not ordered with copies."""
        self._device.accelerator.check()

    def write_back(self) -> None:
        """Copy down what was edited until now.

        Raises:
            StorageError: a page file failed. The device still has it.
        """
        for tensor in list(self._device.edited.values()):
            self.copy_down(tensor, AccessMode.MODIFY)

    def copy_down(self, tensor: PagedTensor, mode: AccessMode) -> None:
        """Copy a tensor of the device down, which is an op.

        Raises:
            StorageError, DeviceError: as `write_back`, and where the thread's compute is not ordered with the copy.
        """
        self._device.accelerator.check()
        lower = self._device.lower(tensor.id)
        # Not looked at by the op itself, which would write it back once more.
        edited = self._device.edited.pop(tensor.id, None)
        try:
            with self._driver.op((self.kind, (mode.value, lower.id)), tensor.name, [Access(lower.id, mode)]):
                self._driver.mover.tenants.bytes_of(lower).copy_(self._device.tenants.bytes_of(tensor))
                edited = None
        finally:
            if edited is not None:
                self._device.edited[tensor.id] = edited
        self._device.written_back(tensor)
