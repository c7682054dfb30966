"""The way down: gradients of a device on their way to the updater, which is behind compute by as many bytes as may be
on it.

A device computes gradients long after it was given what to compute. An updater that takes each one when autograd
delivers it would wait until the device has caught up, and the device would then stand idle while the update is made. So
gradients wait in host memory, in order, each with the mark of its copy, and go on when younger ones need their room, or
when their unit is used. By then the copy is mostly made, and the device has the backward of later layers to do
meanwhile. Sizes alone decide when a gradient goes on, so every step has the same order of ops.

The memory they wait in is a buffer of the stated size, pinned once (`pagemem.devices.staging`). A gradient that the
updater goes on to keep as it is stays in it until the update is made.

The gradient of a unit that is at home on the device stays there, but waits in line all the same, until its loss is
known.

The loss is copied down before its gradients, and looked at before the first of them goes on: nobody waits for it
either.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Final

import torch

from optim.clip import check_loss
from optim.exact.updater import ExactUpdater
from optim.gradient_holder import OtherGradients
from optim.unit import Slot, Unit
from pagemem.budget import Budget, BudgetShortage, Reservation
from pagemem.devices.accelerator import REACHED, Accelerator, DeviceEvent, has_reached
from pagemem.devices.staging import StagingBuffer
from pagemem.errors import NonFiniteError
from pagemem.process.closing import close_all
from pagemem.tier import Tag

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
class _OnItsWay:
    unit: Unit
    slot: Slot
    gradient: torch.Tensor
    there: DeviceEvent | None  # None: it stays where it is
    loss: _Loss | None
    source: torch.Tensor | None = None  # on the device, for as long as it may be copied

    @property
    def n_bytes(self) -> int:
        return self.gradient.numel() * self.gradient.dtype.itemsize

    @property
    def host_bytes(self) -> int:
        return 0 if self.there is None else self.n_bytes


class GradientDownloadQueue:
    """An `Updater` that hands gradients of a device on to another one. Training thread only, or autograd's in its
    place.

    Args:
        updater: takes the gradients in host memory.
        accelerator: copies them there.
        budget: the host budget; gradients on their way are reserved in it, tag GRAD: as many bytes as they have, or all
            that the buffer has where the device needs one.
        limit_bytes: of gradients on their way; one that is larger goes on at once.
        kept_bytes: of gradients that the updater keeps as they are; a device's buffer has room for them, too.

    Raises:
        MemoryError: the buffer cannot be mapped.
    """

    def __init__(
        self, updater: ExactUpdater, accelerator: Accelerator, budget: Budget, limit_bytes: int, kept_bytes: int
    ) -> None:
        self._updater = updater
        self._accelerator = accelerator
        self._limit_bytes = limit_bytes
        buffer_bytes = limit_bytes + kept_bytes if accelerator.stages_gradients else 0
        reserved = budget.reserve(Tag.GRAD, buffer_bytes, "gradients on their way down")
        if isinstance(reserved, BudgetShortage):
            raise AssertionError(reserved.describe())
        self._reservation: Reservation | None = reserved
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
        self._waiting: deque[_OnItsWay] = deque()
        self._loss: _Loss | None = None
        self._last_copy: DeviceEvent = REACHED
        self._waiting_bytes = self._host_bytes = 0
        self._peak_bytes = 0

    def expect(self, loss: torch.Tensor, step: int) -> None:
        """Gradients from here on are those of a loss (one element, on the device) for a step of the optimizer, counted
        from 1.

        Whatever hands the first of them on raises NonFiniteError if it is no number: taking a younger one, the next use
        of its unit, or `step`.
        """
        source = loss.detach()
        if self._losses is None:
            self._loss = _Loss(source, step, REACHED, source)
            return
        into = self._losses.take(source.dtype.itemsize)
        while into is None and self._waiting:
            self._hand_on()
            into = self._losses.take(source.dtype.itemsize)
        assert into is not None, "the losses of no gradient that waits take a page"
        self._last_copy = there = self._accelerator.copy_out(source.view(-1).view(torch.uint8), into)
        self._loss = _Loss(into.view(source.dtype), step, there, source)

    def gradient(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        """Take one gradient from autograd; older ones go on to the updater until there is room for it.

        Raises:
            As the updater's; RuntimeError: the device failed.
        """
        if gradient.layout is not torch.strided:
            self._updater.gradient(unit, slot, gradient)  # which refuses it
            return
        if slot.own is not None:
            self.catch_up(unit)
            self._updater.gradient(unit, slot, gradient.detach())  # The user's tensor has it when backward returns.
            return
        n_bytes = gradient.numel() * gradient.dtype.itemsize
        while self._waiting and self._waiting_bytes + n_bytes > self._limit_bytes:
            self._hand_on()
        if unit.home is not None and (unit.sums_at_home or self._updater.uses_as_it_is(unit, slot)):
            self._waiting.append(_OnItsWay(unit, slot, gradient.detach(), None, self._loss))
        else:
            self._waiting.append(self._brought_down(unit, slot, gradient.detach()))
        if n_bytes > self._limit_bytes:
            self._hand_on()
            return
        self._hold()
        self._peak_bytes = max(self._peak_bytes, self.direct_bytes)

    def _brought_down(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> _OnItsWay:
        """A gradient on its way into host memory."""
        if not self._accelerator.stages_gradients:
            return _OnItsWay(unit, slot, gradient, REACHED, self._loss)
        # Row by row, as an update reads it: a device is quicker at that than the CPU.
        flat = gradient.contiguous().view(-1)
        into = self._span(flat.numel() * flat.dtype.itemsize)
        if into is None:  # no room in the budget: this waits for the device, with every gradient
            return _OnItsWay(unit, slot, gradient.cpu(), REACHED, self._loss)
        self._let_go_of_copied()
        self._last_copy = there = self._accelerator.copy_out(flat.view(torch.uint8), into)
        return _OnItsWay(unit, slot, into.view(flat.dtype).view(gradient.shape), there, self._loss, flat)

    def _span(self, n_bytes: int) -> torch.Tensor | None:
        """Memory for a gradient, for which older ones go on if need be; None: there is not as much at all, or too much
        of it is kept."""
        if self._buffer is None or not 0 < n_bytes <= self._buffer.n_bytes:
            return None
        span = self._buffer.take(n_bytes)
        while span is None and self._waiting:
            self._hand_on()
            span = self._buffer.take(n_bytes)
        return span

    def _let_go_of_copied(self) -> None:
        """Give the device's memory of gradients back that are there already; they are copied in order."""
        for waiting in self._waiting:
            if waiting.source is not None:
                if waiting.there is None or not has_reached(waiting.there):
                    return
                waiting.source = None

    def _hand_on(self) -> None:
        """Give the oldest gradient to the updater.

        Raises:
            NonFiniteError: its loss is no number; all gradients of it are dropped.
        """
        self._check(self._waiting[0].loss)
        oldest = self._waiting.popleft()
        self._hold()
        if oldest.there is not None:
            oldest.there.wait()
        self._updater.gradient(oldest.unit, oldest.slot, oldest.gradient)

    def _check(self, loss: _Loss | None) -> None:
        if loss is None or loss.checked:
            return
        loss.there.wait()
        try:
            check_loss(float(loss.value), loss.step)
        except NonFiniteError:
            self._accelerator.wait_for(self._last_copy)  # the device's memory of what is dropped is let go of
            # Not checked for good: a gradient of it that autograd delivers in spite of this must not go on either.
            self._waiting = deque(waiting for waiting in self._waiting if waiting.loss is not loss)
            self._hold()
            raise
        loss.checked = True

    def _hold(self) -> None:
        assert self._reservation is not None
        self._waiting_bytes = sum(waiting.n_bytes for waiting in self._waiting)
        self._host_bytes = sum(waiting.host_bytes for waiting in self._waiting)
        if self._buffer is None:
            held = self._reservation.resize(self._host_bytes)
            if isinstance(held, BudgetShortage):
                raise AssertionError(held.describe())

    def _hand_all_on(self) -> None:
        while self._waiting:
            self._hand_on()

    def step(self) -> None:
        """As the updater's, with every gradient."""
        self._hand_all_on()
        self._loss = None
        self._updater.step()

    def catch_up(self, unit: Unit) -> None:
        """Hand on every gradient of a unit, and those before."""
        while any(waiting.unit is unit for waiting in self._waiting):
            self._hand_on()
        self._updater.catch_up(unit)

    @property
    def other_gradients(self) -> OtherGradients:
        """As the updater's."""
        return self._updater.other_gradients

    @other_gradients.setter
    def other_gradients(self, gradients: OtherGradients) -> None:
        self._updater.other_gradients = gradients

    @property
    def keeps_unoptimized(self) -> bool:
        """As the updater's."""
        return self._updater.keeps_unoptimized

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """As the updater's."""
        return self._updater.grad_norm

    def ready(self, unit: Unit, slot: Slot) -> None:
        """As the updater's, with every gradient of the unit."""
        self.catch_up(unit)
        self._updater.ready(unit, slot)

    def assign(self, unit: Unit, slot: Slot, gradient: torch.Tensor | None) -> None:
        """As the updater's; likewise."""
        self.catch_up(unit)
        self._updater.assign(unit, slot, gradient)

    def zero(self, unit: Unit, slot: Slot) -> None:
        """As the updater's; likewise."""
        self.catch_up(unit)
        self._updater.zero(unit, slot)

    def values(self, unit: Unit, slot: Slot) -> AbstractContextManager[torch.Tensor]:
        """As the updater's; likewise."""
        self.catch_up(unit)
        return self._updater.values(unit, slot)

    def bring_out(self, unit: Unit, slot: Slot) -> torch.Tensor | None:
        """As the updater's, on the device, with every gradient of the unit."""
        self.catch_up(unit)
        found = self._updater.bring_out(unit, slot)
        return None if found is None else found.to(self._accelerator.torch_device)

    def clear(self, *, zeros: bool = False) -> None:
        """As the updater's, with every gradient: what it takes may have been an update's last one."""
        self._hand_all_on()
        self._updater.clear(zeros=zeros)

    def abandon(self) -> None:
        """As the updater's, without gradients on their way."""
        self._waiting.clear()
        self._hold()
        self._loss = None
        self._updater.abandon()

    @property
    def step_under_way(self) -> bool:
        """As the updater's, with gradients on their way."""
        return bool(self._waiting) or self._updater.step_under_way

    def before_use(self, unit: Unit) -> None:
        """As the updater's, with every gradient of the unit, and those before."""
        self.catch_up(unit)
        self._updater.before_use(unit)

    def settle(self, unit: Unit) -> None:
        """As the updater's; likewise."""
        self.catch_up(unit)
        self._updater.settle(unit)

    def drain(self) -> None:
        """As the updater's."""
        self._hand_all_on()
        self._updater.drain()

    def consistent(self, *, whole: bool) -> AbstractContextManager[None]:
        """As the updater's."""
        self._hand_all_on()
        return self._updater.consistent(whole=whole)

    def close(self) -> None:
        """Forget gradients on their way, once they are copied, and close the updater. Idempotent.

        Raises:
            RuntimeError: the device failed; everything is given back all the same.
        """
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            # Copies follow one another: behind the last one nothing is written to the buffer, for gradients that were
            # dropped either.
            close_all(self._last_copy.wait, self._forget, self._updater.close, reservation.release)

    def _forget(self) -> None:
        self._loss = None
        self._waiting.clear()
        self._waiting_bytes = self._host_bytes = 0
        close_all(*(buffer.close for buffer in (self._buffer, self._losses) if buffer is not None))

    @property
    def staleness(self) -> int:
        """As the updater's."""
        return self._updater.staleness

    @property
    def dropped_steps(self) -> int:
        """As the updater's."""
        return self._updater.dropped_steps

    @property
    def dropped_gradients(self) -> int:
        """As the updater's."""
        return self._updater.dropped_gradients

    @property
    def state_frames(self) -> int:
        """As the updater's."""
        return self._updater.state_frames

    @property
    def direct_bytes(self) -> int:
        """Bytes of gradients outside the host arena now, those on their way included."""
        return self._host_bytes + self._updater.direct_bytes

    @property
    def peak_direct_bytes(self) -> int:
        """Most of them at any time."""
        return max(self._peak_bytes, self._updater.peak_direct_bytes)
