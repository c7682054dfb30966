"""What a plan has in all tiers at an op of its cycle, and what is on its way then. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier
from pagemem.units import ceil_div
from scheduler.lookahead.next_uses import NextUses
from scheduler.planning.plan import Plan
from scheduler.planning.task import ARRIVALS, Lane, Task, TaskKind
from scheduler.planning.trace import AccessMode

#: What brings a tensor to a tier, and by which lane.
_COMES: Mapping[Tier, tuple[TaskKind, Lane]] = {
    Tier.HOST: (TaskKind.LOAD, Lane.SSD_READ),
    Tier.DEVICE: (TaskKind.UPLOAD, Lane.H2D),
}


class _Placed:
    """Who is where, and the tasks that brought those that an op from ``position`` on waits for."""

    def __init__(self, n_bytes: Mapping[TensorId, int], page_bytes: int, tiers: Mapping[TensorId, Tier]) -> None:
        self.frames: dict[TensorId, FrameId] = {}
        self.under_way: dict[TensorId, Task] = {}
        self._owners: dict[tuple[Tier, int], TensorId] = {}
        self._n_bytes, self._page_bytes, self._tiers = n_bytes, page_bytes, tiers

    def take(self, tier: Tier, frame: FrameId, n_bytes: int) -> list[tuple[Tier, int]]:
        """Have whoever is there leave; returns the places."""
        places = [(tier, taken) for taken in range(frame, frame + ceil_div(n_bytes, self._page_bytes))]
        for other in {self._owners[place] for place in places if place in self._owners}:
            self._leave(other)
        return places

    def place(self, tensor: TensorId, frame: FrameId) -> None:
        """A tensor comes to its frames, in place of whoever is there."""
        if tensor in self.frames:
            self._leave(tensor)
        places = self.take(self._tiers[tensor], frame, self._n_bytes[tensor])
        self.frames[tensor] = frame
        self._owners.update(dict.fromkeys(places, tensor))

    def _leave(self, tensor: TensorId) -> None:
        first = self.frames.pop(tensor)
        for left in range(first, first + ceil_div(self._n_bytes[tensor], self._page_bytes)):
            self._owners.pop((self._tiers[tensor], left), None)
        self.under_way.pop(tensor, None)

    def begin(self, task: Task, position: int) -> None:
        """A task takes its frames."""
        if task.kind is TaskKind.DROP:
            self.take(task.tier, task.frame, task.n_bytes)
            return
        self.place(task.tensor, task.frame)
        if task.needed_at >= position:
            self.under_way[task.tensor] = task


def loads_to_enter(
    plan: Plan,
    uses: NextUses,
    n_bytes: Mapping[TensorId, int],
    page_bytes: int,
    position: int,
    tiers: Mapping[TensorId, Tier],
) -> dict[Tier, list[Task]]:
    """Tasks that bring all tiers to where the plan has them when op ``position`` of its cycle begins.

    Args:
        uses: of the trace that the plan was made of. n_bytes, tiers: of all its tensors.

    Returns:
        For each tier of the plan a task for each tensor that is there by then and still of use, the one used soonest
        first; tensors that are there already need none of them. Then those that are under way, in their order.
    """
    placed = _Placed(n_bytes, page_bytes, tiers)
    for tensor, frame in plan.initial.items():
        placed.place(tensor, frame)
    for task in plan.carried:
        if task.kind in ARRIVALS:
            placed.begin(task, position)
    for trigger in range(position):
        for task in plan.arriving_at.get(trigger, ()):
            placed.begin(task, position)
    brought_again: dict[TensorId, int] = {}
    for task in plan.tasks:
        if task.kind in ARRIVALS and task.trigger >= position:
            brought_again.setdefault(task.tensor, task.needed_at - position)
    found: dict[Tier, list[Task]] = {tier: [] for tier in plan.frames}
    for tensor in placed.frames.keys() - placed.under_way.keys():
        use = uses.next(tensor, position)
        # One that nothing uses is resident.
        ahead, mode = (len(plan.keys), AccessMode.READ) if use is None else use
        if mode is AccessMode.DISCARD or ahead > brought_again.get(tensor, ahead):
            continue  # it has had its use, and comes once more, if at all, before the next one
        kind, lane = _COMES[tiers[tensor]]
        found[tiers[tensor]].append(
            Task(kind, tensor, tiers[tensor], lane, n_bytes[tensor], position, frame=placed.frames[tensor],
                 needed_at=position + ahead, fresh=mode is AccessMode.CREATE)
        )  # fmt: skip
    for tasks in found.values():
        tasks.sort(key=lambda task: (task.needed_at, task.tensor))
    for task in placed.under_way.values():
        found[task.tier].append(task)
    return found
