"""Beginning the moves of a plan: those that an op triggers, and those that put a tier where the plan has it."""

from __future__ import annotations

from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import Residency
from scheduler.execution.lower_tier import LowerTier
from scheduler.execution.plan_book import PlannedStep
from scheduler.execution.read_lane import ReadLane
from scheduler.lookahead.placements import loads_to_enter
from scheduler.planning.cursor import Advance
from scheduler.planning.task import Task
from scheduler.planning.trace import OpKind


class PlannedMoves:
    """Begins moves of one tier. Training thread only, with the mover's lock held.

    Attributes:
        placed: tensors are where the plan has them, or on their way there.
        frames: where the plan has each tensor that it uses.
    """

    def __init__(self, mover: Mover, lane: ReadLane, lower: LowerTier | None) -> None:
        self.placed = False
        self.frames: dict[TensorId, FrameId] = {}
        self._mover = mover
        self._lane = lane
        self._lower = lower

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
            self._lane.cancel(idle)
        for position in (*to.skipped, to.position):
            for store in plan.stores_at.get(position, ()):
                tensor = self._mover.tensors[store.tensor]
                tensor.to_store = tensor.state is Residency.ARRIVING
                if tensor.state is Residency.DIRTY and not tensor.pins:
                    self._mover.start_store(tensor)
            loads = [
                task
                for task in plan.loads_at.get(position, ())
                if not (unmade and idle(task)) and not (leaves and task.needed_at >= n_ops)
            ]
            if loads:
                self.frames.update((task.tensor, task.frame) for task in loads)
                self._lane.submit(loads)
        if self._lane.stuck:
            self._lane.pump()

    def place(self, planned: PlannedStep, position: int) -> None:
        """Put every tensor where the plan has it at an op, and queue the loads that would be under way then.

        Only what costs nothing is moved out here; the lane makes dirty tenants leave when a load wants their frames.
        """
        self._lane.clear()
        n_bytes = {tensor.id: tensor.n_bytes for tensor in self._mover.tensors.values()}
        loads = loads_to_enter(planned.plan, planned.uses, n_bytes, self._mover.arena.page_bytes, position)
        self.frames = {task.tensor: task.frame for task in loads}
        for tensor in self._mover.tensors.values():
            movable = tensor.state is Residency.CLEAN and not tensor.held and not tensor.uploads
            if not movable or self.frames.get(tensor.id) == tensor.frame:
                continue
            if tensor.frame is not None and tensor.frame < self._mover.tenants.n_shared_frames:
                self._mover.drop(tensor)
        self.placed = True
        self._lane.submit(loads)

    def forget(self) -> None:
        """Loads that have not begun are not wanted, and the plan's placement is to be brought before going on."""
        self._lane.clear()
        self.placed = False

    def disturb(self) -> None:
        """Something other than the plan is about to move tensors: as `forget`, and copies up that wait are undone."""
        self.forget()
        if self._lower is not None:
            self._lower.cancel_loads()
