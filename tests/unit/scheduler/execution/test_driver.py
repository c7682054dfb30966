"""The driver on a scripted training thread: on demand, by plan, off the plan and back; every tensor read is checked."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from driver_steps import PLAIN, STEP, planned
from replays import without
from training_rig import PAGE_BYTES, Rig, rig

from pagemem.errors import BudgetError
from pagemem.residency.paged_tensor import Residency
from pagemem.telemetry.events import EventKind
from scheduler.execution import step_planner as planning_module
from scheduler.execution.plan_follower import Mode
from scheduler.lookahead.planner import plan_work
from scheduler.planning.bounds import PlanError
from scheduler.planning.plan import Plan
from scheduler.planning.task import TaskKind
from scheduler.planning.trace import OpKind


def deviations(of: Rig) -> list[str]:
    return [event.name for event in of.log.of(EventKind.DEVIATION)]


def mode(of: Rig) -> Mode:
    return of.driver.follower.mode


# ---- on demand ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_frames", [2, 3, 5])
def test_on_demand_every_op_finds_what_was_written_last(n_frames: int) -> None:
    with rig(n_frames) as r:
        for _ in range(3):
            r.step(*STEP, repeatable=False)
        r.read_all()
        follower = r.driver.follower
        assert (follower.mode, r.driver.on_demand_steps, follower.planned_steps) == (Mode.ON_DEMAND, 3, 0)
        assert follower.plan is None


def test_on_demand_the_least_recently_used_tensor_leaves() -> None:
    with rig(3) as r:
        for text in ("Ar", "Br", "Cr", "Ar", "Dr"):
            r.op(text)
        assert r.resident() == "ACD"


def test_a_clean_tensor_leaves_without_a_write_and_a_changed_one_with_one() -> None:
    with rig(1) as r:
        for text in ("Ar", "Bw", "Cr"):
            r.op(text)
        assert r.files.n_writes == 1
        assert r.tensors["A"].state is Residency.ABSENT and r.tensors["B"].state is Residency.STORED
        for text in ("Br", "Cr"):
            r.op(text)
        assert r.files.n_writes == 1


def test_a_consumed_tensor_reads_as_zeros_and_a_created_one_is_not_read() -> None:
    with rig(1) as r:
        for text in ("Aw", "Br", "Ax", "Br", "Ar", "Br", "Ac", "Br", "Ac"):
            r.op(text)
        assert r.files.n_reads == 1, "only the consuming op had something to read"
        r.op("Ar")


def test_tensors_of_an_op_that_stand_in_each_others_way_are_placed_side_by_side() -> None:
    with rig(5, "ABC", pages={"A": 1, "B": 2, "C": 4}) as r:
        for text in ("Aw", "Bw", "Cw", "Br", "Ar Cr", "Aw Cw"):
            r.op(text)
        r.read_all()


# ---- checking the plan ----------------------------------------------------------------------------------------------


def test_a_plan_that_does_not_hold_is_never_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Plan] = []

    def plan_without_stores(*arguments: Any, **named: Any) -> Plan:
        plan = plan_work(*arguments, **named)
        assert plan.stores
        made.append(plan)
        return without(plan, lambda task: task.kind is TaskKind.STORE)

    monkeypatch.setattr(planning_module, "plan_work", plan_without_stores)
    with rig(2) as r:
        for number in (1, 2):
            with pytest.raises(PlanError, match="leaves dirty: it was not stored after its last change$"):
                r.step(*PLAIN)
            assert (r.driver.follower.mode, r.driver.follower.plan, len(made)) == (Mode.ON_DEMAND, None, number)
        r.read_all()


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_an_op_too_large_is_named_and_loses_nothing() -> None:
    with rig(4, "ABC", pages={"B": 2, "C": 3}) as r:
        for text in ("Aw", "Bw", "Cw"):
            r.op(text)
        with pytest.raises(
            BudgetError, match=r"^Bw Cw: . needs . adjacent pages of 64.0 KiB, the host arena has 4"
        ) as caught:
            r.op("Bw Cw")
        assert caught.value.smallest_bytes >= 5 * PAGE_BYTES
        assert not any(tensor.pins for tensor in r.tensors.values())
        r.read_all()


def test_a_tensor_with_a_living_view_stays_and_one_without_leaves() -> None:
    with rig(2) as r:
        r.op("Aw")
        view = r.lease("A")
        alias = view[3:5]
        before = alias.clone()
        for text in ("Bw", "Cw", "Dw", "Br"):
            r.op(text)
        del view
        for text in ("Cr", "Dr"):
            r.op(text)
        assert r.resident() == "AD" and torch.equal(alias, before)
        with pytest.raises(BudgetError, match=r"held by views in use are: parameter 128.0 KiB"):
            r.op("Br Cr")
        del alias
        gc.collect()
        for text in ("Cr", "Dr"):
            r.op(text)
        assert r.resident() == "CD"
        r.op("Ar")


def test_an_op_without_room_beside_its_own_living_view_is_a_budget_error() -> None:
    with rig(3, "ABC", pages={"C": 2}) as r:
        for text in ("Aw", "Bw"):
            r.op(text)
        assert r.tensors["B"].frame == 1
        view = r.lease("B")
        with pytest.raises(BudgetError):
            r.op("Br Cr")
        del view


# ---- by plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", [STEP, PLAIN], ids=["gradients", "plain"])
@pytest.mark.parametrize("n_frames", [2, 3, 4, 5, 9])
def test_steps_that_repeat_are_planned_and_right(ops: tuple[str, ...], n_frames: int) -> None:
    with rig(n_frames) as r:
        for _ in range(8):
            r.step(*ops)
        assert (r.driver.on_demand_steps, r.driver.follower.planned_steps) == (1, 7)
        assert deviations(r) == []
        plan = r.driver.follower.plan
        assert plan is not None and r.mover.tenants.touched_frames <= plan.peak_frames <= n_frames
        r.read_all()


def test_with_room_for_all_planned_steps_move_nothing() -> None:
    with rig(5) as r:
        planned(r, *PLAIN)
        before = r.files.n_reads, r.files.n_writes
        for _ in range(4):
            r.step(*PLAIN)
        assert (r.files.n_reads, r.files.n_writes) == before == (0, 0)


def test_a_step_that_is_not_repeatable_is_not_planned() -> None:
    with rig(3) as r:
        r.step("Ac", "Bc", repeatable=False)
        assert (r.driver.follower.mode, r.driver.follower.plan) == (Mode.ON_DEMAND, None)
        planned(r, "Ar", "Bw")


def test_a_step_without_ops_is_not_planned() -> None:
    with rig(1) as r:
        r.step()
        assert (r.driver.follower.mode, r.driver.follower.plan) == (Mode.ON_DEMAND, None)
        planned(r, "Ar", "Bw")


# ---- steps that differ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_frames", [2, 3, 5])
@pytest.mark.parametrize("place", range(len(PLAIN)))
def test_a_step_that_differs_is_right_and_becomes_the_next_plan(n_frames: int, place: int) -> None:
    other = (*PLAIN[:place], "Er Cw", *PLAIN[place + 1 :])
    with rig(n_frames) as r:
        planned(r, *PLAIN)
        for text in other[: place + 1]:
            r.op(text)
        (why,) = deviations(r)
        assert why.endswith(f" was {PLAIN[place]!r} in the trace and is 'Er Cw' now")
        r.step(*other[place + 1 :])
        assert mode(r) is Mode.PLANNED and r.driver.follower.plan is not None
        assert r.driver.follower.plan.keys[: len(other)] == tuple((OpKind.FORWARD, text) for text in other)
        r.step(*other)
        assert (r.driver.follower.deviations, r.driver.follower.planned_steps, r.driver.on_demand_steps) == (1, 3, 1)
        r.read_all()


@pytest.mark.parametrize("n_frames", [2, 3, 5])
def test_steps_that_alternate_each_follow_their_own_plan(n_frames: int) -> None:
    with rig(n_frames) as r:
        for turn in range(8):
            r.step(*(PLAIN if turn % 2 else STEP))
        assert deviations(r) == ["op 3 was 'Cr Ec' in the trace and is 'Dw' now"]
        assert r.driver.follower.planned_steps == 7
        r.read_all()


def test_the_end_of_a_step_that_turned_out_to_be_of_another_kind_knows_what_comes_then() -> None:
    """Loads for the next step are taken back at its end: updates that wait for them are made before."""
    first, other = ("Ar", "Br", "Bw", "Aw"), ("Ar", "Cr", "Cw", "Aw")
    with rig(2) as r:
        for _ in range(6):  # until it is known how long each op takes
            for step in (first, first, other):
                r.step(*step)
        follower = r.driver.follower
        r.step(*first)
        r.step(*first)
        for op in other:
            r.op(op)
        of_other = follower.plan
        assert not follower.wants_times and not follower.differs
        assert not follower.goes_on(None)
        r.driver.end_step(repeatable=True)
        assert follower.plan is not of_other


@pytest.mark.parametrize("n_frames", [2, 4])
def test_what_differs_in_one_step_costs_only_what_depended_on_it(n_frames: int) -> None:
    ops = tuple(f"{letter}{mode}" for mode in "rw" for letter in "ABCDEFGH")
    with rig(n_frames, "ABCDEFGHX") as r:
        planned(r, *ops)
        for _ in range(3):
            r.step(*ops)
        counted = r.driver.memories.on_demand_bytes
        r.step(*ops[:3], "Xr", *ops[4:])
        assert r.driver.memories.on_demand_bytes - counted <= 3 * PAGE_BYTES, (
            "X, what left for it, and what was expected there"
        )
        r.read_all()


def test_where_every_step_is_new_the_plan_that_there_is_serves_and_few_are_made() -> None:
    with rig(3, "ABCDEFGHX") as r:
        for turn in range(24):
            chosen = [letter for number, letter in enumerate("CDEFGH") if turn + 8 >> number & 1]
            r.step("Ar", "Br", *(f"{letter}w" for letter in chosen), "Bw", "Aw")
        assert r.driver.follower.planned_steps == 23
        assert r.driver.follower.plans_made <= 12
        r.read_all()


@pytest.mark.parametrize("length", range(1, len(PLAIN)))
def test_a_step_that_ends_early_is_right_and_counted(length: int) -> None:
    with rig(2) as r:
        planned(r, *PLAIN)
        r.step(*PLAIN[:length])
        assert deviations(r) == ["the step ended early"]
        for _ in range(3):
            r.step(*PLAIN)
        assert (r.driver.follower.mode, r.driver.follower.deviations) == (Mode.PLANNED, 1), "the full step is known"
        r.read_all()


def test_a_step_that_goes_on_longer_is_right_and_counted() -> None:
    with rig(2) as r:
        planned(r, *PLAIN)
        r.step(*PLAIN, "Er")
        assert deviations(r) == ["the step goes on with 'Er', which it did not in the trace"]
        r.step(*PLAIN, "Er")
        assert (r.driver.follower.deviations, r.driver.follower.planned_steps) == (1, 3)
        r.read_all()
