"""Where in its plan a step is: which of the planned ops stand behind the op that the training thread begins. Pure.

A plan's cycle is one or more steps. Its first placement has to be put up when a plan is begun, when something other
than the plan has moved tensors, and at each cycle's beginning where the plan does not close by itself. That can be done
at the beginning of a cycle only; the steps until then are not the plan's.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.planning.plan import Plan
from scheduler.planning.trace import OpKey, OpKind


@dataclass(frozen=True, slots=True)
class Advance:
    """Ops of the plan whose moves are to be begun now, in order.

    Attributes:
        restores: the plan's first placement is to be put up before.
    """

    ops: range
    restores: bool


@dataclass(frozen=True, slots=True)
class Divergence:
    """The step is not the plan's. ``why`` is None where that is nobody's deviation: the placement is not the plan's
    yet."""

    why: str | None


class Cursor:
    """A place in the cycle of a plan.

    Attributes:
        restoring: the first placement has to be put up before the plan can be followed.
    """

    def __init__(self) -> None:
        self.restoring = False
        self._position = 0

    def enter(self) -> None:
        """Begin a plan's cycle with the next op."""
        self._position = 0
        self.restoring = True

    def advance(self, plan: Plan, key: OpKey) -> Advance | Divergence:
        """Go on to the op ``key``. Divergence, the cursor stays where it is."""
        n_ops = len(plan.keys)
        if not n_ops:
            return Divergence(f"the step had no ops in the trace and has {key[1]!r} now")
        if self._position == n_ops:
            self._position = 0
            self.restoring = self.restoring or not plan.closed
        if self.restoring and self._position % plan.ops_per_step == 0:
            self._position = 0
        first = last = self._position
        # Updates already made outside of the step (`Driver.untraced`) are missing here; their moves still have to be.
        while last < n_ops and plan.keys[last] != key and plan.keys[last][0] is OpKind.UPDATE:
            last += 1
        if last == n_ops or plan.keys[last] != key:
            return Divergence(f"op {first} was {plan.keys[first][1]!r} in the trace and is {key[1]!r} now")
        if self.restoring and first:
            return Divergence(None)
        restores, self.restoring = self.restoring, False
        self._position = last + 1
        return Advance(range(first, last + 1), restores)

    def end_step(self, plan: Plan) -> bool:
        """Whether the step under way had all its planned ops (updates made elsewhere may be missing)."""
        position = self._position
        if not plan.keys:
            return True
        while position % plan.ops_per_step and plan.keys[position][0] is OpKind.UPDATE:
            position += 1
        if position % plan.ops_per_step or position == 0:
            return False
        self._position = position
        return True
