"""How far behind a unit's parameters are: a clock for each unit, in steps that gave it a gradient. Pure arithmetic.

    produced  steps whose gradient was handed to the updater          (training thread writes)
    applied   steps whose update is in the newest published version   (updater writes)
    adopted   steps whose update is in the parameters in use          (training thread writes)

adopted <= applied <= produced at every moment, on every thread: each number has one writer and only grows.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagemem.errors import TransitionError


@dataclass(slots=True)
class UnitClock:
    """Counts one unit's steps through production, application and adoption."""

    produced: int = 0
    applied: int = 0
    adopted: int = 0

    @property
    def staleness(self) -> int:
        """Steps whose gradients were handed over and are not in the parameters in use."""
        return self.produced - self.adopted

    def produce(self) -> int:
        """A step's gradient is about to be handed over; returns its number, counted from 1. Training thread."""
        self.produced += 1
        return self.produced

    def apply(self, first: int, last: int) -> None:
        """The updates of steps ``first`` to ``last`` are made. Updater.

        Raises:
            TransitionError: they are not the steps after the last applied ones: a gradient was lost or doubled.
        """
        if first != self.applied + 1 or not first <= last <= self.produced:
            raise TransitionError(
                f"updates of steps {first}..{last} after step {self.applied}, with {self.produced} produced: "
                "a gradient was lost or applied twice"
            )
        self.applied = last

    def adopt(self, last: int) -> None:
        """The parameters in use have all updates up to step ``last``. Training thread.

        Raises:
            TransitionError: they are not applied yet, or older than what is in use.
        """
        if not self.adopted < last <= self.applied:
            raise TransitionError(f"adopting step {last} after step {self.adopted}, with {self.applied} applied")
        self.adopted = last
