"""Making plans for one tier as it is: its frames, its tensors, its bandwidths. Moves nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

from pagemem.errors import BudgetError
from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.mover import Mover
from scheduler import knobs
from scheduler.lookahead.planner import cost_s, make_plan
from scheduler.planning.bounds import check_bounds
from scheduler.planning.machine import TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.trace import Trace


class TierPlanner:
    """Makes plans for a mover's tier. Training thread only, with the mover's lock held.

    Args:
        mover: owner of all residency.
        bandwidth: of what is below (read, write) in bytes/s, asked for whenever a plan is made.
        single_step_cycle: whether every step of a plan has to have the same moves.

    Attributes:
        bandwidth: as given.
    """

    def __init__(self, mover: Mover, bandwidth: Callable[[], tuple[float, float]], *, single_step_cycle: bool) -> None:
        self._mover = mover
        self._single_step_cycle = single_step_cycle
        self.bandwidth = bandwidth

    def tier(self, share: float | None = None) -> TierSpec:
        """The tier, with a share of the bandwidths; None: with as much as a plan relies on."""
        share = knobs.RELIABLE_SHARE if share is None else share
        read_bytes_per_s, write_bytes_per_s = (share * bytes_per_s for bytes_per_s in self.bandwidth())
        return TierSpec(
            self._mover.tenants.n_shared_frames, self._mover.arena.page_bytes, read_bytes_per_s, write_bytes_per_s
        )

    def n_bytes(self, trace: Trace) -> dict[TensorId, int]:
        """Sizes of what a step uses and of what is in the tier for good."""
        tensors = self._mover.tensors
        return {tensor: tensors[tensor].n_bytes for tensor in [*trace.tensors(), *self.resident()]}

    def plan(self, trace: Trace) -> Plan:
        """The plan for a step, checked.

        Raises:
            BudgetError: there is none: the tensors of one op do not fit together.
            PlanError: it does not hold, which is a defect.
        """
        tier, n_bytes, resident = self.tier(), self.n_bytes(trace), self.resident()
        plan = make_plan(trace, n_bytes, tier, resident, single_step_cycle=self._single_step_cycle)
        check_bounds(plan, trace, n_bytes, tier, resident)
        return plan

    def cost_s(self, trace: Trace) -> float:
        """What a step would cost by a plan, roughly; infinite where there is none. Only to be compared with other
        steps'."""
        try:
            return cost_s(
                make_plan(
                    trace,
                    self.n_bytes(trace),
                    self.tier(),
                    self.resident(),
                    single_step_cycle=self._single_step_cycle,
                    fast=True,
                )
            )
        except BudgetError:
            return math.inf

    def resident(self) -> dict[TensorId, FrameId]:
        """What is in the tier for good, and its first frames."""
        return {t.id: t.frame for t in self._mover.tensors.values() if t.resident and t.frame is not None}
