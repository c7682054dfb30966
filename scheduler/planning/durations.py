"""How long each op of a planned step takes, from some steps that followed the plan.

The traced step fetches on demand: its ops are slowed by first touches of memory and by copies that stand in other
places than they will. The steps that follow its plan tell better, so the plan is made once more with their times.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from typing import Final

from scheduler.planning.trace import Trace

#: Steps whose median is taken; the first planned one is left out, as it moves everything to where the plan has it.
MEASURED_STEPS: Final = 3


@dataclass(slots=True)
class Durations:
    """Op durations (seconds) of the steps that followed one plan. Training thread only.

    Attributes:
        n_steps: steps seen.
    """

    n_steps: int = 0
    _measured_s: list[list[float]] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        """Whether the durations of the next step are of use."""
        return self.n_steps > 0 and not self.complete

    @property
    def complete(self) -> bool:
        """Whether all that is needed has been measured."""
        return len(self._measured_s) == MEASURED_STEPS

    def add(self, planned: Trace, performed: Trace) -> Trace | None:
        """Take the durations of one more step.

        Args:
            planned: what the plan was made of.
            performed: the step as it was; one in which ops are missing tells nothing.

        Returns:
            Once, with the last step needed: ``planned`` with the medians of what was measured; otherwise None.
        """
        self.n_steps += 1
        if self.n_steps == 1 or self.complete or performed.keys != planned.keys:
            return None
        self._measured_s.append([op.duration_s for op in performed.ops])
        if len(self._measured_s) < MEASURED_STEPS:
            return None
        medians_s = [statistics.median(of_op) for of_op in zip(*self._measured_s, strict=True)]
        return Trace(
            tuple(replace(op, duration_s=median_s) for op, median_s in zip(planned.ops, medians_s, strict=True))
        )
