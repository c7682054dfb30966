"""A device above a mover whose copies take as long as the test wants."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from cross_references import check_mover
from event_log import EventLog
from gated_mover import PAGE_BYTES, Gates, opened

from pagemem.devices.accelerator import RamDevice
from pagemem.devices.arena import HostArena
from pagemem.frames.page import FrameId
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.paged_tensor import PagedTensor, Residency

R = Residency


class GatedEvent:
    """A place that a device comes to when the test lets it."""

    def __init__(self) -> None:
        self._gate = threading.Event()
        self.error: BaseException | None = None

    def open(self) -> None:
        self._gate.set()

    def reached(self) -> bool:
        return self._gate.is_set()

    def seconds(self) -> float:
        return 1e-6

    def wait(self) -> None:
        assert self._gate.wait(30)
        if self.error is not None:
            raise self.error


class GatedDevice(RamDevice):
    """Bytes go down when the test lets them."""

    def __init__(self) -> None:
        self.event_down = GatedEvent()

    def copy_out(self, source: torch.Tensor, into: torch.Tensor) -> GatedEvent:
        """Now, which nobody may see before the gate is open."""
        into.copy_(source)
        return self.event_down


class Tiers:
    """A device of two frames above a gated host mover."""

    def __init__(self, below: Gates) -> None:
        self.below = below
        self.log = EventLog()
        self.device = DeviceMover(HostArena(2, PAGE_BYTES), below.mover, GatedDevice(), self.log)

    def holds(self, tensor: PagedTensor, value: int) -> bool:
        return bool((self.device.tenants.bytes_of(tensor) == value).all())

    def arrives(self, tensor: PagedTensor) -> None:
        """Wait until a copy is there."""
        self.device.monitor.wait_until(lambda: tensor.state is R.CLEAN, tensor.name)

    def stored(self, value: int, name: str, n_pages: int = 1) -> PagedTensor:
        """A tensor of the device of which only the page files have anything."""
        return self.device.mirror(self.below.stored(value, name, n_pages))

    @property
    def down(self) -> GatedEvent:
        """The event behind what goes down."""
        assert isinstance(self.device.accelerator, GatedDevice)
        return self.device.accelerator.event_down

    def saved(self, value: int, frame: int = 0) -> PagedTensor:
        """A tensor of host memory that the device is filling."""
        lower = self.below.dirty(0, frame, f"saved {value}")
        assert self.device.save(torch.full((PAGE_BYTES,), value, dtype=torch.uint8), lower) is self.down
        return lower

    def is_there(self, lower: PagedTensor) -> None:
        """Let it be filled, and wait for that."""
        self.down.open()
        self.below.mover.monitor.wait_until(lambda: lower.state is not R.ARRIVING, lower.name)

    def comes(self, tensor: PagedTensor, frame: int) -> None:
        """The tensor's pages come into host memory."""
        self.below.mover.start_load(self.device.lower(tensor.id), FrameId(frame))
        self.below.files.take("read").open()


@contextmanager
def opened_tiers() -> Iterator[Tiers]:
    """Tiers, at rest at the end."""
    with opened() as below:
        made = Tiers(below)
        try:
            yield made
        finally:
            made.device.close()
            check_mover(made.device)
            made.device.arena.close()
