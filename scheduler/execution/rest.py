"""A plan that moves nothing need not be followed op by op: once every tensor is where it has it, it *rests*.

Ops are neither followed nor recorded then, and those that use others than these tensors are fetched on demand, into
free frames. Once something has to leave for them, the rest of the step is fetched on demand.
"""

from __future__ import annotations

from collections.abc import Callable

from pagemem.frames.page import TensorId
from pagemem.residency.mover import Mover
from scheduler.execution.plan_book import PlannedStep


class Rest:
    """Whether the plan of steps rests. Training thread only, with the mover's lock held.

    Attributes:
        active: it does, so that ops of its tensors may be left out.
        tensors: these tensors, while it does.
        let_go: called before tensors may be moved, also when that ends: nobody of ours is to hold any between two uses.
    """

    def __init__(self, mover: Mover) -> None:
        self.active = False
        self.tensors: frozenset[TensorId] = frozenset()
        self.let_go: Callable[[], None] = lambda: None
        self._mover = mover
        self._patience_steps = 1

    def try_begin(self, planned: PlannedStep) -> None:
        """Between two steps that follow one plan, whose placement is in place: begin, if the plan moves nothing and is
        the one that is going to stay."""
        if planned.durations.complete and planned.n_steps >= self._patience_steps and self._moves_nothing(planned):
            self.active, self.tensors = True, frozenset(planned.plan.initial)

    def _moves_nothing(self, planned: PlannedStep) -> bool:
        # Frames for what is made and consumed in a step are found when they are asked for.
        plan = planned.plan
        moves = any(not task.fresh for task in (*plan.tasks, *plan.carried))
        n_frames = sum(self._mover.tensors[tensor].n_frames for tensor in planned.trace.tensors())
        if moves or n_frames > plan.n_frames:
            return False
        placed = [(self._mover.tensors[tensor], frame) for tensor, frame in plan.initial.items()]
        return all(tensor.frame == frame and tensor.readable for tensor, frame in placed)

    def disturbed(self, planned: PlannedStep) -> None:
        """Memory was short: the next rest begins after twice as many steps. Steps of which every few ones need more
        room would gain nothing by one in between."""
        planned.n_steps, self._patience_steps = 0, 2 * self._patience_steps

    def end(self) -> None:
        """Have the plan be followed again. Idempotent."""
        if self.active:
            self.active, self.tensors = False, frozenset()
            self.let_go()
