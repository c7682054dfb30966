"""What computes out of a device's memory, and how bytes get there and back: the seam between the tiers and a kind of
device.

A device works through what is enqueued on it in order, and long after that. A `DeviceEvent` is a point in its queue.
Copies are ordered by events, on the device alone: an upload begins after the event of what last used its frames, and
compute goes on after the events of the copies that it needs. The training thread waits for none of them.

`RamDevice` is a device of ordinary memory, which has done everything by the time it is enqueued.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final, Protocol

import numpy as np
import torch

from pagemem.devices.arena import Arena, HostArena, Pin

_LOG: Final = logging.getLogger(__name__)


class DeviceEvent(Protocol):
    """A point in a device's queue. Any thread."""

    def reached(self) -> bool:
        """Whether everything before it is done."""

    def wait(self) -> None:
        """Block the calling thread until everything before it is done.

        Raises:
            RuntimeError: the device failed; what torch says of it.
        """


class Copy(DeviceEvent, Protocol):
    """An event behind a copy."""

    def seconds(self) -> float:
        """How long the copy itself took; once it is reached."""


class Accelerator(Protocol):
    """One device. Any thread, unless a method says otherwise."""

    @property
    def torch_device(self) -> torch.device:
        """Where tensors of it are."""

    @property
    def pin(self) -> Pin | None:
        """What makes host memory fit for its copies; None: any memory is."""

    @property
    def stages_gradients(self) -> bool:
        """Whether its gradients and losses are copied into host memory, by `copy_out`. False: where they are is host
        memory."""

    def use_in_thread(self) -> None:
        """Have the calling thread's calls go to this device: a new thread that works for it calls this first.

        Raises:
            RuntimeError: the device failed; what torch says of it.
        """

    def make_arena(self, n_frames: int, page_bytes: int) -> Arena:
        """An arena in the device's memory.

        Raises:
            MemoryError: it has no room; the message says how much there is.
        """

    def record_event(self) -> DeviceEvent:
        """An event behind all compute that is enqueued so far."""

    def wait_for(self, event: DeviceEvent) -> None:
        """Have compute that is enqueued from now on begin after ``event``."""

    def stamp(self) -> Any:
        """The moment when all compute that is enqueued so far is done. Does not wait for it."""

    def seconds(self, begun: Any, ended: Any) -> float:
        """From one stamp to a later one; waits until compute has come to that.

        Raises:
            RuntimeError: the device failed; what torch says of it.
        """

    def check(self) -> None:
        """Make sure that the calling thread enqueues its compute where `record_event` and `wait_for` look.

        Raises:
            DeviceError: it enqueues it elsewhere; says what to change.
        """

    def copy_up(self, source: torch.Tensor, into: torch.Tensor, after: DeviceEvent) -> Copy:
        """Copy bytes (uint8, flat, of one size) from host memory into the device's, after ``after`` and after those
        asked for before.

        Does not wait for it.
        """

    def copy_out(self, source: torch.Tensor, into: torch.Tensor) -> DeviceEvent:
        """Copy bytes (uint8, flat, of one size) of the device into host memory, as they are when all compute that is
        enqueued so far is done. Does not wait for it: neither is to be changed or let go of before compute is put
        behind the event."""


class TimedCopy:
    """A copy that was made when it was asked for; an event that needs no waiting for."""

    def __init__(self, spent_s: float) -> None:
        self._spent_s = spent_s

    def reached(self) -> bool:
        """It is."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def seconds(self) -> float:
        """What it took."""
        return self._spent_s


REACHED: Final[DeviceEvent] = TimedCopy(0.0)


def has_reached(event: DeviceEvent) -> bool:
    """Whether an event is known to be reached. One of a device that failed is not; waiting for it raises."""
    try:
        return event.reached()
    except RuntimeError as error:
        _LOG.debug("an event cannot be asked for: %s", error)
        return False


class RamDevice:
    """A device whose memory is RAM and whose compute is the training thread's own; see `Accelerator`."""

    torch_device = torch.device("cpu")
    pin: Pin | None = None
    stages_gradients = False

    def use_in_thread(self) -> None:
        """Threads have nothing to set."""

    def make_arena(self, n_frames: int, page_bytes: int) -> Arena:
        """Frames in RAM."""
        return HostArena(n_frames, page_bytes)

    def record_event(self) -> DeviceEvent:
        """Compute is done when its call returns."""
        return REACHED

    def wait_for(self, event: DeviceEvent) -> None:
        """Wait: enqueued compute begins at once."""
        event.wait()

    def stamp(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, begun: float, ended: float) -> float:
        """The difference."""
        return ended - begun

    def check(self) -> None:
        """There is one queue only."""

    def copy_up(self, source: torch.Tensor, into: torch.Tensor, after: DeviceEvent) -> Copy:
        """Copy on the calling thread alone; torch would start a team of its own beside the one that computes."""
        after.wait()
        began_s = time.perf_counter()
        np.copyto(into.numpy(), source.numpy())
        return TimedCopy(time.perf_counter() - began_s)

    def copy_out(self, source: torch.Tensor, into: torch.Tensor) -> DeviceEvent:
        """At once; with torch's threads, since the training thread has nothing else to do."""
        into.copy_(source)
        return REACHED
