"""Plans by the signatures of steps, and which kind of step is expected."""

from __future__ import annotations

from replays import host_plan

from scheduler import knobs
from scheduler.execution.plan_book import PlanBook, PlannedStep, Signature
from scheduler.planning.trace import Op, OpKey, OpKind, Trace


def keys(letters: str) -> tuple[OpKey, ...]:
    return tuple((OpKind.FORWARD, letter) for letter in letters)


def planned(letters: str) -> PlannedStep:
    """A kind of step with a plan that moves nothing."""
    trace = Trace(tuple(Op(key, str(key[1]), (), until=index) for index, key in enumerate(keys(letters))))
    return PlannedStep(trace, host_plan(trace, 1, {}))


def book(*steps: str) -> tuple[PlanBook, dict[str, PlannedStep]]:
    made, known = PlanBook(), {letters: planned(letters) for letters in steps}
    for step in known.values():
        made.keep(step)
    return made, known


def ended(made: PlanBook, letters: str) -> bool:
    return made.ended(Signature(keys(letters)))


def test_without_plans_nothing_is_expected_and_the_first_step_is_worth_one() -> None:
    made = PlanBook()
    assert made.expected() is None and ended(made, "ab")


def test_what_followed_last_time_is_expected_to_follow_again() -> None:
    made, known = book("ab", "ac", "ad")
    for letters in ("ab", "ac", "ad", "ab"):
        assert not ended(made, letters), "it has a plan"
    assert made.expected() is known["ac"]
    assert made.expected_after(known["ac"]) is known["ad"]
    ended(made, "ad")
    assert made.expected() is known["ab"] and made.expected_after(known["ab"]) is known["ad"], "the last time counts"


def test_a_step_that_repeats_is_expected_to_repeat() -> None:
    made, known = book("ab", "ac")
    for _ in range(2):
        ended(made, "ab")
        assert made.expected() is known["ab"]


def test_a_plan_is_found_by_the_ops_so_far() -> None:
    made, known = book("abc", "abd", "xyz")
    assert made.beginning_with(keys("ab"), keys("d")[0], known["abc"]) is known["abd"]
    assert made.beginning_with(keys("ab"), keys("c")[0], known["abc"]) is None, "that is the present one"
    assert made.beginning_with(keys("ay"), keys("z")[0], known["abc"]) is None
    assert made.beginning_with((), keys("x")[0], known["abc"]) is known["xyz"]
    assert made.beginning_with(keys("xyz"), keys("a")[0], known["abc"]) is None, "it has no more ops"


def test_only_the_plans_used_last_are_kept() -> None:
    letters = [f"a{chr(ord('b') + number)}" for number in range(knobs.KEPT_PLANS + 1)]
    made, known = book(*letters[:-1])
    ended(made, letters[0])
    made.keep(planned(letters[-1]))
    assert made.of(Signature(keys(letters[0]))) is known[letters[0]]
    assert made.of(Signature(keys(letters[1]))) is None


def test_where_every_step_is_new_few_are_worth_a_plan_and_one_that_comes_again_is() -> None:
    made, _ = book("a")
    worth = [ended(made, f"a{number:02}") for number in range(3 * knobs.KEPT_PLANS)]
    assert sum(worth) < knobs.KEPT_PLANS
    assert ended(made, "a05"), "it came before"


def test_a_cleared_book_expects_nothing() -> None:
    made, _ = book("ab", "ac")
    ended(made, "ab")
    made.clear()
    assert made.expected() is None and ended(made, "ab")


def test_where_every_step_is_new_a_plan_for_the_ops_of_all_takes_the_place_of_the_one_followed() -> None:
    made, _ = book("ax")
    for number in range(knobs.NOVEL_STEPS):
        assert ended(made, f"ax{number}")
    followed = planned("a0123456x")
    made.keep(followed)
    wanted = made.wanted(followed, planned("a02467x").trace)
    assert wanted is not None and wanted.joined and [op.name for op in wanted.trace.ops] == list("a01234567x")
    joined = PlannedStep(wanted.trace, host_plan(wanted.trace, 1, {}), joined=True)
    made.keep(joined)
    assert made.of(followed.signature) is None and made.of(joined.signature) is joined
    assert made.wanted(joined, planned("a357x").trace) is None, "it has all of these ops"
    assert made.wanted(joined, planned("bcdefghijk").trace) is None, "the two have nothing in common"
    assert made.of(joined.signature) is joined


def test_steps_that_leave_out_ops_of_a_joined_plan_get_none_of_their_own_but_times_for_it() -> None:
    made, _ = book()
    everything = "abcdefghijklmnopqrstx"
    joined = PlannedStep(planned(everything).trace, host_plan(planned(everything).trace, 1, {}), joined=True)
    made.keep(joined)
    wanted = []
    for left_out in "bcbd":  # the first of the four steps is not measured
        trace = planned(everything.replace(left_out, "")).trace
        for op in trace.ops:
            op.duration_s = 5.0
        wanted.append(made.wanted(joined, trace))
    assert wanted[:3] == [None] * 3
    refined = wanted[3]
    assert refined is not None and refined.joined and refined.durations is joined.durations
    assert refined.trace.keys == joined.trace.keys and {op.duration_s for op in refined.trace.ops} == {5.0}
    assert made.wanted(joined, planned(everything.replace("b", "")).trace) is None
    grown = made.wanted(joined, planned(everything.replace("b", "y")).trace)
    assert grown is not None and grown.joined, "though few steps were new"
    assert made.wanted(joined, planned("abcdefx").trace) is None, "it leaves out much, and may not come again"
    short = made.wanted(joined, planned("abcdefx").trace)
    assert short is not None and not short.joined
