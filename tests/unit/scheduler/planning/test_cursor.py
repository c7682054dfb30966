"""Where in its plan a step is."""

from __future__ import annotations

import pytest
from replays import host_plan

from scheduler import knobs
from scheduler.planning.cursor import Advance, Cursor
from scheduler.planning.plan import Plan
from scheduler.planning.trace import Op, OpKey, OpKind, Trace


def key(letter: str) -> OpKey:
    """A small letter is a use, a capital an update."""
    return (OpKind.UPDATE if letter.isupper() else OpKind.FORWARD, letter)


def plan(step: str, n_steps: int = 1) -> Plan:
    """A plan without moves."""
    ops = tuple(Op(key(letter), letter, ()) for letter in step)
    return host_plan(Trace(ops), 1, {}, n_steps=n_steps)


def walked(cursor: Cursor, followed: Plan, letters: str) -> list[tuple[int, range] | None]:
    """Where a step's ops are in the plan, and what each passes over."""
    found = [cursor.advance(followed, key(letter)) for letter in letters]
    return [None if at is None else (at.position, at.skipped) for at in found]


def entered(followed: Plan, position: int = 0) -> Cursor:
    made = Cursor()
    made.enter(followed, position)
    return made


def test_a_cycle_of_two_steps_is_walked_through_and_begins_anew() -> None:
    followed = plan("ab", 2)
    cursor = entered(followed)
    assert [cursor.begin_step(followed), *walked(cursor, followed, "ab")] == [False, (0, range(0)), (1, range(1, 1))]
    assert not cursor.end_step()
    assert [cursor.begin_step(followed), *walked(cursor, followed, "ab")] == [False, (2, range(2, 2)), (3, range(3, 3))]
    assert not cursor.end_step()
    assert cursor.begin_step(followed)
    assert cursor.advance(followed, key("a")) == Advance(0)


def test_an_op_that_the_plan_does_not_have_leaves_the_place_as_it_is() -> None:
    followed = plan("abc")
    cursor = entered(followed)
    assert walked(cursor, followed, "axxbxc") == [(0, range(0)), None, None, (1, range(1, 1)), None, (2, range(2, 2))]
    assert cursor.at_end


def test_ops_left_out_are_passed_over_and_the_place_is_found_again() -> None:
    followed = plan("abcdef")
    cursor = entered(followed)
    assert walked(cursor, followed, "aef") == [(0, range(0)), (4, range(1, 4)), (5, range(5, 5))]


def test_an_op_that_was_passed_over_takes_the_place_back_when_it_comes() -> None:
    followed = plan("abcdbe")
    cursor = entered(followed)
    # The second b is another one: the step has c and d after it, in the end.
    assert walked(cursor, followed, "adcdbe") == [
        (0, range(0)), (3, range(1, 3)), (2, range(0)), (3, range(3, 3)), (4, range(4, 4)), (5, range(5, 5)),
    ]  # fmt: skip


def test_a_place_is_looked_for_in_a_stretch_that_grows_with_what_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "RESYNC_OPS", 2)
    followed = plan("abcdefghijklmn")
    cursor = entered(followed)
    assert walked(cursor, followed, "afghi") == [
        (0, range(0)), None, None, (7, range(1, 7)), (8, range(8, 8)),
    ]  # fmt: skip


def test_updates_made_elsewhere_are_passed_over_in_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "RESYNC_OPS", 0)
    followed = plan("aBCDEFd")
    cursor = entered(followed)
    assert walked(cursor, followed, "ad") == [(0, range(0)), (6, range(1, 6))]


def test_no_op_is_looked_for_in_the_next_step() -> None:
    followed = plan("ab", 2)
    cursor = entered(followed)
    assert walked(cursor, followed, "aba") == [(0, range(0)), (1, range(1, 1)), None]
    assert not cursor.end_step()
    cursor.begin_step(followed)
    assert walked(cursor, followed, "b") == [(3, range(2, 3))]


def test_a_step_that_ends_early_tells_what_is_missing_and_the_next_one_begins_where_it_should() -> None:
    followed = plan("abc", 2)
    cursor = entered(followed)
    walked(cursor, followed, "a")
    assert cursor.end_step() == range(1, 3)
    cursor.begin_step(followed)
    assert walked(cursor, followed, "a") == [(3, range(3, 3))]
    cursor.restart_step(followed)
    assert walked(cursor, followed, "ab") == [(3, range(3, 3)), (4, range(4, 4))]


def test_a_plan_can_be_entered_amid_a_step() -> None:
    followed = plan("abc", 2)
    cursor = entered(followed, 4)
    assert walked(cursor, followed, "bca") == [(4, range(4, 4)), (5, range(5, 5)), None]


def test_a_plan_without_ops_has_no_place_for_any() -> None:
    followed = plan("")
    cursor = entered(followed)
    cursor.begin_step(followed)
    assert cursor.at_end and cursor.advance(followed, key("a")) is None and not cursor.end_step()
