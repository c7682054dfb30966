"""A device of ordinary memory that makes its copies later than they are asked for, in order, on a thread of its own.

Compute, which the training thread does at once, sees a copy only if it was put behind its event: until then there is
NaN.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from offload.store.store_parts import StoreParts
from pagemem.devices.accelerator import Accelerator, Copy, DeviceEvent, RamDevice
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.paged_tensor import PagedTensor


@dataclass
class LateEvent:
    """Behind one copy of a `LateDevice`."""

    made: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def reached(self) -> bool:
        """Whether the copy is made."""
        return self.made.is_set()

    def wait(self) -> None:
        """Until it is."""
        assert self.made.wait(30), "a copy was never made"
        if self.error is not None:
            raise self.error

    def seconds(self) -> float:
        """As if it had a bandwidth."""
        assert self.made.is_set()
        return 1e-6


class Lying:
    """Where a flat tensor of bytes lies, without keeping it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._watch = StorageWeakRef(tensor.untyped_storage())
        self._offset, self._n_bytes = tensor.storage_offset(), tensor.numel()

    def now(self) -> torch.Tensor | None:
        """The tensor, unless it has been let go of."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._watch.cdata)
        return (
            None
            if storage is None
            else torch.empty(0, dtype=torch.uint8).set_(storage, self._offset, (self._n_bytes,), (1,))
        )


class LateDevice(RamDevice):
    """A device whose copies take a while.

    Attributes:
        late_s: how long each takes.
        followed: copies that compute was put behind. brought: losses and gradients copied down. saved: pieces of saved
            tensors. timed: times asked for. stamped: places taken to ask for them.
    """

    stages_gradients = True

    def __init__(self, late_s: float = 0.001) -> None:
        self.late_s = late_s
        self.followed = self.brought = self.saved = self.timed = self.stamped = 0
        self.fails: BaseException | None = None
        self._dead = False
        self._asked: queue.SimpleQueue[tuple[torch.Tensor | Lying, torch.Tensor, DeviceEvent, LateEvent] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="late-device")
        self._thread.start()

    def wait_for(self, event: DeviceEvent) -> None:
        """Compute begins at once, so that it has to wait here."""
        self.followed += 1
        super().wait_for(event)

    def stamp(self) -> float:
        """For which a real device has an event."""
        self.stamped += 1
        return super().stamp()

    def seconds(self, begun: float, ended: float) -> float:
        """For which a real device would be waited for."""
        self.timed += 1
        return super().seconds(begun, ended)

    def copy_up(self, source: torch.Tensor, into: torch.Tensor, after: DeviceEvent) -> Copy:
        """Later."""
        # Two bytes of ones are NaN in every float of two or four bytes.
        into.fill_(255)
        return self._later(source, into, after)

    def copy_out(self, source: torch.Tensor, into: torch.Tensor) -> DeviceEvent:
        """Later, from the memory where it lies now, which is nobody's any more if whoever asked has let go of it."""
        self.brought += 1
        into.fill_(255)
        return self._later(Lying(source), into, self.record_event())

    def _later(self, source: torch.Tensor | Lying, into: torch.Tensor, after: DeviceEvent) -> LateEvent:
        event = LateEvent()
        self._asked.put((source, into, after, event))
        return event

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            source, into, after, event = asked
            after.wait()
            time.sleep(self.late_s)
            error, self.fails = self.fails, None
            if self._dead:
                error = RuntimeError("the device is dead")
            lying = source.now() if isinstance(source, Lying) else source
            if lying is None:
                error = AssertionError("what was to be copied has been let go of")
            elif error is None:
                into.copy_(lying)
            # They are views of arenas: not kept once somebody knows of the copy, nor while waiting for the next.
            del asked, source, into, after, lying
            event.error = error
            event.made.set()
            del event

    def die(self) -> None:
        """Make no copy any more, neither of those asked for nor of later ones; no thread waits here for ever."""
        self._dead = True
        nothing = torch.zeros(1, dtype=torch.uint8)
        with suppress(RuntimeError):
            self._later(nothing, nothing, self.record_event()).wait()

    def close(self) -> None:
        """End the thread."""
        self._asked.put(None)
        self._thread.join()


@contextmanager
def late_device(patch: pytest.MonkeyPatch, late_s: float = 0.001) -> Iterator[LateDevice]:
    """Engines made inside compute on a `LateDevice` where they are asked for an emulated one."""
    device = LateDevice(late_s)

    def make(_: StoreParts) -> Accelerator:
        return device

    def save(self: DeviceMover, source: torch.Tensor, lower: PagedTensor) -> DeviceEvent:
        device.saved, device.brought = device.saved + 1, device.brought - 1
        return saves(self, source, lower)

    saves = DeviceMover.save

    try:
        with patch.context() as patched:
            patched.setattr(StoreParts, "accelerator", make)
            patched.setattr(DeviceMover, "save", save)
            yield device
    finally:
        device.close()
