"""Checks a plan frame by frame, knowing nothing of how it was made, and stops at the first thing that cannot be.

Copies take no time here: a move is over when its trigger op begins (but `scheduler.planning.lanes` may be told of all
moves and ops, to say how long they take). Contents are version numbers: the one compute wrote
last, the one in host memory, and the one in the page files must agree whenever an op looks. Shares no code with the
planner, only the types that both read.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from scheduler.planning.lanes import SimulatedLanes
from scheduler.planning.lookahead import TierSpec
from scheduler.planning.plan import Plan, by_trigger
from scheduler.planning.task import Task
from scheduler.planning.trace import AccessMode, Op, Trace

#: Cycles that `check_bounds` performs: in the second one, tensors are dirty when it begins, as in every later one.
CYCLES: Final = 2
#: A tensor that never moves is in use until then.
_FOR_GOOD: Final = sys.maxsize


class PlanError(AssertionError):
    """The plan asks for something impossible, or leaves an op without its tensors. A defect, never a caller's
    mistake."""


def check_bounds(
    plan: Plan,
    trace: Trace,
    n_bytes: Mapping[TensorId, int],
    tier: TierSpec,
    resident: Mapping[TensorId, FrameId] | None = None,
) -> None:
    """Perform a plan for some cycles and prove that it can be followed.

    Proven for every op: its tensors are whole in host frames when it begins, and of the newest version; no frame has
    two tenants; no load takes the frames of a tensor that is in use or was not stored after its last change; no more
    frames are used than there are.

    Args:
        trace, n_bytes, tier, resident: what the plan was made of; see `scheduler.make_plan`.

    Raises:
        PlanError: something does not hold; names the first op and tensor.
    """
    replay = Replay(trace, plan, n_bytes, tier.page_bytes, resident or {})
    replay.require(plan.n_frames <= tier.n_frames, f"the plan has {plan.n_frames} frames, the tier {tier.n_frames}")
    for _ in range(CYCLES):
        replay.cycle()
    replay.require(
        plan.peak_frames >= len(replay.touched),
        f"{len(replay.touched)} frames are touched, the plan says {plan.peak_frames}",
    )


@dataclass
class Replay:
    """Host frames under a plan. ``now`` counts ops over all cycles; every version dictionary knows every tensor.

    Attributes:
        resident: tensors that are in host memory for good, and their first frames.
        lanes: is told of every move and op.
        frames: owner of each frame.
        where: first frame of what is in host memory.
        locked_until: last op during which a view of the tensor lives.
        host: version in host memory, None when its frames hold anything at all.

    Raises:
        PlanError: the plan is not one of this trace, or cannot begin.
    """

    trace: Trace
    plan: Plan
    n_bytes: Mapping[TensorId, int]
    page_bytes: int
    resident: Mapping[TensorId, FrameId] = field(default_factory=dict)
    lanes: SimulatedLanes | None = None
    frames: list[TensorId | None] = field(init=False)
    where: dict[TensorId, int] = field(default_factory=dict)
    locked_until: dict[TensorId, int] = field(init=False)
    latest: dict[TensorId, int] = field(init=False)
    host: dict[TensorId, int | None] = field(init=False)
    filed: dict[TensorId, int] = field(init=False)
    dead: set[TensorId] = field(default_factory=set)
    touched: set[int] = field(default_factory=set)
    versions: int = 0
    now: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __post_init__(self) -> None:
        plan = self.plan
        self.frames = [None] * plan.n_frames
        tensors = list(dict.fromkeys([*self.trace.tensors(), *self.resident]))
        self.locked_until = dict.fromkeys(tensors, -1)
        self.latest, self.filed = dict.fromkeys(tensors, 0), dict.fromkeys(tensors, 0)
        self.host = dict.fromkeys(tensors)
        self._wants = [{access.tensor for access in op.accesses} for op in self.trace.ops]
        self.require(len(plan.keys) == plan.n_steps * len(self.trace.ops), "the plan has another number of ops")
        self.require(plan.keys == self.trace.keys * plan.n_steps, "the plan expects other ops")
        triggers = [load.trigger for load in plan.loads]
        self.require(triggers == sorted(triggers), "loads start in another order than they stand in")
        triggers += [store.trigger for store in plan.stores]
        self.require(
            all(0 <= trigger < len(plan.keys) for trigger in triggers), "a move is triggered by no op of the cycle"
        )
        self.require(
            (plan.loads_at, plan.stores_at) == (by_trigger(plan.loads), by_trigger(plan.stores)),
            "the moves by op are not those of the plan",
        )
        for tensor, resident_frame in self.resident.items():
            self.require(
                plan.initial.get(tensor) == resident_frame,
                f"{tensor} is resident at frame {resident_frame} and not planned there",
            )
            self.locked_until[tensor] = _FOR_GOOD
        for tensor, frame in plan.initial.items():
            self.require(tensor in self.host, f"{tensor} is placed and never used")
            self.place(tensor, frame)
            self.host[tensor] = 0
        for load in plan.carried:
            self.load(load)

    def require(self, holds: bool, otherwise: str) -> None:
        """Stop unless something holds."""
        if not holds:
            raise PlanError(f"op {self.now}: {otherwise}")

    # ---- frames ------------------------------------------------------------------------------------------------

    def size(self, tensor: TensorId) -> int:
        """Frames of a tensor."""
        return -(-self.n_bytes[tensor] // self.page_bytes)

    def window(self, tensor: TensorId, frame: int) -> slice:
        """The frames of a tensor that begins at ``frame``."""
        return slice(frame, frame + self.size(tensor))

    def place(self, tensor: TensorId, frame: int) -> None:
        """Give free frames to a tensor."""
        size = self.size(tensor)
        if frame < 0 or frame + size > len(self.frames):
            raise PlanError(
                f"op {self.now}: {tensor} has no frames {frame}..{frame + size - 1}: there are {len(self.frames)}"
            )
        for taken in self.frames[frame : frame + size]:
            if taken is not None:
                raise PlanError(f"op {self.now}: {tensor} overlaps {taken}")
        self.frames[frame : frame + size] = [tensor] * size
        self.where[tensor] = frame
        self.touched.update(range(frame, frame + size))

    def leave(self, tenants: Collection[TensorId]) -> None:
        """Make tenants give their frames up; nothing may be lost by that."""
        for tensor in tenants:
            self.require(self.locked_until[tensor] < self.now, f"{tensor} leaves while a view of it lives")
            lost = self.is_dirty(tensor) and tensor not in self.dead
            self.require(not lost, f"{tensor} leaves dirty: it was not stored after its last change")
            self.free(tensor)
        if self.lanes is not None:
            self.lanes.leave(tenants)

    def free(self, tensor: TensorId) -> None:
        """Take a tensor's frames back."""
        size = self.size(tensor)
        first = self.where.pop(tensor)
        self.frames[first : first + size] = [None] * size

    # ---- tasks -------------------------------------------------------------------------------------------------

    def load(self, task: Task) -> None:
        """Bring a tensor in, in place of whatever is in its window."""
        tensor = task.tensor
        self.require(task.trigger <= task.needed_at, f"{tensor} is loaded too late for op {task.needed_at}")
        self.require(
            tensor in self._wants[task.needed_at % len(self._wants)], f"{tensor} is not for op {task.needed_at}"
        )
        if self.where.get(tensor) == task.frame:
            return
        self.require(task.frame >= 0, f"{tensor} has no frames {task.frame}")
        tenants = {t for t in self.frames[self.window(tensor, task.frame)] if t is not None}
        self.leave(tenants | ({tensor} & self.where.keys()))
        self.bring(tensor, task.frame, fresh=task.fresh)

    def bring(self, tensor: TensorId, frame: int, *, fresh: bool) -> None:
        """Bring a tensor into free frames."""
        self.place(tensor, frame)
        self.host[tensor] = None if fresh else self.filed[tensor]
        self.bytes_read += 0 if fresh else self.n_bytes[tensor]
        if self.lanes is not None:
            self.lanes.load(tensor, fresh=fresh)

    def is_dirty(self, tensor: TensorId) -> bool:
        """Whether a tensor has content that is not in the page files."""
        return tensor in self.where and self.host[tensor] not in (None, self.filed[tensor])

    def store(self, tensor: TensorId) -> None:
        """Copy a tensor to the page files if it has changed."""
        version = self.host[tensor]
        if version is not None and self.is_dirty(tensor):
            self.filed[tensor] = version
            self.bytes_written += self.n_bytes[tensor]
            if self.lanes is not None:
                self.lanes.store(tensor)

    def restore(self) -> None:
        """Between two cycles of a plan that does not close: put every tensor where a cycle begins."""
        initial = self.plan.initial
        misplaced = sorted(tensor for tensor, frame in self.where.items() if initial.get(tensor) != frame)
        for tensor in misplaced:
            self.store(tensor)
        self.leave(misplaced)
        first_uses = self.trace.first_uses()
        for tensor in sorted(initial, key=lambda tensor: (first_uses.get(tensor, 0), tensor)):
            if tensor not in self.where:
                self.bring(tensor, initial[tensor], fresh=False)
        for load in self.plan.carried:
            self.load(load)

    # ---- ops ---------------------------------------------------------------------------------------------------

    def cycle(self) -> None:
        """Perform all ops of one cycle, after having restored its first placement where the one before ended with
        another."""
        if self.now and not self.plan.closed:
            self.restore()
        n_ops = len(self.trace.ops)
        for position in range(len(self.plan.keys)):
            for store in self.plan.stores_at.get(position, ()):
                self.store(store.tensor)
            for load in self.plan.loads_at.get(position, ()):
                self.load(load)
            op = self.trace.ops[position % n_ops]
            self.perform(op, until=self.now - position % n_ops + op.until)
            if self.lanes is not None:
                self.lanes.perform(op, position)
            self.now += 1
            for tensor in [t for t in self.dead if self.locked_until[t] < self.now]:
                self.dead.remove(tensor)
                self.free(tensor)

    def perform(self, op: Op, until: int) -> None:
        """Let an op look at its tensors and change them."""
        for access in op.accesses:
            tensor = access.tensor
            first = self.where.get(tensor)
            if access.mode is AccessMode.RENEW:
                self.versions += 1
                self.latest[tensor] = self.filed[tensor] = self.versions
                if first is not None:
                    self.dead.add(tensor)
                continue
            if first is None:
                raise PlanError(f"op {self.now}: {op.name} misses {tensor}")
            size = self.size(tensor)
            if self.frames[first : first + size].count(tensor) != size:
                raise PlanError(f"op {self.now}: {op.name} finds {tensor} overlapped")
            if access.mode is not AccessMode.CREATE and self.host[tensor] != self.latest[tensor]:
                raise PlanError(f"op {self.now}: {op.name} sees an old {tensor}")
            self.locked_until[tensor] = max(self.locked_until[tensor], until)
            if access.mode is not AccessMode.READ:
                self.versions += 1
                self.latest[tensor] = self.host[tensor] = self.versions
            if access.mode is AccessMode.CONSUME:
                self.filed[tensor] = self.versions  # Nothing is stored: whoever loads it now reads zeros.
                self.dead.add(tensor)
