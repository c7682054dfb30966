"""Which gradients of the step under way have arrived, and how many are foretold by the steps before.

A parameter is expected to get the largest share of a step's backward passes that it ever got, of as many passes as any
step had. So a step with fewer passes only has its updates made later, and none is made too early in one after it.
"""

from __future__ import annotations

import math

import torch

from optim.gradient_errors import stale_gradient, torn_step, uncleared_gradient
from optim.unit import Grad, Slot, Unit, UnitIndex


class Arrivals:
    """Counts gradients of one model's parameters. Training thread only.

    Attributes:
        foretold: whether a step has been made, so that the number of gradients to come is known.
    """

    def __init__(self, index: UnitIndex) -> None:
        self._index = index
        self._most_passes = 0
        self.foretold = False

    def count(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> bool:
        """Count a gradient; returns False where it was added to the user's own tensor.

        Raises:
            StaleGradientError: what it is to be added to has been used up; the gradient is lost, nothing else is.
            ValueError: it has a graph of its own.
        """
        if gradient.requires_grad:
            raise ValueError(
                f"{slot.name}: backward(create_graph=True) gives its gradient a graph, which pages cannot hold; "
                "use torch.autograd.grad"
            )
        if slot.grad is Grad.SPENT:
            raise stale_gradient(unit, slot)
        slot.arrivals += 1
        if slot.own is None:
            return True
        slot.own.add_(gradient)
        return False

    def is_final(self, slot: Slot) -> bool:
        """Whether the gradient that arrived last is the parameter's last one of the step."""
        return slot.final or (self.foretold and slot.arrivals == slot.expected)

    def is_single(self, slot: Slot) -> bool:
        """Whether a gradient that comes now is to be the parameter's only one of the step."""
        return slot.final or (self.foretold and slot.expected == 1)

    def complete(self, unit: Unit) -> bool:
        """Whether a unit has gradients, and all of this step, so that its update need not wait for the step's end."""
        optimized = [slot for slot in unit.slots if slot.group >= 0]
        there = Grad.HELD in [slot.grad for slot in optimized] and all(map(self._has_all, optimized))
        return there and not unit.touched and not unit.live_views

    def _has_all(self, slot: Slot) -> bool:
        if slot.grad is Grad.HELD:
            return self.is_final(slot)
        return slot.grad is Grad.NONE and (slot.final or (self.foretold and slot.expected == 0))

    def __bool__(self) -> bool:
        return any(slot.arrivals for unit in self._index.units for slot in unit.slots)

    def check_between_steps(self) -> None:
        """Raise where a unit has its update of the step under way already."""
        for unit in self._index.units:
            if unit.updated:
                raise torn_step(unit)

    def check_cleared(self) -> None:
        """Raise where plain PyTorch would use a gradient again that was used up in an earlier step."""
        for unit, slot in self._index.slots():
            if slot.grad is Grad.SPENT and not unit.updated:
                raise uncleared_gradient(slot)

    def forget(self) -> None:
        """No gradient of the step under way has arrived."""
        for unit in self._index.units:
            for slot in unit.slots:
                slot.arrivals, slot.final = 0, False

    def restart(self) -> None:
        """A step begins: no gradient of it has arrived, and no unit has been updated in it."""
        for unit in self._index.units:
            unit.updated = unit.ended = False
        self.forget()

    def end_step(self) -> None:
        """A step was made: what the next one is to be like."""
        optimized = [slot for unit in self._index.units for slot in unit.slots if slot.group >= 0]
        passes = max((slot.arrivals for slot in optimized), default=0)
        self._most_passes = max(self._most_passes, passes)
        for slot in optimized:
            slot.share = max(slot.share, slot.arrivals / passes if passes else 0.0)
            slot.expected = math.ceil(slot.share * self._most_passes - 1e-9)
        self.restart()
        self.foretold = True
