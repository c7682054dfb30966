"""What a plan has in a tier at an op of its cycle, and what is on its way then. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from pagemem.frames.page import FrameId, TensorId
from pagemem.units import ceil_div
from scheduler.lookahead.next_uses import NextUses
from scheduler.planning.plan import Plan
from scheduler.planning.task import Task, load_task
from scheduler.planning.trace import AccessMode


def loads_to_enter(
    plan: Plan, uses: NextUses, n_bytes: Mapping[TensorId, int], page_bytes: int, position: int
) -> list[Task]:
    """Loads that bring a tier to where the plan has it when op ``position`` of its cycle begins.

    Args:
        uses: of the trace that the plan was made of. n_bytes: sizes of all its tensors.

    Returns:
        A load for each tensor that is there by then, the one used soonest first; tensors that are there already need
        none of them. Then those that are under way, in their order.
    """
    places: dict[TensorId, FrameId] = {}
    owners: dict[int, TensorId] = {}
    under_way: dict[TensorId, Task] = {}

    def place(tensor: TensorId, frame: FrameId) -> None:
        frames = range(frame, frame + ceil_div(n_bytes[tensor], page_bytes))
        for other in {owners[taken] for taken in frames if taken in owners} | ({tensor} & places.keys()):
            first = places.pop(other)
            for left in range(first, first + ceil_div(n_bytes[other], page_bytes)):
                owners.pop(left, None)
            under_way.pop(other, None)
        places[tensor] = frame
        owners.update(dict.fromkeys(frames, tensor))

    def begin(task: Task) -> None:
        place(task.tensor, task.frame)
        if task.needed_at >= position:
            under_way[task.tensor] = task

    for tensor, frame in plan.initial.items():
        place(tensor, frame)
    for task in plan.carried:
        begin(task)
    for trigger in range(position):
        for task in plan.loads_at.get(trigger, ()):
            begin(task)
    there: list[Task] = []
    for tensor in places.keys() - under_way.keys():
        found = uses.next(tensor, position)
        if found is not None and found[1] is not AccessMode.RENEW:
            fresh = found[1] is AccessMode.CREATE
            needed_at = position + found[0]
            there.append(load_task(tensor, n_bytes[tensor], places[tensor], position, needed_at, fresh=fresh))
        elif found is None:
            # It is resident.
            needed_at = position + len(plan.keys)
            there.append(load_task(tensor, n_bytes[tensor], places[tensor], position, needed_at))
    return sorted(there, key=lambda task: (task.needed_at, task.tensor)) + list(under_way.values())
