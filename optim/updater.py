"""What the engine asks of either update mode. All methods belong to the training thread."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch

from optim.gradient_holder import OtherGradients
from optim.unit import Slot, Unit
from pagemem.process.forks import disowned


class Updater(Protocol):
    """Takes gradients and brings parameters up to date."""

    #: Gradients that are not the updater's, but count in the norm.
    other_gradients: OtherGradients

    def gradient(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        """Take one gradient from autograd."""

    @property
    def keeps_unoptimized(self) -> bool:
        """Whether gradients of parameters that are not optimized are to be delivered, too."""

    def catch_up(self, unit: Unit) -> None:
        """Take what is on its way to a unit."""

    def ready(self, unit: Unit, slot: Slot) -> None:
        """No gradient of a parameter comes any more in this step, whatever earlier steps foretell."""

    def assign(self, unit: Unit, slot: Slot, gradient: torch.Tensor | None) -> None:
        """``parameter.grad = gradient``, a tensor shaped like the parameter, which stays the user's, or None."""

    def zero(self, unit: Unit, slot: Slot) -> None:
        """``parameter.grad.zero_()``."""

    def values(self, unit: Unit, slot: Slot) -> AbstractContextManager[torch.Tensor]:
        """Inside the block: the flat gradient, which is not the user's own, to be read or edited in place."""

    def bring_out(self, unit: Unit, slot: Slot) -> torch.Tensor | None:
        """Take a gradient away for hooks that are to see it with the one that arrives; None: there is none."""

    def step(self) -> None:
        """The optimizer step: no gradient belongs to this step any more."""

    def clear(self, *, zeros: bool = False) -> None:
        """``optimizer.zero_grad()``: after a step, or in place of one. ``zeros``: leave zeros, not None."""

    def abandon(self) -> None:
        """Give the step under way up: gradients that were not used are dropped, updates that were made stay."""

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Global norm of the gradients of the last step; None where nobody needed it."""

    def before_use(self, unit: Unit) -> None:
        """A unit is about to be used in a step."""

    def settle(self, unit: Unit) -> None:
        """A unit is about to be looked at or edited: it must have every update of the steps made."""

    def drain(self) -> None:
        """Have every update of the steps made, in every unit."""

    def consistent(self, *, whole: bool) -> AbstractContextManager[None]:
        """Between two steps: inside the block every unit's parameters and states are of the same updates, and stay so.

        Args:
            whole: with every update of the steps made; otherwise gradients on their way may be missing, so that
                training waits for no more than the unit being updated.
        """

    def close(self) -> None:
        """End what works in the background and give memory back. Idempotent."""

    @property
    def step_under_way(self) -> bool:
        """Whether gradients have come since the last step."""

    @property
    def staleness(self) -> int:
        """Steps that the parameters in use miss, in the unit that is furthest behind."""

    @property
    def dropped_steps(self) -> int:
        """Steps whose gradients were not finite, and so not applied."""

    @property
    def dropped_gradients(self) -> int:
        """Gradients of single units that were not finite, and so not applied."""

    @property
    def state_frames(self) -> int:
        """Host frames that the updater has for itself, outside the plan."""

    @property
    def direct_bytes(self) -> int:
        """Bytes of gradients outside the host arena now."""

    @property
    def peak_direct_bytes(self) -> int:
        """Most of them at any time."""


class _Refusing:
    """What a forked child has in the place of its parent's updater."""

    def __getattr__(self, name: str) -> Any:
        raise disowned("this optimizer")


def refusing_updater() -> Updater:
    """Whatever is asked of it raises RuntimeError."""
    return cast(Updater, _Refusing())
