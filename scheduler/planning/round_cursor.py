"""Where in its plan the updater is, and what it has brought in there. Pure.

The updater need not take the slices in the order of the plan. It says which ones it takes next; those that the plan has
next, too, come with the op that triggers them. One that is not the plan's next takes the place of the plan with it: its
tensors come to the frames that the plan has for them there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from scheduler.planning.plan import Plan
from scheduler.planning.task import Task, load_task
from scheduler.planning.update_round import WINDOWS, UpdateRound

#: Slices beyond the present one that are brought in early.
AHEAD: Final = WINDOWS - 1


class RoundCursor:
    """A place in the plan of a round.

    Attributes:
        position: op of the plan's cycle that is performed, or was last; -1 before the first one.
        in_order: whether it was the one after that before it.
    """

    def __init__(self, plan: Plan, updates: UpdateRound) -> None:
        self.position, self.in_order = -1, True
        self._n_ops, self._n_positions = len(updates.trace.ops), len(plan.keys)
        self._n_bytes = updates.n_bytes
        self._tensors = [tuple(access.tensor for access in op.accesses) for op in updates.trace.ops]
        self._streamed = frozenset(task.tensor for task in plan.stores)
        self._frames = self._frames_of(plan)
        self._early = self._early_of(plan)

    def _frames_of(self, plan: Plan) -> list[dict[TensorId, FrameId]]:
        """Of each op of the cycle, where the plan has its tensors."""
        where = dict(plan.initial) | {task.tensor: task.frame for task in plan.carried}
        found = []
        for position in range(self._n_positions):
            where.update((task.tensor, task.frame) for task in plan.arriving_at.get(position, ()))
            found.append({tensor: where[tensor] for tensor in self._tensors[position % self._n_ops]})
        return found

    def _early_of(self, plan: Plan) -> list[list[Task]]:
        """Of each op of the cycle, the loads for later ones that it or an earlier one triggers."""
        found: list[list[Task]] = [[] for _ in range(self._n_positions)]
        for task in plan.loads:
            for position in range(task.trigger, min(task.needed_at, self._n_positions)):
                found[position].append(task)
            for position in range(max(0, task.trigger - self._n_positions), task.needed_at - self._n_positions):
                found[position].append(task)
        for tasks in found:
            tasks.sort(key=lambda task: task.needed_at)
        return found

    def go_to(self, op: int) -> Mapping[TensorId, FrameId]:
        """Go on to an op of the round; returns where its tensors are to be."""
        before, self.position = self.position, self._next(op, self.position)
        self.in_order = self.position == (before + 1) % self._n_positions
        return self._frames[self.position]

    def upcoming(self, ops: Sequence[int]) -> list[Task]:
        """Loads to begin now that the op is performed which the updater went to last.

        Args:
            ops: that it goes to next, as far as known.
        """
        found: list[Task] = []
        for ahead, op in enumerate(ops[:AHEAD], 1):
            position = self._next(op, self.position)
            if position == (self.position + ahead) % self._n_positions:
                own = [task for task in self._early[self.position] if task.needed_at % self._n_positions == position]
                found += own
                if ahead == 1:  # What the plan had there before may have left in another order.
                    named = {task.tensor for task in own}
                    found += [task for task in self._loads(position) if task.tensor not in named]
                continue
            if ahead == 1:
                found += self._loads(position)
            break
        return found

    def streams(self, tensor: TensorId) -> bool:
        """Whether the plan has a tensor leave: it is stored once it is changed."""
        return tensor in self._streamed

    def _next(self, op: int, position: int) -> int:
        """The first place of an op in the cycle behind another place."""
        return (position + 1 + (op - position - 1) % self._n_ops) % self._n_positions

    def _loads(self, position: int) -> list[Task]:
        return [
            load_task(tensor, self._n_bytes[tensor], frame, self.position, position)
            for tensor, frame in self._frames[position].items()
        ]
