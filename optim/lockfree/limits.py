"""What lock-free mode may not exceed: staleness of parameters, and bytes of gradients."""

from __future__ import annotations

from dataclasses import dataclass

from optim.gradient_budget import GradientBudget
from optim.unit import Unit


@dataclass(frozen=True, slots=True)
class StalenessBound:
    """How far parameters may be behind.

    Attributes:
        max_staleness: steps that the parameters in use may miss, >= 0.
        exact_steps: the first so many steps of a unit's life are made as with ``max_staleness`` 0.
        adopts_after: adopt new parameters after a unit's last use in a step, too, which is when its gradient is
            complete.
    """

    max_staleness: int
    exact_steps: int = 0
    adopts_after: bool = True

    def allowed(self, unit: Unit) -> int:
        """The steps that a unit's parameters may miss."""
        # Counts of steps are the updater's, and part of commits; one it is about to raise means one exact step more.
        young = max(slot.steps for slot in unit.slots) < self.exact_steps
        return 0 if young else self.max_staleness


@dataclass(frozen=True, slots=True)
class GradientBudgets:
    """Bytes of gradients outside the pages.

    Attributes:
        late: of units that the update thread has: on their way to it, and new parameters on theirs.
        on_time: of the others, used as autograd made them; what does not fit goes to pages.
    """

    late: GradientBudget
    on_time: GradientBudget
