"""Which steps of what a reader has read a plan repeats, and their tasks. Pure.

When the placement at a step's end equals that of an earlier one, the steps in between are the plan's cycle, and it
closes by itself. In a tight budget placements wander instead; then the cycle is the run of steps whose two ends differ
least, and the driver restores the first placement once per cycle.

What is restored comes from page files. So where copies of other tensors are in a placement that does not come again,
the steps are read once more, from that placement without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from scheduler import knobs
from scheduler.lookahead.reader import LookaheadReader
from scheduler.lookahead.residence import Placed
from scheduler.planning.task import Task, TaskKind, store_task
from scheduler.planning.trace import CHANGES, Trace
from scheduler.planning.work import Work

#: Steps read ahead at most, steps at the beginning that are left out (the reader begins with empty memory), and the
#: shortest cycle that is worth restoring a placement for.
MAX_STEPS: Final = 12
WARM_UP_STEPS: Final = 2
MIN_CYCLE_STEPS: Final = 5
#: The same for steps of very many ops, and for plans that only compare steps.
FEW_STEPS: Final = 5
SHORT_CYCLE_STEPS: Final = 2


@dataclass(frozen=True, slots=True)
class Cycle:
    """The steps that a plan repeats.

    Attributes:
        reader: has read them, from op ``start`` to op ``end``.
        begins, ends: the placements at both ends, which are equal if it is ``closed``.
    """

    reader: LookaheadReader
    start: int
    end: int
    closed: bool
    begins: Placed
    ends: Placed

    @property
    def n_ops(self) -> int:
        """Of all its steps."""
        return self.end - self.start

    @property
    def initial(self) -> dict[TensorId, FrameId]:
        """What is where when it begins."""
        return {tensor: frame for tensor, frame, _, dead in self.begins if not dead}

    @property
    def seconds(self) -> float:
        """On the reader's clock."""
        ends_s = self.reader.op_end_s
        return ends_s[self.end - 1] - (ends_s[self.start - 1] if self.start else 0.0)


def find_cycle(work: Work, *, fast: bool) -> Cycle:
    """Have a reader pass over steps until a placement comes again, or there are enough to choose from.

    Raises:
        BudgetError: the tensors of one op do not fit together.
    """
    reader, n_ops = LookaheadReader(work), len(work.trace.ops)
    few = fast or n_ops * len(work.machine.n_frames) > knobs.VERY_MANY_OPS
    most_steps, shortest = (FEW_STEPS, SHORT_CYCLE_STEPS) if few else (MAX_STEPS, MIN_CYCLE_STEPS)
    placements = [reader.placement()]
    while len(placements) <= most_steps and (len(placements) < 2 or placements[-1] not in placements[:-1]):
        reader.read_step(len(placements) - 1)
        placements.append(reader.placement())
    last = len(placements) - 1
    first = placements.index(placements[-1])
    closed = first < last
    if not closed:
        first, last = _least_different(placements, work.n_bytes, range(shortest, most_steps + 1))
    begins = placements[first]
    if not closed and any(tensor in work.sources for tensor, _, _, _ in begins if tensor not in work.resident):
        return _read_again(work, begins, last - first)
    return Cycle(reader, first * n_ops, last * n_ops, closed, begins, placements[last])


def _read_again(work: Work, begins: Placed, n_steps: int) -> Cycle:
    """Steps from a placement of which only what can be restored is left."""
    changed = {access.tensor for op in work.trace.ops for access in op.accesses if access.mode in CHANGES}
    there = {tensor: frame for tensor, frame, _, dead in begins if not dead and tensor not in work.sources}
    reader, n_ops = LookaheadReader(work), len(work.trace.ops)
    reader.begin_with(there, changed)
    placed = reader.placement()
    for step in range(n_steps):
        reader.read_step(step)
    reader.write_all_back(n_steps * n_ops - 1)
    return Cycle(reader, 0, n_steps * n_ops, False, placed, reader.placement())


def _least_different(placements: Sequence[Placed], n_bytes: Mapping[TensorId, int], lengths: range) -> tuple[int, int]:
    """Two steps so many steps apart with the most bytes in the same place."""
    candidates = [
        (first, first + length)
        for first in range(WARM_UP_STEPS, len(placements))
        for length in lengths
        if first + length < len(placements)
    ]

    def bytes_in_place(cycle: tuple[int, int]) -> int:
        here, there = ({(tensor, frame) for tensor, frame, _, _ in placements[end]} for end in cycle)
        return sum(n_bytes.get(tensor, 0) for tensor, _ in here & there)

    return max(candidates, key=bytes_in_place)


