"""Plans over three tiers and all lanes, for random steps that look like training: any plan holds, whatever takes how
long, and no simulation is quicker than its busiest lane."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.lookahead.planner import plan_work
from scheduler.planning.bounds import Replay, check_work
from scheduler.planning.machine import Machine
from scheduler.planning.sources import TensorSource
from scheduler.planning.task import Lane, TaskKind
from scheduler.planning.trace import Access, AccessMode, Conditional, Op, OpKind, Trace
from scheduler.planning.work import Work
from scheduler.simulation.simulator import simulate_work

PAGE_BYTES = 1 << 16
PAGE_S = 1e-3
H, D = Tier.HOST, Tier.DEVICE
READ, MODIFY, CREATE, CONSUME = AccessMode.READ, AccessMode.MODIFY, AccessMode.CREATE, AccessMode.CONSUME


@dataclass
class Training:
    """A step over units, each with a parameter in host memory, its copy on the device, states and a gradient.

    Attributes:
        sharded: parameters are gathered from shards, gradients reduced to shards.
        edited: some copies are changed on the device. beside: updates are made by a worker.
        saved: some activations go down and come up again. conditional: some ops use two of three experts.
    """

    rng: random.Random
    sharded: bool = False
    edited: bool = False
    beside: bool = False
    saved: bool = False
    conditional: bool = False
    ops: list[Op] = field(init=False, default_factory=list)
    pages: dict[TensorId, int] = field(init=False, default_factory=dict)
    sources: dict[TensorId, TensorSource] = field(init=False, default_factory=dict)

    def op(
        self, kind: OpKind, *accesses: Access, lane: Lane = Lane.COMPUTE, conditional: Conditional | None = None
    ) -> None:
        """One more op."""
        index, seconds = len(self.ops), self.rng.choice([0.0, PAGE_S, 4 * PAGE_S])
        self.ops.append(Op((kind, index), f"op {index}", accesses, seconds, index, lane, conditional))

    def tensor(self, unit: int, part: int, pages: int) -> TensorId:
        """One of a unit's tensors."""
        found = TensorId(10 * unit + part)
        self.pages[found] = pages
        return found

    def work(self) -> Work:
        """The whole step, in a little more memory than its largest op needs."""
        units = range(self.rng.randint(1, 5))
        saved = [self._forward(unit) for unit in units]
        for unit in reversed(units):
            self._backward(unit, saved[unit])
        need = {tier: max(self._need(op, tier) for op in self.ops) for tier in (H, D)}
        spare = {H: self.rng.randint(2, 12), D: self.rng.randint(0, 5)}
        speeds = {lane: PAGE_BYTES / self.rng.choice([PAGE_S, 10 * PAGE_S, 1e-9]) for lane in Lane}
        machine = Machine(PAGE_BYTES, {tier: need[tier] + spare[tier] for tier in (H, D)}, speeds)
        n_bytes = {tensor: pages * PAGE_BYTES for tensor, pages in self.pages.items()}
        return Work.of(Trace(tuple(self.ops)), n_bytes, machine, None, self.sources)

    def _forward(self, unit: int) -> TensorId | None:
        pages = self.rng.randint(1, 3)
        parameter, copy = self.tensor(unit, 0, pages), self.tensor(unit, 1, pages)
        self.sources[copy] = TensorSource(TaskKind.UPLOAD, parameter, pages * PAGE_BYTES)
        if self.sharded:
            self.sources[parameter] = TensorSource(TaskKind.GATHER, self.tensor(unit, 4, 1), pages * PAGE_BYTES)
        experts = None
        if self.conditional and self.rng.random() < 0.5:
            experts = Conditional(tuple(self.tensor(90, part, 1 + part % 2) for part in range(3)), 2)
        self.op(OpKind.FORWARD, Access(copy, READ, D), conditional=experts)
        if self.edited and not self.sharded and self.rng.random() < 0.3:
            self.op(OpKind.FORWARD, Access(copy, MODIFY, D))
        if not self.saved or self.rng.random() < 0.3:
            return None
        activation = self.tensor(unit, 5, self.rng.randint(1, 2))
        self.op(OpKind.FORWARD, Access(activation, CREATE, H, TaskKind.DOWNLOAD))
        return activation

    def _backward(self, unit: int, activation: TensorId | None) -> None:
        copy, parameter = TensorId(10 * unit + 1), TensorId(10 * unit)
        pages = self.pages[parameter]
        if activation is not None:
            self.op(OpKind.BACKWARD, Access(activation, CONSUME, H, TaskKind.UPLOAD))
        self.op(OpKind.BACKWARD, Access(copy, READ, D))
        if self.sharded:
            whole, parameter = self.tensor(unit, 7, pages), TensorId(10 * unit + 4)
            gradient = self.tensor(unit, 3, 1)
            self.op(OpKind.BACKWARD, Access(whole, CREATE))
            self.op(OpKind.GRADIENT, Access(whole, CONSUME), Access(gradient, CREATE, H, TaskKind.REDUCE_SCATTER))
        else:
            gradient = self.tensor(unit, 3, pages)
            self.op(OpKind.GRADIENT, Access(gradient, CREATE, H, TaskKind.DOWNLOAD if self.saved else None))
        states = self.tensor(unit, 2, 2 * pages)
        update = [Access(parameter, MODIFY), Access(states, MODIFY), Access(gradient, CONSUME)]
        self.op(OpKind.UPDATE, *update, lane=Lane.UPDATE if self.beside else Lane.COMPUTE)

    def _need(self, op: Op, tier: Tier) -> int:
        """Frames for an op, and for what passes through host memory for its sake."""
        own = sum(self.pages[access.tensor] for access in op.accesses if access.tier is tier)
        if tier is D:
            return own
        passing = [self.pages[access.tensor] + self.sharded for access in op.accesses if access.tier is D]
        return own + max(passing, default=0) + (3 if op.conditional else 0)


