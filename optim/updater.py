"""What the engine asks of either update mode. All methods belong to the training thread."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from optim.unit import Slot, Unit


class Updater(Protocol):
    """Takes gradients and brings parameters up to date."""

    def gradient(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        """Take one gradient from autograd."""

    def step(self) -> None:
        """The optimizer step: no gradient belongs to this step any more."""

    def discard(self) -> None:
        """Throw the gradients of the step under way away."""

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
