"""Steps that differ from their plans in any way: values are right, frames are within bounds, and nothing waits for ever
(the timeout of the test)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from different_steps import Edits, edits_of, letters, perform
from driver_steps import planned
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from training_rig import Rig, rig

from scheduler import knobs

LETTERS = "ABCDEFG"

#: One op: one or two tensors, read or changed.
ops = st.lists(
    st.tuples(st.sampled_from(LETTERS), st.sampled_from("rrwc")), min_size=1, max_size=2, unique_by=lambda use: use[0]
).map(lambda uses: " ".join(letter + mode for letter, mode in uses))
#: One on a device.
above = st.lists(st.sampled_from(LETTERS.lower()), min_size=1, max_size=2, unique=True).map(
    lambda letters: " ".join(f"{letter}r" for letter in letters)
)
updates = st.sampled_from(LETTERS).map("u: {}w".format)
steps = st.lists(st.one_of(ops, ops, updates), min_size=1, max_size=12)
steps_above = st.lists(st.one_of(above, above, above, ops, updates), min_size=1, max_size=12)


def pass_of(other: str, *, on_device: bool) -> list[str]:
    """Two ops that only read: the tensors of another, and the first."""
    return [" ".join(f"{letter}r" for letter in letters(other)), "ar" if on_device else "Ar"]


@pytest.fixture(autouse=True, scope="module")
def quick_plans() -> Iterator[None]:
    """One plan for each kind of step, not the best of several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs, "KEPT_SHARES", ())
        yield


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    step=steps,
    turns=st.lists(edits_of(ops), min_size=1, max_size=6),
    n_frames=st.integers(3, 8),
    pages=st.dictionaries(st.sampled_from(LETTERS[2:5]), st.just(2), max_size=1),
)
def test_any_steps_after_any_plan_are_right(
    step: list[str], turns: list[Edits], n_frames: int, pages: dict[str, int]
) -> None:
    with rig(n_frames + sum(pages.values()), LETTERS, pages) as r:
        perform_all(r, step, turns)


def test_a_kind_that_comes_again_among_new_ones_has_a_plan_of_its_own() -> None:
    """Not only one with the ops of all, from which it would differ for ever."""
    turns = [[(0, "leave out", "Ar")], [(1, "leave out", "Ar"), (0, "insert", "Er")], [(0, "insert", "Ar")]]
    with rig(5, LETTERS) as r:
        perform_all(r, ["Ar", "Ar"], turns)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    step=steps_above,
    turns=st.lists(edits_of(st.one_of(ops, above)), min_size=1, max_size=6),
    n_frames=st.integers(3, 8),
    device_frames=st.integers(3, 7),
    pages=st.dictionaries(st.sampled_from(LETTERS[2:5]), st.just(2), max_size=1),
)
@example(  # c's original takes the place of d's
    step=["br", "Br", "cr dr", "u: Aw", "er", "ar cr"], turns=[[]], n_frames=3, device_frames=3, pages={}
)
def test_any_steps_over_a_device_are_right(
    step: list[str],
    turns: list[Edits],
    n_frames: int,
    device_frames: int,
    pages: dict[str, int],
) -> None:
    more = sum(pages.values())
    with rig(n_frames + more, LETTERS, pages, device_frames + more) as r:
        perform_all(r, step, turns)


def perform_all(r: Rig, step: list[str], turns: list[Edits]) -> None:
    """Make steps with differences after a plan, and the plan's own step again."""
    planned(r, *step)
    for changes in turns:
        perform(r, step, changes, lambda other: pass_of(other, on_device=r.device is not None))
    r.step(*step)
    follower = r.driver.follower
    assert follower.planned_steps + r.driver.on_demand_steps == len(turns) + 3
    before = follower.deviations
    r.step(*step)
    n_planned = len(follower.trace.ops)
    served = knobs.JOINED_SERVES * n_planned <= len(step) < n_planned
    assert served or follower.deviations == before, "the step is known, and was just made"
    r.read_all()