@st.composite
def trainings(draw: st.DrawFn) -> Work:
    """Steps of all kinds."""
    flags = {name: draw(st.booleans()) for name in ("sharded", "edited", "beside", "saved", "conditional")}
    return Training(random.Random(draw(st.integers(0, 1 << 30))), **flags).work()


@settings(max_examples=60, deadline=None)
@given(trainings())
def test_any_plan_holds_and_takes_as_long_as_its_busiest_lane(work: Work) -> None:
    try:
        plan = plan_work(work)
    except BudgetError:
        return  # What must not leave may lie so that no window is left.
    check_work(plan, work)
    done = simulate_work(plan, work)
    rounding = 1 + 1e-9
    assert done.step_s * rounding >= work.trace.compute_s
    for lane, bytes_per_s in work.machine.bytes_per_s.items():
        if lane is not Lane.UPDATE:
            assert done.step_s * rounding >= done.lane_bytes[lane] / bytes_per_s, lane
    updates_s = sum(op.duration_s for op in work.trace.ops if op.lane is Lane.UPDATE)
    assert done.step_s * rounding >= updates_s
    assert all(0 <= share <= 1 + 1e-9 for share in done.busy.values())


@settings(max_examples=20, deadline=None)
@given(trainings())
def test_a_plan_moves_what_it_says_and_ends_where_it_began(work: Work) -> None:
    try:
        plan = plan_work(work)
    except BudgetError:
        return
    replay = Replay(work, plan)
    began = dict(replay.where)
    for _ in range(3):
        moved = dict(replay.moved_bytes)
        replay.cycle()
        # A copy that is out of date may lie on in frames that nobody wants.
        assert not plan.closed or began.items() <= replay.where.items()
    for lane in Lane:
        assert replay.moved_bytes[lane] - moved[lane] <= plan.lane_bytes.get(lane, 0), lane


def test_the_same_step_gives_the_same_plan() -> None:
    works = [Training(random.Random(7), sharded=True, beside=True, saved=True).work() for _ in range(2)]
    assert plan_work(works[0]) == plan_work(works[1])


@pytest.mark.parametrize("flag", ["sharded", "edited", "beside", "saved", "conditional"])
def test_every_kind_of_task_is_planned(flag: str) -> None:
    kinds = {
        "sharded": {TaskKind.GATHER, TaskKind.REDUCE_SCATTER},
        "edited": {TaskKind.UPLOAD, TaskKind.DOWNLOAD},
        "beside": {TaskKind.UPDATE},
        "saved": {TaskKind.UPLOAD, TaskKind.DOWNLOAD},
        "conditional": {TaskKind.DROP},
    }
    seen: set[TaskKind] = set()
    for seed in range(8):
        try:
            plan = plan_work(Training(random.Random(seed), **{flag: True}).work())
        except BudgetError:
            continue
        seen |= {task.kind for task in plan.tasks}
    assert kinds[flag] <= seen
