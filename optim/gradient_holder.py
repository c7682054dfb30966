"""What ``parameter.grad`` is, for those who look at gradients or change them: the part that both update modes have in
common.

Gradients that have not been used yet can be read, edited, replaced and dropped, as in plain PyTorch. One whose update
was made during the backward pass is gone: using it raises, and so does a gradient that plain PyTorch would add to it.
Units whose gradients somebody has touched are updated at the optimizer step from then on, so a loop that does so from
its first step on works as it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from optim.unit import ABANDON_HINT, START_HINT, Grad, Hyper, Slot, Unit, UnitIndex, spent_gradient, stale_gradient
from scheduler.execution.driver import Driver

#: Place among the model's parameters, and gradient, of each parameter that has one which is not in the updater's hands.
OtherGradients = Callable[[], Sequence[tuple[int, torch.Tensor]]]


class GradientHolder(ABC):
    """Knows the gradient of each paged parameter. Training thread only.

    Args:
        driver: keeps the trace.
        index: the model's units.
        hypers: current hyper-parameters of all groups.
    """

    def __init__(self, driver: Driver, index: UnitIndex, hypers: Callable[[], Sequence[Hyper]]) -> None:
        self._driver = driver
        self._index = index
        self._hypers = hypers
        self._slots = index.slots()
        self._foretold = False
        self._most_passes = 0
        self._used_hypers: Sequence[Hyper] | None = None
        self.other_gradients: OtherGradients = lambda: ()
        self.grad_norm: torch.Tensor | None = None

    @abstractmethod
    def _forget(self, unit: Unit, slots: Sequence[Slot]) -> None:
        """Give bytes of gradients up that no update needs."""

    @abstractmethod
    def _settled(self, unit: Unit) -> None:
        """Before a gradient is looked at or replaced: have the update made that still needs its bytes."""

    @abstractmethod
    def _bytes(self, unit: Unit, slot: Slot) -> AbstractContextManager[torch.Tensor]:
        """Inside the block: the flat sum of a parameter's gradient, which is HELD. What is written to it is kept."""

    @abstractmethod
    def _complete(self, unit: Unit) -> None:
        """Update a unit, or hand its gradients over, if they are all there and nothing is to be waited for."""

    # ---- arrivals ----------------------------------------------------------------------------------------------

    def catch_up(self, unit: Unit) -> None:  # noqa: B027 - most holders have nothing on its way
        """Take what is on its way to a unit."""

    def ready(self, unit: Unit, slot: Slot) -> None:
        """No gradient of a parameter comes any more in this step, whatever earlier steps foretell."""
        slot.final = True
        self._complete(unit)

    def _arrives(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> bool:
        """Count a gradient; returns False where it was added to the user's own tensor.

        Raises:
            StaleGradientError: what it is to be added to has been used up; the gradient is lost, nothing else is.
            ValueError: it has a graph of its own.
        """
        if gradient.requires_grad:
            raise ValueError(
                f"{slot.name}: backward(create_graph=True) gives its gradient a graph, which pages cannot hold; use "
                "torch.autograd.grad"
            )
        if slot.grad is Grad.SPENT:
            raise stale_gradient(unit, slot)
        slot.arrivals += 1
        if slot.own is None:
            return True
        slot.own.add_(gradient)
        return False

    @property
    def step_under_way(self) -> bool:
        """Whether gradients have come since the last step."""
        return any(slot.arrivals for unit in self._index.units for slot in unit.slots)

    # ---- what users do -----------------------------------------------------------------------------------------

    def assign(self, unit: Unit, slot: Slot, gradient: torch.Tensor | None) -> None:
        """``parameter.grad = gradient``, a tensor shaped like the parameter, which stays the user's, or None.

        Raises:
            RuntimeError: the parameter's update of this step has been made.
        """
        if gradient is None and slot.grad is Grad.NONE:
            return
        self._check_unspent(unit, slot)
        unit.touched = unit.touched or slot.arrivals > 0
        if gradient is not None:
            self._settled(unit)
        self._drop(unit, slot, Grad.NONE)
        if gradient is not None:
            slot.generation += 1
            slot.own = gradient
            slot.become(Grad.OWN)

    def zero(self, unit: Unit, slot: Slot) -> None:
        """``parameter.grad.zero_()``.

        Raises:
            RuntimeError: the parameter's update of this step has been made.
        """
        self._check_unspent(unit, slot)
        unit.touched = unit.touched or slot.arrivals > 0
        self._drop(unit, slot, Grad.ZEROS)

    @contextmanager
    def values(self, unit: Unit, slot: Slot) -> Iterator[torch.Tensor]:
        """Inside the block: the flat gradient, which is not the user's own, to be read or edited in place.

        Raises:
            RuntimeError: it has been used up.
            BudgetError, StorageError: its pages cannot be brought.
        """
        unit.touched = True
        if slot.grad is Grad.SPENT:
            raise self._spent(slot)
        self._settled(unit)
        if slot.grad is Grad.ZEROS:
            self._make_zeros(unit, slot)
        slot.norm = None
        with self._bytes(unit, slot) as flat:
            yield flat

    def bring_out(self, unit: Unit, slot: Slot) -> torch.Tensor | None:
        """Take a gradient away for hooks that are to see it with the one that arrives; None: there is none.

        Raises:
            StaleGradientError: it has been used up.
        """
        if slot.grad is Grad.SPENT:
            raise stale_gradient(unit, slot)
        if slot.own is not None:
            own, slot.own = slot.own, None
            slot.become(Grad.NONE)
            return own
        if slot.grad is not Grad.HELD:
            return None
        self._settled(unit)
        with self._bytes(unit, slot) as flat:
            found = flat.clone().view(slot.shape)
        self._forget(unit, [slot])
        slot.become(Grad.NONE)
        return found

    def clear(self, *, zeros: bool = False) -> None:
        """``optimizer.zero_grad()``: after a step, or in place of one.

        Args:
            zeros: leave zeros, not None.

        Raises:
            RuntimeError: some updates of the step have been made already; nothing was changed.
        """
        if any(unit.updated for unit in self._index.units):
            raise RuntimeError(
                "zero_grad() without step(), but updates of this step have been made already; to skip steps "
                f"{START_HINT}; {ABANDON_HINT}"
            )
        skipped = any(slot.arrivals for _, slot in self._slots)
        # What a step that is skipped ends with is not part of any plan.
        with self._driver.untraced() if skipped else nullcontext():
            for unit, slot in self._slots:
                if slot.grad is not Grad.NONE:
                    self._drop(unit, slot, Grad.ZEROS if zeros else Grad.NONE)
        self._forget_arrivals()
        if skipped:
            self._driver.abandon_step()

    def abandon(self) -> None:
        """Give the step under way up: gradients that were not used are dropped, updates that were made stay."""
        with self._driver.untraced():
            for unit, slot in self._slots:
                if slot.grad is not Grad.NONE:
                    self._drop(unit, slot, Grad.NONE)
        for unit in self._index.units:
            unit.updated = unit.ended = False
        self._forget_arrivals()
        self._used_hypers = None
        self._driver.abandon_step()

    # ---- inside ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _make_zeros(self, unit: Unit, slot: Slot) -> None:
        """Have bytes for a gradient that is ZEROS: it is HELD then."""

    def _check_between_steps(self) -> None:
        """Raise where parameters and states are not those of one step: after backward, before the step that its updates
        belong to."""
        for unit in self._index.units:
            if unit.updated:
                raise RuntimeError(
                    f"{unit.name} has its update of the step under way already, so that parameters and states are not "
                    f"of one step; call this after optimizer.step(), or {START_HINT}; {ABANDON_HINT}"
                )

    def _check_unspent(self, unit: Unit, slot: Slot) -> None:
        if slot.grad is Grad.SPENT and unit.updated:
            raise self._spent(slot)

    def _spent(self, slot: Slot) -> RuntimeError:
        for unit in self._index.units:
            unit.touched = True  # Whoever wants one gradient is going to want others.
        return spent_gradient(slot)

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

    def _check_cleared(self) -> None:
        """Before a step: no gradient of an earlier one may be in its way.

        Raises:
            RuntimeError: one was used up, but not cleared, so that plain PyTorch would use it again.
        """
        for unit, slot in self._slots:
            if slot.grad is Grad.SPENT and not unit.updated:
                raise RuntimeError(
                    f"{slot.name}: its gradient of an earlier step was not cleared, so that plain PyTorch would use "
                    f"it again, but it has been used up; call optimizer.zero_grad() after each step, or {START_HINT}"
                )

    def _check_hypers(self) -> Sequence[Hyper]:
        """Hyper-parameters of the step that ends.

        Raises:
            RuntimeError: they changed after updates of this step had used them.
        """
        hypers = self._hypers()
        if self._used_hypers is not None and list(self._used_hypers) != list(hypers):
            raise RuntimeError(
                "learning rate or another hyper-parameter changed between backward and step, but updates of this step "
                f"have already used the old values; change them before backward, or {START_HINT}"
            )
        return hypers

    def _forget_arrivals(self) -> None:
        for unit in self._index.units:
            for slot in unit.slots:
                slot.arrivals, slot.final = 0, False

    def _end_arrivals(self) -> None:
        """A step was made: what the next one is to be like."""
        passes = max((slot.arrivals for _, slot in self._slots), default=0)
        self._most_passes = max(self._most_passes, passes)
        for _, slot in self._slots:
            # The most ever, so that a step with fewer only has its updates made later, and none is made too early in
            # one after it.
            slot.share = max(slot.share, slot.arrivals / passes if passes else 0.0)
            slot.expected = math.ceil(slot.share * self._most_passes - 1e-9)
        for unit in self._index.units:
            unit.updated = unit.ended = False
        self._forget_arrivals()
        self._foretold = True
        self._used_hypers = None
