"""The device tier of one engine: a budget, an arena, and who moves what in it, above the host tier.

    SSD --(host plan)--> host pages --(device plan)--> device pages, where compute runs
                             ^-- updates, on the CPU: parameters, masters and states never leave the two lower tiers
"""

from __future__ import annotations

from contextlib import ExitStack

from optim.unit import Unit
from pagemem.accelerator import Accelerator
from pagemem.budget import Budget, BudgetShortage
from pagemem.device_mover import DeviceMover
from pagemem.errors import BudgetError
from pagemem.events import EventSink
from pagemem.residency import PagedTensor
from pagemem.tier import Tag, Tier
from pagemem.units import format_bytes
from scheduler.device_driver import DeviceDriver
from scheduler.driver import Driver


class DeviceTier:
    """Device pages for the parameters that compute uses. Training thread only.

    Args:
        device_bytes: the budget, at least one page.
        page_bytes: as below.
        below: the driver of host memory.
        accelerator: the device.

    Raises:
        MemoryError: the device has no room for the arena. StorageError: the system starts no more threads.
    """

    def __init__(self, device_bytes: int, page_bytes: int, below: Driver, sink: EventSink, accelerator: Accelerator) -> None:
        self.budget = Budget(Tier.DEVICE, device_bytes)
        n_frames = device_bytes // page_bytes
        reserved = self.budget.reserve(Tag.PARAM, n_frames * page_bytes, "device arena")
        if isinstance(reserved, BudgetShortage):
            raise AssertionError(reserved.describe())
        self._reserved = reserved
        arena = accelerator.make_arena(n_frames, page_bytes)
        with ExitStack() as undo:
            undo.callback(arena.close)
            self.mover = DeviceMover(arena, below.mover, accelerator, sink)
            undo.pop_all()
        self.driver = DeviceDriver(self.mover, below, sink)

    def mirror(self, unit: Unit) -> PagedTensor:
        """A unit's parameters on the device.

        Raises:
            BudgetError: the device cannot hold them; names the smallest budget that can.
        """
        arena, tensor = self.mover.arena, unit.parameters
        if tensor.n_frames > arena.n_frames:
            smallest_bytes = tensor.n_frames * arena.page_bytes
            raise BudgetError(
                f"memory.device is {self.budget.limit_bytes} bytes ({format_bytes(self.budget.limit_bytes)}), but {unit.name} alone takes "
                f"{smallest_bytes} bytes ({format_bytes(smallest_bytes)}); set memory.device to at least that",
                smallest_bytes,
            )
        return self.mover.mirror(tensor)

    def close(self) -> None:
        """Stop all copies, end the threads, give the arena back. Idempotent."""
        self.mover.close()
        self.mover.arena.close()
        self._reserved.release()
