"""Plans for steps small enough to plan by hand: what is kept, what leaves, when moves start, and what does not fit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from replays import host_work, moved_bytes

from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.units import KiB
from scheduler import knobs
from scheduler.lookahead.planner import make_plan
from scheduler.lookahead.reader import LookaheadReader
from scheduler.planning.bounds import Replay
from scheduler.planning.machine import TierSpec
from scheduler.planning.plan import Plan, by_trigger
from scheduler.planning.task import load_task, store_task
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace

PAGE_BYTES = 64 * KiB
PAGE_S = 1e-3
MODES = {"r": AccessMode.READ, "w": AccessMode.MODIFY, "c": AccessMode.CREATE, "x": AccessMode.CONSUME}


def tensor(letter: str) -> TensorId:
    return TensorId(ord(letter) - ord("A"))


def step(*ops: str, seconds: float = 0.01, until: dict[int, int] | None = None) -> Trace:
    """Ops written as ``"Ar Bw"``: tensor A is read, B modified (c: created, x: consumed)."""
    made: list[Op] = []
    for index, text in enumerate(ops):
        accesses = tuple(Access(tensor(word[0]), MODES[word[1]]) for word in text.split())
        made.append(Op((OpKind.FORWARD, index), text, accesses, seconds, (until or {}).get(index, index)))
    return Trace(tuple(made))


def plan_for(trace: Trace, n_frames: int, pages: dict[str, int] | None = None) -> Plan:
    """Plan with one page a tensor unless ``pages`` says otherwise; perform three cycles of it."""
    n_bytes = {t: (pages or {}).get(chr(ord("A") + t), 1) * PAGE_BYTES for t in trace.tensors()}
    plan = make_plan(trace, n_bytes, TierSpec(n_frames, PAGE_BYTES, PAGE_BYTES / PAGE_S, PAGE_BYTES / PAGE_S))
    replay = Replay(host_work(plan, trace, n_bytes), plan)
    began = dict(replay.where)
    for _ in range(3):
        moved = moved_bytes(replay)
        replay.cycle()
        assert not plan.closed or replay.where == began
    assert plan.peak_frames == len(replay.touched)
    read, written = (now - then for now, then in zip(moved_bytes(replay), moved, strict=True))
    assert (read, written) == (plan.read_bytes, plan.written_bytes)
    return plan


def loaded(plan: Plan) -> list[str]:
    """What is loaded and for which op of the step, in order: ``"A@3"``; ``"A*@3"`` when only the frames are wanted."""
    return [f"{chr(ord('A') + t.tensor)}{'*' * t.fresh}@{t.needed_at % plan.ops_per_step}" for t in plan.loads]


# ---- kept for good --------------------------------------------------------------------------------------------------


def test_where_the_disk_is_the_limit_some_tensors_stay_for_good() -> None:
    """Sixteen tensors that change in turn, ten frames. Taking what is free soonest each time, all of them would
    move."""
    letters = "ABCDEFGHIJKLMNOP"
    plan = plan_for(step(*(f"{letter}w" for letter in letters), seconds=PAGE_S), 10)
    moving = {task.tensor for task in plan.loads} | {task.tensor for task in plan.stores}
    assert len(moving) < len(letters) and set(plan.initial) - moving
    assert plan.moved_bytes <= 16 * PAGE_BYTES, "six at least cannot stay: 12 pages are read and written"
    assert plan.step_s == pytest.approx(plan.compute_s)


def test_what_dies_or_begins_in_a_step_is_not_kept() -> None:
    """The busiest tensors pass: they are created and consumed in the step, so their frames serve others as well."""
    trace = step("Ac Br", "Ar Cr", "Ar Dr", "Ax Er", "Fc Br", "Fr Cr", "Fx Dr", seconds=PAGE_S)
    plan = plan_for(trace, 4)
    assert not {tensor("A"), tensor("F")} & set(plan.initial)


@pytest.mark.parametrize(("n_ops", "n_walks"), [(900, 1 + len(knobs.KEPT_SHARES)), (1200, 2)])
def test_long_steps_are_walked_twice(n_ops: int, n_walks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[LookaheadReader] = []

    def counted(*arguments: Any) -> LookaheadReader:
        walks.append(LookaheadReader(*arguments))
        return walks[-1]

    monkeypatch.setattr("scheduler.lookahead.cycle.LookaheadReader", counted)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    plan_for(step(*(f"{letters[index % 26]}r" for index in range(n_ops))), 24)
    assert len(walks) == n_walks


# ---- spare memory ---------------------------------------------------------------------------------------------------


def test_with_room_for_all_nothing_moves_and_everything_is_there_from_the_start() -> None:
    plan = plan_for(step("Ar", "Br", "Cr", "Cw", "Bw", "Aw"), n_frames=3)
    assert (plan.loads, plan.stores, plan.carried) == ((), (), ())
    assert plan.closed and plan.n_steps == 1 and plan.peak_frames == 3
    assert sorted(plan.initial) == [tensor("A"), tensor("B"), tensor("C")]
    assert plan.step_s == pytest.approx(plan.compute_s) == pytest.approx(0.06)


def test_frames_that_are_not_needed_are_not_touched() -> None:
    assert plan_for(step("Ar", "Bw"), n_frames=10).peak_frames == 2


def test_what_is_used_again_soonest_stays() -> None:
    # Forward and backward over three layers in two frames: B stays, which is used again before A is.
    plan = plan_for(step("Ar", "Br", "Cr", "Cr", "Br", "Ar"), n_frames=2)
    assert loaded(plan) == ["C@2", "A@5"]
    assert plan.n_steps == 1


def test_spare_frames_save_reads() -> None:
    trace = step("Ar", "Br", "Cr", "Dr", "Dr", "Cr", "Br", "Ar")
    reads = [len(plan.loads) / plan.n_steps for plan in (plan_for(trace, n_frames) for n_frames in (1, 2, 3, 4))]
    assert reads == [6, 4, 2, 0]


# ---- what moves and when --------------------------------------------------------------------------------------------


def test_a_clean_tensor_is_never_stored() -> None:
    plan = plan_for(step("Ar", "Br", "Cr"), n_frames=1)
    assert plan.stores == ()
    assert loaded(plan) == ["A@0", "B@1", "C@2"]


def test_a_changed_tensor_is_stored_right_after_its_last_change() -> None:
    plan = plan_for(step("Aw", "Aw", "Ar", "Br"), n_frames=1)
    assert plan.stores == (store_task(tensor("A"), PAGE_BYTES, 2),)


def test_a_load_starts_as_soon_as_the_last_view_in_its_window_is_gone() -> None:
    for until, trigger in (({}, 1), ({0: 1}, 2), ({0: 2}, 3)):
        plan = plan_for(step("Ar", "Br", "Br", "Br", "Cr", until=until), n_frames=2)
        first = next(task for task in plan.loads if task.tensor == tensor("C"))
        assert (first.trigger, first.needed_at) == (trigger, 4)


def test_the_reader_runs_ahead_over_the_end_of_the_step() -> None:
    plan = plan_for(step("Ar", "Br", "Cr", "Dr", "Dr"), n_frames=2)
    ahead = [task for task in plan.loads if task.needed_at >= len(plan.keys)]
    assert [task.tensor for task in ahead] == [tensor("A")]
    # A first cycle begins with the loads that a cycle before it would have begun.
    assert plan.carried == tuple(replace(task, trigger=0, needed_at=task.needed_at - len(plan.keys)) for task in ahead)


def test_a_created_tensor_gets_frames_without_being_read() -> None:
    plan = plan_for(step("Gc Ar", "Gw Br", "Gx Cr"), n_frames=2)
    assert loaded(plan) == ["G*@0", "A@0", "B@1", "C@2"]


def test_a_consumed_tensor_is_not_stored_though_it_changed() -> None:
    plan = plan_for(step("Gc", "Gx", "Ar", "Br"), n_frames=1)
    assert plan.stores == ()


def test_a_tensor_of_several_pages_takes_adjacent_frames() -> None:
    plan = plan_for(step("Ar", "Br", "Cr", "Dr"), n_frames=4, pages={"A": 3, "B": 2, "C": 2, "D": 1})
    assert plan.peak_frames == 4  # plan_for has checked that windows lie inside and overlap nothing


def test_one_op_that_needs_all_frames_finds_them_whatever_lay_between() -> None:
    plan = plan_for(step("Ar", "Br", "Cr", "Ar Br Cr"), n_frames=6, pages={"A": 1, "B": 2, "C": 3})
    assert plan.peak_frames == 6


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_an_op_too_large_is_named_with_what_it_needs() -> None:
    with pytest.raises(
        BudgetError, match=r"^Br Cw needs 327680 bytes of host pages at once, the budget holds 262144; raise"
    ) as caught:
        plan_for(step("Ar", "Br Cw", "Ar"), n_frames=4, pages={"B": 2, "C": 3})
    assert caught.value.smallest_bytes == 5 * PAGE_BYTES
    plan_for(step("Ar", "Br Cw", "Ar"), n_frames=5, pages={"B": 2, "C": 3})


def test_an_op_that_finds_only_views_in_its_way_is_named() -> None:
    trace = step("Ar", "Br", "Cr", until={0: 2})
    with pytest.raises(BudgetError, match="^Br needs"):
        plan_for(trace, n_frames=1)
    plan_for(trace, n_frames=2)


# ---- the plan's parts -----------------------------------------------------------------------------------------------


def test_a_slow_disk_is_predicted_to_stall_and_a_fast_one_not() -> None:
    trace, n_bytes = step("Ar", "Br", seconds=1.0), {tensor("A"): PAGE_BYTES, tensor("B"): PAGE_BYTES}
    slow, fast = (
        make_plan(trace, n_bytes, TierSpec(1, PAGE_BYTES, speed, speed)) for speed in (PAGE_BYTES / 10.0, 1e12)
    )
    assert slow.step_s == pytest.approx(22.0)
    assert fast.step_s == pytest.approx(2.0)


def test_tasks_are_grouped_by_trigger_in_order() -> None:
    plan = plan_for(step("Ar", "Bw", "Cw", "Ar", "Dr", "Bw"), n_frames=2)
    assert plan.loads and plan.stores
    assert plan.arriving_at == by_trigger(plan.loads) and plan.stores_at == by_trigger(plan.stores)
    a, b, c = (
        load_task(tensor(letter), PAGE_BYTES, plan.loads[0].frame, trigger, 9)
        for letter, trigger in (("A", 4), ("B", 1), ("C", 4))
    )
    assert by_trigger([a, b, c]) == {4: (a, c), 1: (b,)}


def test_what_a_plan_stores() -> None:
    plan = plan_for(step("Aw", "Bw", "Cr"), n_frames=1)
    assert plan.stored() == [tensor("A"), tensor("B")]
    assert plan.ops_per_step == 3


# ---- consumed tensors and views in the way --------------------------------------------------------------------------


def test_a_wrapped_load_waits_for_consumed_tensors_in_its_window() -> None:
    ops = ("Br", "Ac", "Ar", "Ar Br", "Ar Br", "Cc Ax", "Cx Dc")
    trace = step(*ops, seconds=0.0)
    trace.ops[-1].duration_s = PAGE_S
    plan_for(trace, n_frames=5, pages={"B": 2, "C": 2})


def test_a_tensor_with_a_living_view_is_not_placed_anew() -> None:
    with suppress(BudgetError):  # No plan is a right answer too: the driver then goes on without one.
        plan_for(step("Br", "Cr", "Ar", "Ar Br", until={2: 3}), n_frames=3, pages={"B": 2})
