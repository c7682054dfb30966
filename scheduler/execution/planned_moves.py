"""Beginning the moves of a plan: those that an op triggers, and those that put all tiers where the plan has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.gather_ticket import GatherTicket
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.tier import Tier
from pagemem.units import ceil_div
from scheduler.execution.plan_book import PlannedStep
from scheduler.lookahead.placements import loads_to_enter
from scheduler.planning.cursor import Advance
from scheduler.planning.task import Task, TaskKind
from scheduler.planning.trace import OpKind
from scheduler.tiers.memories import Memories


class PlannedMoves:
    """Begins moves. Training thread only, with the movers' locks held.

    Args:
        memories: of all tiers; a device may be added before the first op.

    Attributes:
        placed: tensors are where the plan has them, or on their way there.
        frames: where the plan has each tensor that it uses.
    """

    def __init__(self, memories: Memories) -> None:
        self.placed = False
        self.frames: dict[TensorId, FrameId] = {}
        self._left_out: set[TensorId] = set()
        self._memories = memories

    def start(self, planned: PlannedStep, to: Advance, *, leaves: bool) -> None:
        """Begin the moves of an op, and of those before it that are not made: but loads that only they needed.

        Args:
            leaves: loads for the next cycle are left out: another plan is expected to be followed then.
        """
        plan, n_ops = planned.plan, len(planned.plan.keys)
        unmade = {position for position in to.skipped if plan.keys[position][0] is not OpKind.UPDATE}

        def idle(task: Task) -> bool:
            return task.needed_at % n_ops in unmade and not planned.serves(task, to.position)

        if unmade:
            for memory in reversed(self._memories.all):
                memory.lane.cancel(idle)
        for position in (*to.skipped, to.position):
            for store in plan.stores_at.get(position, ()):
                self._store(self._memories.host.mover.tensors[store.tensor])
            arriving = plan.arriving_at.get(position, ())
            self._take_frames(arriving)
            wanted = [
                task for task in arriving if not (unmade and idle(task)) and not (leaves and task.needed_at >= n_ops)
            ]
            if wanted:
                self._begin(wanted)
        for memory in self._memories.all:
            if memory.lane.stuck:
                memory.lane.pump()

    def _take_frames(self, tasks: Sequence[Task]) -> None:
        """The plan has others in the frames of these tasks from now on, whether or not they are begun."""
        for memory in self._memories.all:
            for tensor in memory.mover.gathered.kept():
                assert tensor.kept_at is not None
                first, last = tensor.kept_at, tensor.kept_at + tensor.n_frames - 1
                for task in tasks:
                    end = task.frame + ceil_div(task.n_bytes, memory.mover.arena.page_bytes)
                    if task.tier is memory.tier and task.frame <= last and first < end:
                        tensor.kept_at = None

    def _begin(self, tasks: Sequence[Task]) -> None:
        self.frames.update((task.tensor, task.frame) for task in tasks)
        numbered = [(next(self._memories.numbers), task) for task in tasks]
        tickets: dict[int, GatherTicket] = {}
        for number, task in numbered:
            if task.kind is TaskKind.GATHER:  # in this order on all ranks, whenever each begins
                mover = self._memories.of(task.tensor).mover
                tickets[number] = mover.gathered.ticket(mover.tensors[task.tensor], planned=True)
                mover.tensors[task.tensor].kept_at = task.frame
        # From the top: what is read by a copy up does not leave for a load that follows it.
        for memory in reversed(self._memories.all):
            own = [entry for entry in numbered if entry[1].tier is memory.tier]
            if own:
                own_tickets = {number: tickets[number] for number, _ in own if number in tickets}
                memory.lane.enqueue(own, own_tickets)

    def _store(self, tensor: PagedTensor) -> None:
        tensor.to_store = tensor.state is Residency.ARRIVING or tensor.updates > 0
        if tensor.state is Residency.DIRTY and not tensor.pins and not tensor.updates:
            self._memories.host.mover.start_store(tensor)

    def place(self, planned: PlannedStep, position: int) -> None:
        """Put every tensor where the plan has it at an op, and queue the loads that would be under way then.

        Only what costs nothing is moved out here; the lanes make dirty tenants leave when a load wants their frames.
        """
        tensors = {tensor.id: tensor for memory in self._memories.all for tensor in memory.mover.tensors.values()}
        tiers = {tensor: memory.tier for memory in self._memories.all for tensor in memory.mover.tensors}
        n_bytes = {number: tensor.n_bytes for number, tensor in tensors.items()}
        page_bytes = self._memories.host.mover.arena.page_bytes
        loads = loads_to_enter(planned.plan, planned.uses, n_bytes, page_bytes, position, tiers)
        self.frames = {task.tensor: task.frame for of_tier in loads.values() for task in of_tier}
        self._leave_out(planned, loads, tensors)
        for memory in reversed(self._memories.all):
            memory.forget_loads()
            for tensor in memory.mover.tensors.values():
                in_use = tensor.held or tensor.uploads or tensor.updates or tensor.kept_at is not None
                movable = tensor.state is Residency.CLEAN and not in_use
                if not movable or self.frames.get(tensor.id) == tensor.frame:
                    continue
                if tensor.frame is not None and tensor.frame < memory.mover.tenants.n_shared_frames:
                    memory.mover.drop(tensor)
        self.placed = True
        for memory in reversed(self._memories.all):
            memory.lane.submit(loads[memory.tier])

    def _leave_out(
        self, planned: PlannedStep, loads: dict[Tier, list[Task]], tensors: Mapping[TensorId, PagedTensor]
    ) -> None:
        """Of copies that are to be there already, leave out those that are not, and whose originals do not come; and
        what is gathered."""
        coming = {task.tensor for task in loads[Tier.HOST]}
        self._left_out.clear()
        for tier, tasks in loads.items():
            for task in list(tasks):
                source = planned.sources.get(task.tensor)
                if source is not None and source.kind is TaskKind.GATHER:
                    # This rank may be the only one that goes over: the op that uses it asks the others.
                    loads[tier].remove(task)
                    self._left_out.update((task.tensor, source.tensor))
                    continue
                if task.kind is not TaskKind.UPLOAD or task.fresh or source is None or source.tensor in coming:
                    continue
                if tensors[task.tensor].frame != task.frame:
                    loads[tier].remove(task)
                    self._left_out.update((task.tensor, source.tensor))

    def is_left_out(self, tensor: TensorId) -> bool:
        """Whether a tensor is brought by the op that uses it next, which begins: in going over to the plan, what it is
        a copy of had no place below. So is that, for it."""
        left_out = tensor in self._left_out
        self._left_out.discard(tensor)
        return left_out

    def forget(self) -> None:
        """Loads that have not begun are not wanted, and the plan's placement is to be brought before going on."""
        for memory in reversed(self._memories.all):
            memory.forget_loads()
        self.let_leave()
        self.placed = False

    def let_leave(self) -> None:
        """What all ranks have gathered may leave. On all ranks."""
        for memory in self._memories.all:
            memory.mover.gathered.let_leave()

    def disturb(self) -> None:
        """Something other than the plan is about to move tensors: as `forget`, and copies up that wait are undone."""
        self.forget()
        for memory in self._memories.all:
            memory.take_back_loads()
