"""The hand-off under every interleaving of both sides: no thread runs, and hypothesis says who makes the next move.

The training side is the real `LockFreeUpdater`; the updater's side calls the real `UnitChannel` move by move. Wherever
one of them has just read something the other may write, the other may make any number of moves.

A step's gradient is a one at the place of the step's number. So parameters show which updates they have, and how often.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from one_unit import mark, unit_of
from stepped_updater import N, Pages, SavedWeight, SteppedUpdater, WatchedChannel, WatchedClock, WatchedDeque
from torch import Tensor

from optim.gradient_budget import GradientBudget
from optim.lockfree.limits import GradientBudgets, StalenessBound
from optim.lockfree.unit_channel import Version
from optim.lockfree.updater import LockFreeUpdater
from optim.scaling.loss_scale import Scaling
from optim.training import Training
from optim.unit import Slot, Unit, UnitIndex
from pagemem.budget import Budget
from pagemem.process.wait_lock import WaitLock
from pagemem.telemetry.events import NullSink
from pagemem.tier import Tag, Tier
from scheduler.execution.plan_follower import Mode


class HandOff(RuleBasedStateMachine):
    """Training steps, looks and updater's moves in any order and any depth."""

    @initialize(
        slots=st.lists(st.integers(1, 3), min_size=1, max_size=3),
        eager=st.booleans(),
        max_staleness=st.integers(0, 3),
        room=st.integers(0, 2),
    )
    def build(self, slots: list[int], eager: bool, max_staleness: int, room: int) -> None:
        self.units = [unit_of(*[N] * count, number=number) for number, count in enumerate(slots)]
        self.eager, self.max_staleness = eager, max_staleness
        self.foretold = False
        self.step_number = 0
        self.made: dict[Slot, list[int]] = {slot: [] for unit in self.units for slot in unit.slots}
        self.moves: list[int] = []
        self.acts: list[int] = []
        self.busy: str | None = None
        self.events: dict[Unit, list[tuple[str, int]]] = {unit: [] for unit in self.units}
        self.pages = Pages(self.units, self.other_side)
        self.boxes = [WatchedChannel(unit, WatchedClock(self.other_side, self.events[unit])) for unit in self.units]
        for order, slot in enumerate(self.made):
            slot.order = order
        for box in self.boxes:
            box._waiting, box.freed_bytes = WatchedDeque(), WatchedDeque()
            box._waiting.moved = box.freed_bytes.moved = self.other_side  # type: ignore[attr-defined]
        self.updater = SteppedUpdater(list(self.boxes), self.pages)
        sizes = [unit.gradient_bytes for unit in self.units]
        limit_bytes = sum(sizes) + room * max(sizes) + (0 if eager or not room else sum(sizes))
        self.budget = Budget(Tier.HOST, limit_bytes)
        tenants = SimpleNamespace(
            view=lambda tensor, dtype, begin, numel: self.pages.view(tensor.frame, begin * dtype.itemsize, dtype, numel)
        )
        mover = SimpleNamespace(
            tenants=tenants, touch=lambda tensor: None, make_writable=lambda tensor: None, changed=WaitLock("pages")
        )
        driver = SimpleNamespace(
            mover=mover, mode=Mode.ON_DEMAND, end_step=lambda repeatable: None, viewed=lambda tensor: False,
            in_passing=lambda tensor: nullcontext(tensor.resident), updates=SimpleNamespace(finish=list, close=list),
        )  # fmt: skip
        states = SimpleNamespace(follow_edits=lambda unit: None)
        run = Training(
            cast(Any, driver),
            UnitIndex(self.units),
            lambda: [{"lr": self.step_number}],
            tuple,
            Scaling(),
            eager,
            NullSink(),
        )
        self.gradients = GradientBudget(self.budget, limit_bytes, 0)
        self.training = LockFreeUpdater(
            run, cast(Any, SimpleNamespace(state_names=())), cast(Any, self.updater), self.boxes, cast(Any, states),
            GradientBudgets(self.gradients, GradientBudget(self.budget, 0)), StalenessBound(max_staleness),
        )  # fmt: skip

    # ---- who moves ---------------------------------------------------------------------------------------------

    def other_side(self) -> None:
        """One side has read or written something: the other one moves, if it is its turn."""
        if self.busy == "training" and self.moves and not self.updater.moving:
            count = self.moves.pop()
            with self.side("nested"):
                for _ in range(count):
                    self.updater.move()
        elif self.busy == "updater" and self.acts:
            unit = self.units[self.acts.pop() % len(self.units)]
            with self.side("nested"):
                self.training._adoption.adopt(unit, "after")

    @contextmanager
    def side(self, name: str) -> Iterator[None]:
        """Note who is at work."""
        before, self.busy = self.busy, name
        try:
            yield
        finally:
            self.busy = before

    @contextmanager
    def training_side(self, moves: list[int], choice: int) -> Iterator[None]:
        self.moves, self.updater.choice = list(moves), choice
        with self.side("training"):
            yield

    # ---- rules -------------------------------------------------------------------------------------------------

    turns = st.lists(st.integers(0, 7), max_size=24)

    @precondition(lambda self: self.step_number < N - 1)
    @rule(moves=turns, choice=st.integers(0, 2), data=st.data())
    def make_a_step(self, moves: list[int], choice: int, data: st.DataObject) -> None:
        self.step_number += 1
        if self.eager:
            given = {unit: list(unit.slots) for unit in self.units}
        else:
            given = {unit: data.draw(st.lists(st.sampled_from(unit.slots), unique_by=id)) for unit in self.units}
        with self.training_side(moves, choice):
            views = {unit: SavedWeight() for unit in self.units}
            for unit, box in zip(self.units, self.boxes, strict=True):
                waits, behind = self.updater.waits, box.clock.produced - box.clock.applied
                self.training.before_use(unit)
                unit.views.watch(views[unit], None)
                if behind <= self.max_staleness:
                    assert self.updater.waits == waits, "it waited although the bound was kept"
                assert box.clock.staleness <= self.max_staleness, "a use misses too many steps"
            seen = {unit: self.values(unit) for unit in self.units}
            for unit in reversed(self.units):
                assert all(map(torch.equal, seen[unit], self.values(unit))), "parameters changed within a step"
                del views[unit]
                for slot in given[unit]:
                    self.made[slot].append(self.step_number)
                    self.training.gradient(unit, slot, mark(N, self.step_number))
            self.training.step()
            self.training.clear(zeros=False)

    @rule(moves=turns, choice=st.integers(0, 2), which=st.integers(0, 2))
    def look(self, moves: list[int], choice: int, which: int) -> None:
        unit = self.units[which % len(self.units)]
        with self.training_side(moves, choice):
            self.training.settle(unit)
        for slot in unit.slots:
            assert torch.equal(self.pages.of(unit, slot), mark(N, *self.made[slot])), "a look misses an update"

    @rule(count=st.integers(1, 12), acts=st.lists(st.integers(0, 2), max_size=6), choice=st.integers(0, 2))
    def update(self, count: int, acts: list[int], choice: int) -> None:
        self.acts, self.updater.choice = list(acts), choice
        with self.side("updater"):
            for _ in range(count):
                self.updater.move()

    # ---- what always holds -------------------------------------------------------------------------------------

    def values(self, unit: Unit) -> list[Tensor]:
        return [self.pages.of(unit, slot).clone() for slot in unit.slots]

    @invariant()
    def clocks_are_in_order(self) -> None:
        for box in self.boxes:
            assert 0 <= box.clock.adopted <= box.clock.applied <= box.clock.produced

    @invariant()
    def parameters_have_the_first_updates_each_once(self) -> None:
        for unit in self.units:
            for slot in unit.slots:
                found = self.pages.of(unit, slot)
                steps = found.nonzero().flatten().tolist()
                assert steps == self.made[slot][: len(steps)] and float(found.sum()) == len(steps)
                assert self.updater.applied[slot] == self.made[slot][: len(self.updater.applied[slot])]

    @invariant()
    def bytes_stand_for_what_is_on_its_way(self) -> None:
        needed = 0
        for box in self.boxes:
            held = list(box._waiting) + ([] if box.version is None else [box.version])
            needed += sum(
                total.flat.nbytes
                for item in held
                for total in (item.values if isinstance(item, Version) else item.sums).values()
            )
        assert needed <= self.training.direct_bytes <= self.gradients.limit_bytes
        assert self.budget.by_tag().get(Tag.GRAD, 0) == self.training.direct_bytes

    @invariant()
    def versions_are_seen_in_one_order(self) -> None:
        for events in self.events.values():
            published = seen = adopted = 0
            for what, last in events:
                if what == "publish":
                    assert last > published
                    published = last
                elif what == "look":
                    assert last == published, "a look saw something else than the newest publication"
                    seen = last
                else:
                    assert adopted < last == seen, "what was adopted is not what was seen"
                    adopted = last

    def teardown(self) -> None:
        if not hasattr(self, "training"):
            return
        self.training.drain()
        for unit, box in zip(self.units, self.boxes, strict=True):
            assert box.clock.produced == box.clock.applied == box.clock.adopted
            for slot in unit.slots:
                assert torch.equal(self.pages.of(unit, slot), mark(N, *self.made[slot])), (
                    "a gradient was lost or doubled"
                )
        self.training._adoption.collect_freed()
        assert self.training.direct_bytes == 0, "bytes were not given back, or twice"
        self.training.close()
        self.budget.close()


def test_no_interleaving_loses_or_doubles_anything() -> None:
    run_state_machine_as_test(HandOff, settings=settings(max_examples=120, stateful_step_count=25))  # type: ignore[no-untyped-call]
