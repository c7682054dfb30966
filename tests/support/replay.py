"""Performs a plan frame by frame, knowing nothing of how it was made, and stops at the first thing that cannot be.

Copies take no time here: a move is over when its trigger op begins. Contents are version numbers: the one compute wrote
last, the one in host memory, and the one in the page files must agree whenever an op looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pagemem.page import TensorId
from scheduler.plan import LoadTask, Plan
from scheduler.trace import AccessMode, Op, Trace


class PlanError(AssertionError):
    """The plan asks for something impossible, or leaves an op without its tensors."""


@dataclass
class Replay:
    """Host frames under a plan. ``now`` counts ops over all cycles; every version dictionary knows every tensor.

    Attributes:
        frames: owner of each frame.
        where: first frame of what is in host memory.
        locked_until: last op during which a view of the tensor lives.
        host: version in host memory, None when its frames hold anything at all.
    """

    trace: Trace
    plan: Plan
    n_bytes: Mapping[TensorId, int]
    page_bytes: int
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
        self.frames = [None] * self.plan.n_frames
        tensors = self.trace.tensors()
        self.locked_until = dict.fromkeys(tensors, -1)
        self.latest, self.filed = dict.fromkeys(tensors, 0), dict.fromkeys(tensors, 0)
        self.host = dict.fromkeys(tensors)
        self.require(len(self.plan.keys) == self.plan.n_steps * len(self.trace.ops), "the plan has another number of ops")
        self.require(self.plan.keys == self.trace.keys * self.plan.n_steps, "the plan expects other ops")
        triggers = [load.trigger for load in self.plan.loads]
        self.require(triggers == sorted(triggers), "loads start in another order than they stand in")
        for tensor, frame in self.plan.initial.items():
            self.place(tensor, frame)
            self.host[tensor] = 0
        for load in self.plan.carried:
            self.load(load)

    def require(self, holds: bool, otherwise: str) -> None:
        """Stop unless something holds."""
        if not holds:
            raise PlanError(f"op {self.now}: {otherwise}")

    # ---- frames ------------------------------------------------------------------------------------------------

    def size(self, tensor: TensorId) -> int:
        """Frames of a tensor."""
        return -(-self.n_bytes[tensor] // self.page_bytes)

    def place(self, tensor: TensorId, frame: int) -> None:
        """Give free frames to a tensor."""
        wanted = range(frame, frame + self.size(tensor))
        self.require(wanted.start >= 0 and wanted.stop <= len(self.frames), f"{tensor} has no frames {wanted}")
        for taken in wanted:
            self.require(self.frames[taken] is None, f"{tensor} overlaps {self.frames[taken]}")
            self.frames[taken] = tensor
        self.where[tensor] = frame
        self.touched.update(wanted)

    def leave(self, tensor: TensorId) -> None:
        """Make a tenant give its frames up; nothing may be lost by that."""
        self.require(self.locked_until[tensor] < self.now, f"{tensor} leaves while a view of it lives")
        clean = self.host[tensor] in (None, self.filed[tensor])
        self.require(clean or tensor in self.dead, f"{tensor} leaves dirty: it was not stored after its last change")
        self.free(tensor)

    def free(self, tensor: TensorId) -> None:
        """Take a tensor's frames back."""
        first = self.where.pop(tensor)
        self.frames[first : first + self.size(tensor)] = [None] * self.size(tensor)

    # ---- tasks -------------------------------------------------------------------------------------------------

    def load(self, task: LoadTask) -> None:
        """Bring a tensor in, in place of whatever is in its window."""
        tensor = task.tensor
        needing = self.trace.ops[task.needed_at % len(self.trace.ops)]
        self.require(task.trigger <= task.needed_at, f"{tensor} is loaded too late for op {task.needed_at}")
        self.require(tensor in {access.tensor for access in needing.accesses}, f"{tensor} is not for op {task.needed_at}")
        if self.where.get(tensor) == task.frame:
            return
        if tensor in self.where:
            self.leave(tensor)
        for tenant in {t for t in self.frames[task.frame : task.frame + self.size(tensor)] if t is not None}:
            self.leave(tenant)
        self.place(tensor, task.frame)
        self.host[tensor] = None if task.fresh else self.filed[tensor]
        self.bytes_read += 0 if task.fresh else self.n_bytes[tensor]

    def store(self, tensor: TensorId) -> None:
        """Copy a tensor to the page files if it has changed."""
        version = self.host[tensor]
        if tensor in self.where and version is not None and version != self.filed[tensor]:
            self.filed[tensor] = version
            self.bytes_written += self.n_bytes[tensor]

    # ---- ops ---------------------------------------------------------------------------------------------------

    def cycle(self) -> None:
        """Perform all ops of one cycle."""
        n_ops = len(self.trace.ops)
        for position in range(len(self.plan.keys)):
            for store in self.plan.stores:
                if store.trigger == position:
                    self.store(store.tensor)
            for load in self.plan.loads:
                if load.trigger == position:
                    self.load(load)
            op = self.trace.ops[position % n_ops]
            self.perform(op, until=self.now - position % n_ops + op.until)
            self.now += 1
            for tensor in [t for t in self.dead if self.locked_until[t] < self.now]:
                self.dead.remove(tensor)
                self.free(tensor)

    def perform(self, op: Op, until: int) -> None:
        """Let an op look at its tensors and change them."""
        for access in op.accesses:
            tensor = access.tensor
            first = self.where.get(tensor)
            self.require(first is not None, f"{op.name} misses {tensor}")
            assert first is not None
            self.require(set(self.frames[first : first + self.size(tensor)]) == {tensor}, f"{tensor} is overlapped")
            if access.mode is not AccessMode.CREATE:
                self.require(self.host[tensor] == self.latest[tensor], f"{op.name} sees an old {tensor}")
            self.locked_until[tensor] = max(self.locked_until[tensor], until)
            if access.mode is not AccessMode.READ:
                self.versions += 1
                self.latest[tensor] = self.host[tensor] = self.versions
            if access.mode is AccessMode.CONSUME:
                self.filed[tensor] = self.versions  # Nothing is stored: whoever loads it now reads zeros.
                self.dead.add(tensor)
