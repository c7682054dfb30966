"""Where in its plan a step is."""

from __future__ import annotations

import pytest
from replays import host_plan

from scheduler.execution.cursor import Advance, Cursor, Divergence
from scheduler.planning.plan import Plan
from scheduler.planning.trace import Op, OpKey, OpKind, Trace


def key(letter: str) -> OpKey:
    """A small letter is a use, a capital an update."""
    return (OpKind.UPDATE if letter.isupper() else OpKind.FORWARD, letter)


def plan(step: str, n_steps: int = 1, *, closed: bool = True) -> Plan:
    """A plan without moves."""
    ops = tuple(Op(key(letter), letter, ()) for letter in step)
    return host_plan(Trace(ops), 1, {}, n_steps=n_steps, closed=closed)


def walked(cursor: Cursor, followed: Plan, letters: str) -> list[Advance | Divergence]:
    return [cursor.advance(followed, key(letter)) for letter in letters]


def entered() -> Cursor:
    made = Cursor()
    made.enter()
    return made


@pytest.mark.parametrize("closed", [True, False])
def test_a_cycle_begins_by_restoring_unless_the_one_before_ended_in_its_placement(closed: bool) -> None:
    cursor, followed = entered(), plan("ab", 2, closed=closed)
    first, *rest = walked(cursor, followed, "abab")
    assert first == Advance(range(1), restores=True)
    assert rest == [Advance(range(n, n + 1), restores=False) for n in (1, 2, 3)]
    assert cursor.end_step(followed)
    assert cursor.advance(followed, key("a")) == Advance(range(1), restores=not closed)


def test_another_op_leads_astray_and_leaves_the_cursor_where_it_is() -> None:
    cursor, followed = entered(), plan("ab")
    walked(cursor, followed, "a")
    assert cursor.advance(followed, key("x")) == Divergence("op 1 was 'b' in the trace and is 'x' now")
    assert cursor.advance(followed, key("b")) == Advance(range(1, 2), restores=False)


def test_updates_made_elsewhere_are_passed_over_with_their_moves() -> None:
    cursor, followed = entered(), plan("aBCd")
    assert walked(cursor, followed, "ad") == [Advance(range(1), restores=True), Advance(range(1, 4), restores=False)]
    assert cursor.end_step(followed)


def test_a_step_ends_where_only_updates_are_missing() -> None:
    cursor, followed = entered(), plan("abC", 2)
    walked(cursor, followed, "a")
    assert not cursor.end_step(followed), "b is missing"
    walked(cursor, followed, "b")
    assert cursor.end_step(followed)
    assert cursor.advance(followed, key("a")) == Advance(range(3, 4), restores=False)


def test_no_step_has_ended_before_its_first_op() -> None:
    assert not entered().end_step(plan("ab"))


def test_what_was_disturbed_is_restored_at_the_beginning_of_a_cycle_only() -> None:
    cursor, followed = entered(), plan("ab", 2)
    walked(cursor, followed, "ab")
    cursor.restoring = True
    assert cursor.advance(followed, key("a")) == Advance(range(1), restores=True), (
        "a step begins: so does the cycle, anew"
    )
    cursor.restoring = True
    assert cursor.advance(followed, key("b")) == Divergence(None), "inside a step it is too late"
