"""Residency in the device arena: whole tensors of host pages, copied up, and dropped when their frames are wanted.

What is on the device is a copy: the tier below is authoritative, and may for its part have the bytes on SSD. A tensor
that compute edits is written back at once by the training thread (`scheduler.execution.edits_above`); updates of it
are made below, after which the copy is out of date and is dropped. So nothing is ever stored from here, and dropping
costs nothing.

The copy of a load waits until the tensor is in host memory, which nothing here sees to. It is there, for compute that
is put behind it (`DeviceMover.wait_for`), as soon as the copy is enqueued on the device.

A device-resident tensor is changed in its frames, is authoritative here, and never leaves. Below is what
it was when it was last brought down, for a commit.
"""

from __future__ import annotations

import torch

from pagemem import knobs
from pagemem.devices.accelerator import Accelerator, DeviceEvent
from pagemem.devices.arena import Arena
from pagemem.files.transfer import Completion
from pagemem.frames.page import TensorId
from pagemem.process.closing import close_all
from pagemem.residency.host_mover import HostMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.residency.upload_queue import UploadQueue
from pagemem.telemetry.events import EventSink
from pagemem.tier import Tier


class DeviceMover(Mover):
    """Owns the residency of every tensor of one device arena. Threads as `Mover`; its lock is taken before that of
    ``below``.

    Args:
        arena: the device's frames.
        below: owner of the host pages.
        accelerator: makes the copies, and says what compute is enqueued.

    Attributes:
        edited: tensors that were changed here and that have not been written back yet.
        changed_resident: likewise, of device-resident ones, which stay so for many steps.

    Raises:
        StorageError: the system starts no more threads.
    """

    tier = Tier.DEVICE
    setting = "memory.device"

    def __init__(self, arena: Arena, below: HostMover, accelerator: Accelerator, sink: EventSink) -> None:
        super().__init__(arena, sink)
        self._ids = below._ids  # one tensor has one number in all tiers
        self.below = below
        self.accelerator = accelerator
        self.edited: dict[TensorId, PagedTensor] = {}
        self.changed_resident: dict[TensorId, PagedTensor] = {}
        self._lower: dict[TensorId, PagedTensor] = {}
        self._copies: dict[TensorId, PagedTensor] = {}  # by the number of what is below
        self._events: dict[TensorId, DeviceEvent] = {}  # of copies that compute has not been put behind yet
        self.gathered.comes_up = self._comes_up
        self._copier = UploadQueue(below, accelerator, self.monitor.note_failure, sink)

    def mirror(self, lower: PagedTensor) -> PagedTensor:
        """A tensor of the device whose content is that of one below.

        Raises:
            ValueError: that one is gathered, which is done where it is used: mirror its shard and gather here.
        """
        if lower.id in self.below.gathered:
            raise ValueError(f"{lower.name} is gathered in host memory; copy its shard up and gather on the device")
        with self.changed:
            tensor = self.create(lower.name, lower.tag, lower.n_bytes)
            tensor.become(Residency.STORED)
            tensor.ssd_valid = True
            self._lower[tensor.id], self._copies[lower.id] = lower, tensor
            return tensor

    def lower(self, tensor: TensorId) -> PagedTensor:
        """The tensor below that one of the device is a copy of."""
        return self._lower[tensor]

    def copy_of(self, lower: PagedTensor) -> PagedTensor | None:
        """The tensor of the device that is a copy of one below, if there is one. Any thread."""
        return self._copies.get(lower.id)

    def waits_below(self, tensor: PagedTensor) -> bool:
        """Whether the copy of a tensor has yet to begin, until when what is below must stay. With the lock of the mover
        below held."""
        return tensor.state is Residency.LOADING and self._copier.waits_for(self._lower[tensor.id])

    def _comes_up(self, tensor: PagedTensor, before: int) -> bool:
        """Whether what a copy that is on its way needs below is there, or comes by tasks numbered before another."""
        if not self.mirrors(tensor):
            return True
        lower = self._lower[tensor.id]
        with self.below.changed:
            there = lower.readable or lower.state is Residency.LOADING or not self.waits_below(tensor)
            return there or self.below.gathered.is_queued(lower.id, before)

    def is_given(self, tensor: PagedTensor) -> bool:
        """Whether the copy of a tensor is on its way and needs nothing below any more. With the lock of the mover
        below held."""
        return tensor.state is Residency.LOADING and not self._copier.has(self._lower[tensor.id])

    def mirrors(self, tensor: PagedTensor) -> bool:
        """Whether there is one below of which a tensor is a copy."""
        return tensor.id in self._lower

    def pairs(self) -> list[tuple[PagedTensor, PagedTensor]]:
        """Every copy, and the tensor below that it is one of."""
        return [(self.tensors[number], lower) for number, lower in self._lower.items()]

    def forget(self, tensor: PagedTensor) -> None:
        """As `Mover.forget`."""
        super().forget(tensor)
        self._events.pop(tensor.id, None)
        lower = self._lower.pop(tensor.id, None)
        if lower is not None and self._copies.get(lower.id) is tensor:
            del self._copies[lower.id]

    # ---- moves -------------------------------------------------------------------------------------------------

    def _read(self, tensor: PagedTensor, done: Completion, *, background: bool) -> None:
        def enqueued(result: DeviceEvent | BaseException) -> None:
            if isinstance(result, BaseException):
                done(result)
                return
            with self.changed:
                self._events[tensor.id] = result
                done(None)

        try:
            # Compute that is enqueued until now may use the frames: nobody holds them any more, so nothing later
            # does.
            after = self.accelerator.record_event()
        except RuntimeError as error:
            done(error)  # the device failed: whoever waits for the copy hears of it as of one that failed
            return
        self._copier.submit(self._lower[tensor.id], self.tenants.bytes_of(tensor), after, enqueued, done)

    def _loaded(self, tensor: PagedTensor, started_s: float, error: BaseException | None) -> None:
        with self.changed:  # the copier tells of copies, from when it made them
            self._end_load(tensor, error)

    def wait_for(self, tensor: PagedTensor) -> None:
        """Have compute that is enqueued from now on see what was copied. Training thread."""
        with self.changed:
            event = self._events.pop(tensor.id, None)
        if event is not None:
            self.accelerator.wait_for(event)

    def save(self, source: torch.Tensor, lower: PagedTensor) -> DeviceEvent:
        """Copy bytes that compute has made (uint8, flat) into a dirty tensor of the tier below, which is not moved
        before they are there.

        Returns:
            An event, behind which ``source`` may be let go of. Training thread.
        """
        into = self.below.begin_arrival(lower)[: source.numel()]
        try:
            event = self.accelerator.copy_out(source, into)
        except BaseException:
            self.below.end_arrival(lower)
            raise
        self._copier.arrives(lower, event)
        return event

    def restore(self, lower: PagedTensor, into: torch.Tensor) -> DeviceEvent:
        """Copy bytes of a readable tensor of the tier below into memory of the device that compute has just got (uint8,
        flat).

        Returns:
            The event that compute has to be put behind before it reads them. Training thread.
        """
        source = self.below.begin_upload(lower)[: into.numel()]
        try:
            copy = self.accelerator.copy_up(source, into, self.accelerator.record_event())
        except BaseException:
            self.below.end_upload(lower)
            raise
        self._copier.begun(lower, copy)
        return copy

    def take_back_load(self, tensor: PagedTensor) -> bool:
        """Undo a load whose copy has not begun; returns whether it was one. One that has begun ends by itself."""
        with self.changed:
            begins = tensor.state is Residency.LOADING and self.mirrors(tensor)
            if not begins or not self._copier.take_back(self._lower[tensor.id]):
                return False
            self.monitor.ended(None)
            tensor.become(Residency.STORED)
            self._move_out(tensor)
            self.monitor.notify()
        with self.below.changed:
            self.below.monitor.notify()  # what is there may leave now
        return True

    def take_back_loads(self) -> None:
        """Undo all loads whose copies have not begun."""
        with self.changed:
            for tensor in self.tensors.values():
                self.take_back_load(tensor)

    def touch(self, tensor: PagedTensor) -> None:
        """As `Mover.touch`; the tensor is to be written back."""
        with self.changed:
            super().touch(tensor)
            if self.mirrors(tensor):
                (self.changed_resident if tensor.resident else self.edited)[tensor.id] = tensor

    def start_store(self, tensor: PagedTensor, *, background: bool = False) -> None:
        """Leave an edited tensor dirty and where it is: who edits one writes it back at once, see `written_back`."""

    def written_back(self, tensor: PagedTensor) -> None:
        """The tensor below has the content of an edited one, or of one that may have been."""
        with self.changed:
            self.edited.pop(tensor.id, None)
            self.changed_resident.pop(tensor.id, None)
            if tensor.state is Residency.DIRTY:
                tensor.become(Residency.STORING)
                tensor.become(Residency.CLEAN)
            tensor.ssd_valid = True
            self.monitor.notify()

    def renew(self, tensor: PagedTensor) -> bool:
        """The tensor below has changed: drop what is here of it.

        Returns:
            Whether that was possible; if not, views of it are in use and its frames have to be filled anew.
        """
        with self.changed:
            self.gathered.changed(tensor)
            self.take_back_load(tensor)
            self.monitor.wait_until(lambda: not tensor.moving, tensor.name, tensor.n_bytes)
            if tensor.state is Residency.CLEAN and not tensor.held:
                self.drop(tensor)
            else:
                self.wait_for(tensor)
            return tensor.frame is None

    # ---- the rest ----------------------------------------------------------------------------------------------

    def bandwidth(self) -> tuple[float, float]:
        """Bytes/s of copies up so far, while there were any; nothing goes down by plan."""
        copier = self._copier
        told = copier.copied_bytes >= knobs.TELLING_BYTES and copier.busy_s > 0
        up = copier.copied_bytes / copier.busy_s if told else knobs.ASSUMED_UPLOAD_BYTES_PER_S
        return up, up

    def close(self) -> None:
        """Wait until no copy is under way and end the threads. Idempotent."""
        close_all(self.take_back_loads, super().close, self._copier.close)
