"""Where in its plan a step is: which planned op is the one that the training thread begins. Pure.

A step need not perform what the plan expects. An op that is not the expected one is looked for a bounded stretch
ahead; found there, the ops before it are passed over. One that is not found is none of the plan's, and the place stays.
An op that was passed over and comes after all takes the place back. So a difference costs what depended on it, and the
rest of the step is the plan's again.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler import knobs
from scheduler.planning.plan import Plan
from scheduler.planning.trace import OpKey, OpKind


@dataclass(frozen=True, slots=True)
class Advance:
    """The op is the planned one at ``position`` of the cycle; those in ``skipped``, before it, are not made."""

    position: int
    skipped: range = range(0)


class Cursor:
    """A place in the cycle of a plan.

    Attributes:
        position: of the next planned op.
    """

    def __init__(self) -> None:
        self.position = 0
        self._step_end = 0
        self._skipped = range(0)
        self._n_unknown = 0

    def enter(self, plan: Plan, position: int = 0) -> None:
        """Go on at an op of a plan's cycle, in the step that has it."""
        self.position = position
        self._step_end = position // max(1, plan.ops_per_step) * plan.ops_per_step + plan.ops_per_step
        self._skipped, self._n_unknown = range(0), 0

    def begin_step(self, plan: Plan) -> bool:
        """The step that follows the one before begins; returns whether that begins the cycle anew."""
        anew = self.position >= len(plan.keys)
        self.enter(plan, 0 if anew else self.position)
        return anew

    def restart_step(self, plan: Plan) -> None:
        """The step under way begins anew."""
        self.enter(plan, self._step_end - plan.ops_per_step)

    @property
    def at_end(self) -> bool:
        """Whether the step has all its planned ops."""
        return self.position >= self._step_end

    def advance(self, plan: Plan, key: OpKey) -> Advance | None:
        """Go on to the op ``key`` of the step; None: it is not the plan's, and the place is the same."""
        found = self._find_ahead(plan, key)
        if found is not None:
            skipped = range(self.position, found)
            self._skipped = skipped or self._skipped
        else:
            skipped = range(0)
            found = next((late for late in self._skipped if plan.keys[late] == key), None)
            if found is None:
                self._n_unknown += 1
                return None
            self._skipped = range(found + 1, self._skipped.stop)
        self.position, self._n_unknown = found + 1, 0
        return Advance(found, skipped)

    def expects(self, plan: Plan, key: OpKey, *, begins: bool) -> bool:
        """Whether ``key`` is the next planned op; one that ``begins`` a cycle is where the cycle need not be restored
        for it."""
        anew = begins and self.position >= len(plan.keys)
        position = 0 if anew and plan.closed else self.position
        return position < len(plan.keys) and plan.keys[position] == key

    def difference(self, plan: Plan, key: OpKey, found: Advance | None) -> str:
        """What is not as planned where the step goes on with ``key``, which was ``found`` there."""
        if found is None and self.at_end:
            return f"the step goes on with {key[1]!r}, which it did not in the trace"
        at = self.position if found is None else found.skipped.start
        return f"op {at} was {plan.keys[at][1]!r} in the trace and is {key[1]!r} now"

    def _find_ahead(self, plan: Plan, key: OpKey) -> int | None:
        # With every op that is not found the stretch grows: a part left out may be longer than it.
        left = knobs.RESYNC_OPS + 2 * self._n_unknown
        for position in range(self.position, self._step_end):
            if plan.keys[position] == key:
                return position
            # Updates that were made elsewhere (`Driver.untraced`) may be missing in any number.
            left -= plan.keys[position][0] is not OpKind.UPDATE
            if left < 0:
                return None
        return None

    def end_step(self) -> range:
        """The step ends; returns the planned ops that it has not made."""
        missing = range(self.position, self._step_end)
        self.position = max(self.position, self._step_end)
        return missing
