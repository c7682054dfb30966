"""What the engine asks of either update mode, and what both do alike: arrival of gradients, and ``parameter.grad``.

Gradients that have not been used yet can be read, edited, replaced and dropped, as in plain PyTorch. One whose update
was made during the backward pass is gone: using it raises, and so does a gradient that plain PyTorch would add to it.
Units whose gradients somebody has touched are updated at the optimizer step from then on, so a loop that does so from
its first step on works as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar

import torch

from optim import gradient_errors
from optim.arrivals import Arrivals
from optim.gradient_budget import GradientBudget
from optim.gradient_downloads import Download, GradientDownloadQueue
from optim.training import Training
from optim.unit import Grad, Hyper, Slot, Unit
from pagemem.process.closing import close_all


class Updater(ABC):
    """Takes gradients and brings parameters up to date. All methods belong to the training thread.

    Args:
        training: what is trained, and how.
        budget: of gradients outside the host arena.
        downloads: queue of gradients on their way from a device; None where gradients are in host memory.

    Attributes:
        state_frames: host frames that the updater has for itself, outside the plan.
        grad_norm: global norm of the gradients of the last step; None where nobody needed it.
        dropped_steps: whose gradients were not finite, and so not applied; dropped_gradients: of single units.
    """

    #: Whether gradients of parameters that are not optimized are to be delivered, too.
    keeps_unoptimized: ClassVar[bool]

    def __init__(
        self, training: Training, budget: GradientBudget, downloads: GradientDownloadQueue | None = None
    ) -> None:
        self._training = training
        self._driver = training.driver
        self._index = training.index
        self._eager = training.eager
        self._budget = budget
        self._downloads = downloads
        self._slots = training.index.slots()
        self._arrivals = Arrivals(training.index)
        self._used_hypers: Sequence[Hyper] | None = None
        self._divided = False  # by the number of ranks: the losses of the step under way
        self.state_frames = self._peak_bytes = 0
        self.grad_norm: torch.Tensor | None = None
        self.dropped_steps = self.dropped_gradients = 0

    # ---- what the modes differ in ------------------------------------------------------------------------------

    @abstractmethod
    def step(self) -> None:
        """The optimizer step: no gradient belongs to this step any more."""

    @abstractmethod
    def before_use(self, unit: Unit) -> None:
        """A unit is about to be used in a step."""

    @abstractmethod
    def settle(self, unit: Unit) -> None:
        """A unit is about to be looked at or edited: it must have every update of the steps made."""

    @abstractmethod
    def consistent(self, *, whole: bool) -> AbstractContextManager[None]:
        """Between two steps: inside the block every unit's parameters and states are of the same updates, and stay so.

        Args:
            whole: with every update of the steps made; otherwise gradients on their way may be missing, so that
                training waits for no more than the unit being updated.
        """

    @abstractmethod
    def _take(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        """Take one gradient that is where updates look for it."""

    @abstractmethod
    def _complete(self, unit: Unit) -> None:
        """Update a unit, or hand its gradients over, if they are all there and nothing is to be waited for."""

    @abstractmethod
    def _forget(self, unit: Unit, slots: Sequence[Slot]) -> None:
        """Release the bytes of gradients that no update needs."""

    @abstractmethod
    def _before_look(self, unit: Unit) -> None:
        """Before a gradient is looked at or replaced: have the update made that still needs its bytes."""

    @abstractmethod
    def _bytes(self, unit: Unit, slot: Slot) -> AbstractContextManager[torch.Tensor]:
        """Inside the block: the flat sum of a parameter's gradient, which is HELD. What is written to it is kept."""

    @abstractmethod
    def _make_zeros(self, unit: Unit, slot: Slot) -> None:
        """Have bytes for a gradient that is ZEROS: it is HELD then."""

    @property
    def staleness(self) -> int:
        """Steps that the parameters in use miss, in the unit that is furthest behind."""
        return 0

    @property
    def direct_bytes(self) -> int:
        """Bytes of gradients outside the host arena now, those on their way and new parameters included."""
        return self._budget.n_bytes + (0 if self._downloads is None else self._downloads.host_bytes)

    @property
    def peak_direct_bytes(self) -> int:
        """Most of them at any time."""
        return max(self._peak_bytes, self._budget.peak_bytes)

    def drain(self) -> None:
        """Have every update of the steps made, in every unit."""
        self.catch_up(None)
        for unit in self._index.units:
            self.settle(unit)

    def close(self) -> None:
        """End what works in the background and give memory back, once gradients on their way are copied. Idempotent.

        Raises:
            RuntimeError: the device failed; everything is given back all the same.
        """
        close_all(*([] if self._downloads is None else [self._downloads.close]), self._budget.close)

    # ---- arrivals ----------------------------------------------------------------------------------------------

    def expect(self, loss: torch.Tensor, step: int) -> None:
        """A backward pass begins with a loss (one element) for an optimizer step, counted from 1.

        Raises:
            NonFiniteError: the loss is NaN or infinite, on any rank. With one on a device nobody waits for it: what
                first uses one of its gradients raises instead, and drops them all.
        """
        if self._downloads is not None and loss.device == self._downloads.torch_device:
            self._take_all(self._downloads.expect(loss, step))
        else:
            self._training.check_loss(float(loss.detach()), step)
        self._divided = True

    def gradient(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        """Take one gradient from autograd; the unit is updated when it was the last one it waited for.

        Raises:
            StaleGradientError: what it is to be added to has been used up; this one is lost, nothing else is.
            ValueError: it is sparse, or has a graph of its own.
            NonFiniteError: the loss of an older gradient is NaN or infinite. RuntimeError: the device failed.
        """
        if self._downloads is None or gradient.layout is not torch.strided:
            self._take(unit, slot, gradient)
        elif slot.own is not None:
            self.catch_up(unit)
            self._take(unit, slot, gradient.detach())  # The user's tensor has it when backward returns.
        else:
            self._take_all(self._downloads.put(unit, slot, gradient.detach(), self._uses_in_place))
            self._peak_bytes = max(self._peak_bytes, self.direct_bytes)

    def catch_up(self, unit: Unit | None) -> None:
        """Take every gradient on its way to a unit, and those before; None: all gradients."""
        if self._downloads is not None:
            self._take_all(self._downloads.take(unit))

    def ready(self, unit: Unit, slot: Slot) -> None:
        """No gradient of a parameter comes any more in this step, whatever earlier steps foretell."""
        self.catch_up(unit)
        slot.final = True
        self._complete(unit)

    def _take_all(self, downloads: Iterable[Download]) -> None:
        for download in downloads:
            self._take(download.unit, download.slot, download.gradient)
            del download  # its memory is what the next one may wait for

    def _uses_in_place(self, unit: Unit, slot: Slot) -> bool:
        """Whether a gradient that comes now is the parameter's only one of the step, and used as autograd made it."""
        single = self._arrivals.is_single(slot) and not unit.touched and not slot.has_bytes
        return self._eager and single and slot.group >= 0 and unit.sharing is None

    @property
    def step_under_way(self) -> bool:
        """Whether gradients have come since the last step."""
        return bool(self._downloads) or bool(self._arrivals)

    # ---- what users do -----------------------------------------------------------------------------------------

    def assign(self, unit: Unit, slot: Slot, gradient: torch.Tensor | None) -> None:
        """``parameter.grad = gradient``, a tensor shaped like the parameter, which stays the user's, or None.

        Raises:
            RuntimeError: the parameter's update of this step has been made.
        """
        self.catch_up(unit)
        if gradient is None and slot.grad is Grad.NONE:
            return
        self._before_change(unit, slot)
        unit.touched = unit.touched or slot.arrivals > 0
        if gradient is not None:
            self._before_look(unit)
        self._drop(unit, slot, Grad.NONE)
        if gradient is not None:
            slot.generation += 1
            slot.own = gradient
            slot.become(Grad.OWN)

    def zero(self, unit: Unit, slot: Slot) -> None:
        """``parameter.grad.zero_()``.

        Raises:
            RuntimeError: as `assign`.
        """
        self._before_change(unit, slot)
        unit.touched = unit.touched or slot.arrivals > 0
        self._drop(unit, slot, Grad.ZEROS)

    @contextmanager
    def values(self, unit: Unit, slot: Slot) -> Iterator[torch.Tensor]:
        """Inside the block: the flat gradient, which is not the user's own, to be read or edited in place.

        Raises:
            RuntimeError: it has been used up. BudgetError, StorageError: its pages cannot be brought.
        """
        self.catch_up(unit)
        gradient_errors.check_unshared(unit, slot)
        unit.touched = True
        if slot.grad is Grad.SPENT:
            raise self._spent(slot)
        self._before_look(unit)
        if slot.grad is Grad.ZEROS:
            self._make_zeros(unit, slot)
        slot.norm = None
        with self._bytes(unit, slot) as flat:
            yield flat

    def bring_out(self, unit: Unit, slot: Slot) -> torch.Tensor | None:
        """Take a gradient away, to compute's device, for hooks that see it with the next one; None: there is none.

        Raises:
            StaleGradientError: it has been used up.
        """
        self.catch_up(unit)
        if slot.grad is not Grad.NONE:
            gradient_errors.check_unshared(unit, slot)
        if slot.grad is Grad.SPENT:
            raise gradient_errors.stale_gradient(unit, slot)
        if slot.own is not None:
            found, slot.own = slot.own, None
        elif slot.grad is Grad.HELD:
            self._before_look(unit)
            with self._bytes(unit, slot) as flat:
                found = flat.clone().view(slot.shape)
            self._forget(unit, [slot])
        else:
            return None
        slot.become(Grad.NONE)
        return found if self._downloads is None else found.to(self._downloads.torch_device)

    def clear(self, *, zeros: bool = False) -> None:
        """``optimizer.zero_grad()``: after a step, or in place of one; leaves ``zeros``, or None.

        Raises:
            RuntimeError: some updates of the step have been made already; nothing was changed.
        """
        self.catch_up(None)  # what it takes may have been an update's last gradient
        if any(unit.updated for unit in self._index.units):
            raise gradient_errors.skipped_step()
        skipped = any(slot.arrivals for _, slot in self._slots)
        # What a step that is skipped ends with is not part of any plan.
        with self._driver.untraced() if skipped else nullcontext():
            self._drop_all(Grad.ZEROS if zeros else Grad.NONE)
        self._arrivals.forget()
        if skipped:
            self._driver.abandon_step()

    def abandon(self) -> None:
        """Give the step under way up: gradients that were not used are dropped, updates that were made stay."""
        with self._driver.untraced():
            self._drop_all(Grad.NONE)
        self._arrivals.restart()
        self._used_hypers = None
        self._driver.abandon_step()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _before_change(self, unit: Unit, slot: Slot) -> None:
        self.catch_up(unit)
        gradient_errors.check_unshared(unit, slot)
        if slot.grad is Grad.SPENT and unit.updated:
            raise self._spent(slot)

    def _spent(self, slot: Slot) -> RuntimeError:
        for unit in self._index.units:
            unit.touched = True  # Whoever wants one gradient is going to want others.
        return gradient_errors.spent_gradient(slot)

    def _drop_all(self, grad: Grad) -> None:
        for unit, slot in self._slots:
            if slot.grad is not Grad.NONE:
                self._drop(unit, slot, grad)

    def _drop(self, unit: Unit, slot: Slot, grad: Grad) -> None:
        """Have a gradient be NONE or ZEROS; bytes that a pending update needs stay until it is made."""
        if slot.own is not None:
            if grad is Grad.ZEROS:
                slot.own.zero_()
                return
            slot.own = None
        if slot.has_bytes and unit.pending is None:
            self._forget(unit, [slot])
        if grad is Grad.NONE:
            slot.generation += 1
        if grad is not slot.grad:
            slot.become(grad)

    def _begin_step(self) -> Sequence[Hyper]:
        """Check that the step can be made; returns its hyper-parameters.

        Raises:
            RuntimeError: updates of this step had used other ones, or an earlier step's gradient was not cleared.
        """
        hypers = self._training.hypers()
        if self._used_hypers is not None and list(self._used_hypers) != list(hypers):
            raise gradient_errors.changed_hypers()
        self._arrivals.check_cleared()
        return hypers

    def _use_hypers(self) -> Sequence[Hyper]:
        """The present hyper-parameters, with which an update of the step under way is made before the step's end."""
        hypers = self._training.hypers()
        self._used_hypers = self._used_hypers or hypers
        return hypers

    def _note_norm(self, total: torch.Tensor) -> None:
        self.grad_norm = self._training.scaling.unscaled(total)

    def _end_step(self) -> None:
        repeatable = self._arrivals.foretold
        self._arrivals.end_step()
        self._used_hypers, self._divided = None, False
        self._driver.end_step(repeatable=repeatable)
