"""The device tier of one engine: a budget, an arena, and who moves what in it, above the host tier.

SSD --(loads)--> host pages --(uploads)--> device pages, where compute runs
                     ^-- updates, on the CPU      ^-- updates of device-resident units
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from optim.unit import Unit
from pagemem.budget import Budget
from pagemem.devices.accelerator import Accelerator
from pagemem.errors import BudgetError
from pagemem.frames.page import FrameId
from pagemem.process.closing import close_all
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.host_mover import HostMover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.telemetry.events import EventSink
from pagemem.tier import Tag, Tier
from pagemem.units import format_bytes
from scheduler.execution.driver import Driver
from scheduler.execution.edits_above import EditsAbove
from scheduler.planning.trace import AccessMode


class DeviceTier:
    """Device pages for the parameters that compute uses, and for device-resident units. Training thread only.

    Args:
        device_bytes: the budget, at least one page.
        driver: gives ops the pages of both tiers from now on; ``host`` owns those of host memory.
        accelerator: the device.
        connect: has the driver know the device.

    Raises:
        MemoryError: the device has no room for the arena. StorageError: the system starts no more threads.
    """

    def __init__(
        self,
        device_bytes: int,
        driver: Driver,
        host: HostMover,
        sink: EventSink,
        accelerator: Accelerator,
        connect: Callable[[Driver, DeviceMover], None],
    ) -> None:
        self.budget = Budget(Tier.DEVICE, device_bytes)
        page_bytes = host.arena.page_bytes
        n_frames = device_bytes // page_bytes
        self._reserved = self.budget.reserve(Tag.PARAM, n_frames * page_bytes, "device arena")
        arena = accelerator.make_arena(n_frames, page_bytes)
        with ExitStack() as undo:
            undo.callback(arena.close)
            self.mover = DeviceMover(arena, host, accelerator, sink)
            undo.pop_all()
        self._driver = driver
        self._edits = EditsAbove(self.mover, driver)
        connect(driver, self.mover)

    def mirror(self, unit: Unit) -> PagedTensor:
        """A unit's parameters on the device.

        Raises:
            BudgetError: the device cannot hold them; names the smallest budget that can.
        """
        arena, tensor = self.mover.arena, unit.parameters
        if tensor.n_frames > arena.n_frames:
            smallest_bytes = tensor.n_frames * arena.page_bytes
            raise BudgetError(
                f"memory.device is {self.budget.limit_bytes} bytes ({format_bytes(self.budget.limit_bytes)}), but "
                f"{unit.name} alone takes {smallest_bytes} bytes ({format_bytes(smallest_bytes)}); set memory.device "
                "to at least that",
                smallest_bytes,
            )
        return self.mover.mirror(tensor)

    def make_resident(self, units: Sequence[Unit], *, sums: bool) -> None:
        """Keep units with their masters and states on the device, from its first frames on; they are updated there.

        Between two steps, once all of them have their states. They must fit.

        Args:
            sums: whether their gradients are added up there, too.

        Raises:
            StorageError: one cannot be read, or the device fails; the engine is to be closed.
        """
        self._driver.evict_all(Tier.DEVICE)
        frame = 0
        for unit in units:
            assert unit.device is not None
            unit.parameters, unit.device, unit.device_resident = unit.device, None, True
            self._place(unit.parameters, FrameId(frame))
            frame += unit.parameters.n_frames
            for part in unit.slices:
                if part.states is not None:
                    part.states = self._resident(part.states, frame)
                    frame += part.states.n_frames
                if part.master is not None:
                    part.master = self._resident(part.master, frame)
                    frame += part.master.n_frames
            if sums:
                unit.gradients = self.mover.create(f"gradients of {unit.name}", Tag.GRAD, unit.parameters.n_bytes)
                self._place_empty(unit.gradients, FrameId(frame))
                frame += unit.gradients.n_frames

    def _resident(self, lower: PagedTensor, frame: int) -> PagedTensor:
        """The device's own in place of a tensor of host memory."""
        tensor = self.mover.mirror(lower)
        self._place(tensor, FrameId(frame))
        return tensor

    def renewed(self, tensor: PagedTensor) -> None:
        """An update has changed what lies below: what the device has of it is dropped, or copied anew where views are
        in use."""
        if not self.mover.renew(tensor):
            self._fill(tensor)

    def _fill(self, tensor: PagedTensor) -> None:
        """Copy what is below into the frames that a tensor has."""
        with self._driver.memories.lower_pinned(tensor) as lower:
            self.mover.tenants.bytes_of(tensor).copy_(self.mover.below.tenants.bytes_of(lower))

    def _place(self, tensor: PagedTensor, frame: FrameId) -> None:
        """Make a tensor device-resident, as it is below, in the free frames from ``frame`` on. Updates of it are made
        on the device from then on.

        Raises:
            StorageError: it cannot be read, or the device fails; the tensor is intact below.
        """
        with self._driver.untraced(), self._driver.memories.lower_pinned(tensor):
            self.mover.start_load(tensor, frame)
            self.mover.monitor.wait_until(lambda: not tensor.moving, tensor.name, tensor.n_bytes)
            self.mover.monitor.check()
            self.mover.wait_for(tensor)
        tensor.resident = True

    def _place_empty(self, tensor: PagedTensor, frame: FrameId) -> None:
        """Make a new tensor device-resident, of which there is nothing below and never will be."""
        self.mover.start_load(tensor, frame, fresh=True)
        tensor.resident = True

    def bring_down(self) -> None:
        """Between two steps: have below what has changed in device-resident tensors, and what may have through views in
        use.

        Raises:
            StorageError: a page file failed, or has no room for what has to leave. DeviceError: the calling thread's
                compute goes where this would not be ordered with it. The device has everything.
        """
        with self._driver.untraced():
            for tensor in list(self.mover.tensors.values()):
                tensor.note_writes()
                changed = tensor.id in self.mover.edited or tensor.id in self.mover.changed_resident
                if changed or (tensor.may_be_aliased and tensor.readable):
                    self._edits.copy_down(tensor, AccessMode.CREATE)

    def bring_up(self) -> None:
        """Between two steps: device-resident tensors are to be what lies below of them.

        Raises:
            StorageError: one cannot be read; DeviceError: as `bring_down`. It and those after it are as they were.
        """
        with self._driver.untraced():
            for tensor in list(self.mover.tensors.values()):
                if tensor.resident and self.mover.mirrors(tensor):
                    self._fill(tensor)
                    if tensor.id in self.mover.changed_resident:
                        self.mover.written_back(tensor)

    def close(self) -> None:
        """Stop all copies, end the threads, give the arena back. Idempotent."""
        close_all(self.mover.close, self.mover.arena.close, self._reserved.end)