# ---- tasks ----------------------------------------------------------------------------------------------------------


def tasks_of(cycle: Cycle, trace: Trace, n_bytes: Mapping[TensorId, int]) -> tuple[list[Task], list[Task]]:
    """What was decided for the ops of a cycle, with op numbers counted from its beginning, in order; and apart from
    that what starts before it: that is started towards the end of the cycle before.
    """
    n_ops = cycle.n_ops
    inside: list[Task] = []
    wrapped: list[Task] = []
    stored: set[tuple[TensorId, int]] = set()
    for made_for, task in cycle.reader.tasks:
        if not cycle.start <= made_for < cycle.end:
            continue
        trigger = task.trigger - cycle.start
        needed_at = task.needed_at - cycle.start if task.needed_at >= 0 else task.needed_at
        if task.kind is TaskKind.STORE:
            store = replace(task, trigger=trigger % n_ops)
            if not 0 <= trigger < n_ops:
                wrapped.append(store)
            elif (task.tensor, trigger) not in stored:
                stored.add((task.tensor, trigger))
                inside.append(store)
        elif trigger < 0 and cycle.closed:
            wrapped.append(replace(task, trigger=trigger + n_ops, needed_at=needed_at + n_ops))
        else:
            inside.append(replace(task, trigger=max(trigger, 0), needed_at=needed_at))
    wrapped = [
        task
        for task in dict.fromkeys(wrapped)
        if task.kind is not TaskKind.STORE or (task.tensor, task.trigger) not in stored
    ]
    stored |= {(task.tensor, task.trigger) for task in wrapped}
    if not cycle.closed:
        unseen = _unseen_stores(cycle, trace, n_bytes)
        inside = [*(task for task in unseen if (task.tensor, task.trigger) not in stored), *inside]
    latest = {task.lane: task.trigger for task in inside if task.kind is not TaskKind.STORE and not task.behind}
    for place, task in enumerate(wrapped):
        if task.kind is not TaskKind.STORE:
            latest[task.lane] = max(latest.get(task.lane, 0), task.trigger)
            wrapped[place] = replace(task, trigger=latest[task.lane])
    return inside, wrapped


def restored_bytes(cycle: Cycle, n_bytes: Mapping[TensorId, int]) -> tuple[int, int]:
    """What is read and written to have the first placement of a cycle again after its last one."""
    if cycle.closed:
        return 0, 0
    wanted = {(tensor, frame) for tensor, frame, _, dead in cycle.begins if not dead}
    there = {(tensor, frame) for tensor, frame, _, dead in cycle.ends if not dead}
    read_bytes = sum(n_bytes[tensor] for tensor, _ in wanted - there)
    return read_bytes, sum(
        n_bytes[tensor]
        for tensor, frame, dirty, dead in cycle.ends
        if dirty and not dead and (tensor, frame) not in wanted
    )


def _unseen_stores(cycle: Cycle, trace: Trace, n_bytes: Mapping[TensorId, int]) -> list[Task]:
    """Stores of a cycle that does not close, which the reader did not see because it went on there.

    A tensor may be in the same frames at both ends, clean at the beginning and dirty at the end. If it then leaves
    before it is changed again, it has to be stored after the last change of the cycle before.
    """
    clean = {(tensor, frame) for tensor, frame, dirty, _ in cycle.begins if not dirty}
    loads = [task for made_for, task in cycle.reader.tasks if cycle.start <= made_for < cycle.end]
    returns_at = {load.tensor: load.needed_at - cycle.start for load in reversed(loads) if load.kind is TaskKind.LOAD}
    changes_of: dict[TensorId, list[int]] = {}
    for index, op in enumerate(trace.ops):
        for access in op.accesses:
            if access.mode in CHANGES:
                changes_of.setdefault(access.tensor, []).append(index)
    stores = []
    dirty_again = (t for t, frame, dirty, dead in cycle.ends if dirty and not dead and (t, frame) in clean)
    for tensor in dirty_again:
        changes = changes_of[tensor]
        if returns_at.get(tensor, cycle.n_ops) <= changes[0]:
            after_last_change = cycle.n_ops - len(trace.ops) + changes[-1] + 1
            stores.append(store_task(tensor, n_bytes[tensor], after_last_change % cycle.n_ops))
    return stores
