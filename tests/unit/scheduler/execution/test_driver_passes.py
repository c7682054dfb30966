"""Forward passes that evaluate have plans of their own, and what is announced comes in before its op."""

from __future__ import annotations

import pytest
from driver_steps import PLAIN, planned
from training_rig import PAGE_BYTES, Rig, rig

from pagemem.residency.paged_tensor import Residency
from scheduler.execution.plan_follower import Mode

PASS = ("Ar", "Br", "Cr", "Dr", "Er")


def evaluate(of: Rig, *ops: str) -> None:
    with of.driver.evaluating():
        for text in ops:
            of.op(text)


@pytest.mark.parametrize("n_frames", [2, 3, 5])
def test_passes_that_repeat_are_planned_and_fetch_nothing_on_demand(n_frames: int) -> None:
    with rig(n_frames) as r:
        planned(r, *PLAIN)
        evaluate(r, *PASS)
        passes = r.driver.tracks.passes.follower
        assert passes.mode is Mode.PLANNED
        before = r.driver.memories.on_demand_bytes
        for _ in range(5):
            evaluate(r, *PASS)
        assert r.driver.memories.on_demand_bytes == before
        assert (passes.planned_steps, passes.deviations) == (5, 0)
        assert (r.driver.follower.planned_steps, r.driver.follower.deviations, r.driver.on_demand_steps) == (1, 0, 1)
        r.read_all()


@pytest.mark.parametrize("n_frames", [2, 3, 5])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_passes_between_and_amid_steps_leave_the_plan_of_steps_as_it_is(n_frames: int, place: int) -> None:
    with rig(n_frames) as r:
        planned(r, *PLAIN)
        for _ in range(3):
            for text in PLAIN[:place]:
                r.op(text)
            evaluate(r, *PASS)
            evaluate(r, *PASS)
            r.step(*PLAIN[place:])
        assert (r.driver.follower.planned_steps, r.driver.follower.deviations) == (4, 0)
        r.read_all()


def test_a_pass_inside_a_pass_is_part_of_it_and_one_that_fails_ends() -> None:
    with rig(3) as r:
        for _ in range(3):
            with r.driver.evaluating():
                r.op("Ar")
                evaluate(r, "Br", "Cr")
                assert r.driver.in_pass and not r.driver.in_step
        assert r.driver.tracks.passes.follower.planned_steps == 2
        with pytest.raises(KeyError), r.driver.evaluating():
            r.op("Ar")
            raise KeyError
        assert r.driver.in_step and not r.driver.in_pass


@pytest.mark.parametrize("n_frames", [3, 5])
def test_what_is_announced_comes_in_before_its_op(n_frames: int) -> None:
    with rig(n_frames) as r:
        for text in ("Aw", "Bw", "Cw", "Dw", "Ew", "Ar", "Br"):
            r.op(text)
        r.mover.store_all()
        r.driver.evict_all()
        before = r.driver.memories.on_demand_bytes
        r.driver.announce([r.tensors["D"].id, r.tensors["C"].id])
        assert {r.tensors[letter].state for letter in "DC"} <= {Residency.LOADING, Residency.CLEAN}
        for text in ("Dr", "Cr"):
            r.op(text)
        assert r.driver.memories.on_demand_bytes == before
        r.op("Ar")
        assert r.driver.memories.on_demand_bytes - before == PAGE_BYTES
        r.read_all()


def test_more_is_announced_than_there_is_room_for_and_the_rest_is_fetched_by_its_ops() -> None:
    with rig(2) as r:
        for text in ("Aw", "Bw", "Cw", "Dw", "Ew"):
            r.op(text)
        r.driver.evict_all()
        r.driver.announce([tensor.id for tensor in r.tensors.values()])
        assert r.resident() == "AB", "what was announced first is used first, and does not leave for what comes later"
        for text in PASS:
            r.op(text)
        r.read_all()


def test_announcing_what_the_plan_brings_anyway_changes_nothing() -> None:
    with rig(3) as r:
        planned(r, *PLAIN)
        for _ in range(3):
            for text in PLAIN:
                r.driver.announce([r.tensors[text[0]].id])
                r.op(text)
            r.driver.end_step(repeatable=True)
        assert r.driver.follower.deviations == 0
        r.read_all()
