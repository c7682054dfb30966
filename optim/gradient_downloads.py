"""Bounded queue of device-to-host gradient copies, in front of an updater.

A device computes gradients long after it was given what to compute. An updater that took each one when autograd
delivers it would wait until the device has caught up, and the device would then idle while the update is made. So
gradients wait in host memory, in order, each with the event of its copy. They go on to the updater when younger ones
need their room, or when their unit is used; by then the copy is mostly done. Sizes alone decide when a gradient goes
on, so every step has the same order of ops.

They wait in a buffer of fixed size, pinned once (`pagemem.devices.staging`). A gradient that the updater keeps stays in
the buffer until its update is made. The gradient of a device-resident unit stays on the device, but waits in the same
queue until its loss is known.

The loss is copied down before its gradients and checked before the first of them goes on; nobody waits for it either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import torch

from optim.scaling.clip import check_loss
from optim.unit import Slot, Unit
from pagemem.budget import Budget
from pagemem.devices.accelerator import REACHED, Accelerator, DeviceEvent, has_reached
from pagemem.devices.staging import StagingBuffer
from pagemem.errors import NonFiniteError
from pagemem.process.closing import close_all
from pagemem.tier import Tag

#: A page.
_LOSSES_BYTES: Final = 4096


@dataclass(slots=True)
class _Loss:
    """What a backward pass begins with."""

    value: torch.Tensor
    step: int
    there: DeviceEvent
    source: torch.Tensor  # on the device, for as long as it may be copied
    checked: bool = False


@dataclass(slots=True)
class Download:
    """One gradient in the queue, or leaving it."""

    unit: Unit
    slot: Slot
    gradient: torch.Tensor
    there: DeviceEvent | None  # None: it stays where it is
    loss: _Loss | None
    source: torch.Tensor | None = None  # on the device, for as long as it may be copied

    @property
    def n_bytes(self) -> int:
        """Of the gradient."""
        return self.gradient.numel() * self.gradient.dtype.itemsize

    @property
    def host_bytes(self) -> int:
        """Of the gradient, where it is or comes into host memory."""
        return 0 if self.there is None else self.n_bytes


class GradientDownloadQueue:
    """Holds gradients until they are due. Training thread only, or autograd's in its place.

    Methods that return an iterator yield the gradients that have to go on, one by one. Whoever iterates must consume
    each and drop it before asking for the next, since that is what makes room, and must iterate to the end.

    Args:
        accelerator: copies gradients to host memory.
        budget: the host budget; gradients on their way are reserved in it, tag GRAD: the bytes they have, or the whole
            buffer where the device needs one.
        limit_bytes: of gradients on their way; a larger one goes on at once.
        kept_bytes: of gradients that the updater keeps as they are; a device's buffer has room for them, too.
        finish_update: waits until the oldest update that a worker has yet to make is made, so that the room of its
            gradients is free; returns whether there was one.

    Raises:
        MemoryError: the buffer cannot be mapped.
    """

    def __init__(
        self, accelerator: Accelerator, budget: Budget, limit_bytes: int, kept_bytes: int,
        finish_update: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._accelerator = accelerator
        self._finish_update = finish_update
        self._limit_bytes = limit_bytes
        buffer_bytes = limit_bytes + kept_bytes if accelerator.stages_gradients else 0
        reserved = budget.reserve(Tag.GRAD, buffer_bytes, "gradients on their way down")
        self._reservation = reserved
        self._buffer: StagingBuffer | None = None
        self._losses: StagingBuffer | None = None  # a page, like the losses themselves in no budget
        with ExitStack() as undo:
            undo.callback(reserved.release)
            if buffer_bytes:
                self._buffer = StagingBuffer(buffer_bytes, accelerator.pin)
                undo.callback(self._buffer.close)
            if accelerator.stages_gradients:
                self._losses = StagingBuffer(_LOSSES_BYTES, accelerator.pin)
            undo.pop_all()
        self._waiting: deque[Download] = deque()
        self._loss: _Loss | None = None
        self._last_copy: DeviceEvent = REACHED
        self._waiting_bytes = 0
        self.host_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def torch_device(self) -> torch.device:
        """Where the gradients come from."""
        return self._accelerator.torch_device

    def expect(self, loss: torch.Tensor, step: int) -> Iterator[Download]:
        """Gradients from here on belong to a loss (one element, on the device) of an optimizer step, counted from 1.

        NonFiniteError is raised before the first of them goes on, if the loss is NaN or infinite.
        """
        source = loss.detach()
        if self._losses is None:
            self._loss = _Loss(source, step, REACHED, source)
            return
        into = self._losses.take(source.dtype.itemsize)
        while into is None and self._waiting:
            yield self._pop()
            into = self._losses.take(source.dtype.itemsize)
        assert into is not None, "the losses of no gradient that waits take a page"
        self._last_copy = there = self._accelerator.copy_out(source.view(-1).view(torch.uint8), into)
        self._loss = _Loss(into.view(source.dtype), step, there, source)

    def put(
        self, unit: Unit, slot: Slot, gradient: torch.Tensor, used_in_place: Callable[[Unit, Slot], bool]
    ) -> Iterator[Download]:
        """Queue a gradient (dense, detached); older ones go on until there is room for it.

        Args:
            used_in_place: whether the update uses this very tensor, asked once there is room.

        Raises:
            NonFiniteError: as `take`. RuntimeError: the device failed.
        """
        n_bytes = gradient.numel() * gradient.dtype.itemsize
        while self._waiting and self._waiting_bytes + n_bytes > self._limit_bytes:
            yield self._pop()
        if unit.device_resident and (unit.sums_resident or used_in_place(unit, slot)):
            self._waiting.append(Download(unit, slot, gradient, None, self._loss))
        else:
            self._waiting.append((yield from self._begin_copy(unit, slot, gradient)))
        if n_bytes > self._limit_bytes:
            yield self._pop()
        else:
            self._reserve_waiting()

    def take(self, unit: Unit | None = None) -> Iterator[Download]:
        """Take every gradient of a unit and those queued before; None: all gradients.

        Raises:
            NonFiniteError: the loss of the next one is NaN or infinite; all gradients of that loss are dropped.
            RuntimeError: the device failed.
        """
        while self._waiting and (unit is None or any(waiting.unit is unit for waiting in self._waiting)):
            yield self._pop()

    def drop(self) -> None:
        """Give up what waits, and the loss."""
        self._waiting.clear()
        self._reserve_waiting()
        self._loss = None

    def end_step(self) -> None:
        """Gradients from here on belong to no loss that is known."""
        self._loss = None

    def close(self) -> None:
        """Forget the gradients on their way, once they are copied, and give all memory back. Idempotent.

        Raises:
            RuntimeError: the device failed; everything is given back all the same.
        """
        if not self._reservation.released:
            buffers = [buffer.close for buffer in (self._buffer, self._losses) if buffer is not None]
            # Copies follow one another: behind the last one nothing is written to the buffer, for gradients that were
            # dropped either.
            close_all(self._last_copy.wait, self.drop, *buffers, self._reservation.release)

    def _begin_copy(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> Generator[Download, None, Download]:
        """A gradient on its way into host memory."""
        if not self._accelerator.stages_gradients:
            return Download(unit, slot, gradient, REACHED, self._loss)
        # Row by row, as an update reads it: a device is quicker at that than the CPU.
        flat = gradient.contiguous().view(-1)
        into = yield from self._span(flat.numel() * flat.dtype.itemsize)
        if into is None:  # no room in the budget: this waits for the device, with every gradient
            return Download(unit, slot, gradient.cpu(), REACHED, self._loss)
        self._release_copied()
        self._last_copy = there = self._accelerator.copy_out(flat.view(torch.uint8), into)
        return Download(unit, slot, into.view(flat.dtype).view(gradient.shape), there, self._loss, flat)

    def _span(self, n_bytes: int) -> Generator[Download, None, torch.Tensor | None]:
        """Memory for a gradient, for which older ones go on if need be; None: the buffer is too small, or the updater
        keeps too much of it."""
        if self._buffer is None or not 0 < n_bytes <= self._buffer.n_bytes:
            return None
        span = self._buffer.take(n_bytes)
        while span is None:
            # First what a worker has yet to use is waited for, so that what goes on does not depend on how far it is.
            if not self._finish_update():
                if not self._waiting:
                    break
                yield self._pop()
            span = self._buffer.take(n_bytes)
        return span

    def _release_copied(self) -> None:
        """Release the device's memory of gradients whose copies are done; copies are made in order."""
        for waiting in self._waiting:
            if waiting.source is not None:
                if waiting.there is None or not has_reached(waiting.there):
                    return
                waiting.source = None

    def _pop(self) -> Download:
        """The oldest gradient, copied."""
        self._check(self._waiting[0].loss)
        oldest = self._waiting.popleft()
        self._reserve_waiting()
        if oldest.there is not None:
            oldest.there.wait()
        return oldest

    def _check(self, loss: _Loss | None) -> None:
        if loss is None or loss.checked:
            return
        loss.there.wait()
        try:
            check_loss(float(loss.value), loss.step)
        except NonFiniteError:
            self._accelerator.wait_for(self._last_copy)  # the device's memory of what is dropped is released
            # Not checked for good: a gradient of it that autograd delivers in spite of this must not go on either.
            self._waiting = deque(waiting for waiting in self._waiting if waiting.loss is not loss)
            self._reserve_waiting()
            raise
        loss.checked = True

    def _reserve_waiting(self) -> None:
        self._waiting_bytes = sum(waiting.n_bytes for waiting in self._waiting)
        self.host_bytes = sum(waiting.host_bytes for waiting in self._waiting)
        if self._buffer is None and not self._reservation.resize(self.host_bytes):
            raise AssertionError(f"{self.host_bytes} bytes of gradients on their way do not fit in the budget")
