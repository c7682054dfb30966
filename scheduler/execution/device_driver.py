"""Device-resident tensors and copies that are out of date: what the driver of a device has to do beside ops.

Two drivers, one above the other, each with a trace and a plan of its own. That of the device plans which tensors are on
the device; its loads are copies from host memory (`scheduler.execution.lower_tier`). Ops are timed by the device's own
clock: the training thread is ahead of it. For both traces to be the same in every step, each planned step of the device
has the same moves (`single_step_cycle`).
"""

from __future__ import annotations

from pagemem.frames.page import FrameId
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.paged_tensor import PagedTensor
from scheduler.execution.driver import Driver
from scheduler.execution.lower_tier import LowerTier
from scheduler.planning.trace import Access, AccessMode, OpKind


class DeviceDriver:
    """The driver of a device above that of host memory. Training thread only.

    Args:
        device: owner of residency on the device.
        driver: gives tensors on the device, op by op; made with ``lower``.
        lower: host memory, as ``driver`` sees it.
    """

    def __init__(self, device: DeviceMover, driver: Driver, lower: LowerTier) -> None:
        self.driver = driver
        self._device = device
        self._lower = lower

    def renewed(self, tensor: PagedTensor) -> None:
        """An update has changed what lies below: what the device has of it is dropped, or copied anew where views are
        in use."""
        key = (OpKind.UPDATE, ("renewed", tensor.id))
        with self.driver.op(key, tensor.name, [Access(tensor.id, AccessMode.RENEW)]):
            if not self._device.renew(tensor):
                self._lower.fill(tensor)

    def place(self, tensor: PagedTensor, frame: FrameId) -> None:
        """Make a tensor device-resident, as it is below, in the free frames from ``frame`` on. Updates of it are made
        on the device from then on.

        Raises:
            StorageError: it cannot be read, or the device fails; the tensor is intact below.
        """
        with self.driver.untraced(), self._lower.holds([tensor.id], tensor.name):
            self._device.start_load(tensor, frame)
            self._device.monitor.wait_until(lambda: not tensor.moving, tensor.name, tensor.n_bytes)
            self._device.monitor.check()
            self._lower.copied([tensor])
        tensor.resident = True

    def place_empty(self, tensor: PagedTensor, frame: FrameId) -> None:
        """Make a new tensor device-resident, of which there is nothing below and never will be."""
        self._device.start_load(tensor, frame, fresh=True)
        self._device.prefetched_unused.discard(tensor.id)
        tensor.resident = True

    def bring_down(self) -> None:
        """Between two steps: have below what has changed in device-resident tensors, and what may have through views in
        use.

        Raises:
            StorageError: a page file failed, or has no room for what has to leave. DeviceError: the calling thread's
                compute goes where this would not be ordered with it. The device has everything.
        """
        with self.driver.untraced():
            for tensor in list(self._device.tensors.values()):
                changed = tensor.id in self._device.edited or tensor.id in self._device.changed_resident
                if changed or (tensor.may_be_aliased and tensor.readable):
                    self._lower.write_back(tensor, AccessMode.CREATE)

    def bring_up(self) -> None:
        """Between two steps: device-resident tensors are to be what lies below of them.

        Raises:
            StorageError: one cannot be read; DeviceError: as `bring_down`. It and those after it are as they were.
        """
        with self.driver.untraced():
            for tensor in list(self._device.tensors.values()):
                if tensor.resident and self._device.mirrors(tensor):
                    self._lower.fill(tensor)
                    if tensor.id in self._device.changed_resident:
                        self._device.written_back(tensor)
