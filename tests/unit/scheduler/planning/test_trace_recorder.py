"""When ops computed, by a clock that is asked only in the end."""

from __future__ import annotations

from pagemem.tier import Tier
from scheduler.planning.trace import Op, OpKind, Trace, TraceRecorder


class Ticks:
    """A clock whose stamps are numbers, one second apart; notes what it is asked for."""

    def __init__(self) -> None:
        self.stamped = 0
        self.asked: list[tuple[int, int]] = []

    def stamp(self) -> int:
        self.stamped += 1
        return self.stamped

    def seconds(self, begun: int, ended: int) -> float:
        self.asked.append((begun, ended))
        return float(ended - begun)


def test_an_op_lasts_from_having_its_tensors_to_the_next_op_less_what_is_not_its_own() -> None:
    clock = Ticks()
    recorder = TraceRecorder({Tier.HOST: clock})
    recorder.pause()
    recorder.begin((OpKind.FORWARD, 0), "first", [])
    recorder.go_on()  # 1
    recorder.pause()  # 2: something outside the step
    assert not recorder.computing
    recorder.go_on()  # 3
    clock.stamp()
    recorder.pause()  # 5
    recorder.begin((OpKind.FORWARD, 1), "second", [])
    clock.stamp()  # waits for its tensors
    assert not recorder.computing
    recorder.go_on()  # 7
    recorder.pause()  # 8
    assert not clock.asked, "a device would have to be waited for"
    assert [op.duration_s for op in recorder.finish().ops] == [1 + 2, 1]


def test_durations_that_nobody_wants_are_not_asked_for() -> None:
    clock = Ticks()
    recorder = TraceRecorder({Tier.HOST: clock})
    for timed in (False, True):
        recorder.begin((OpKind.FORWARD, 0), "op", [])
        recorder.go_on()
        recorder.pause()
        (op,) = recorder.finish(timed=timed).ops
        assert op.duration_s == float(timed) and len(clock.asked) == timed


def test_ops_that_were_not_timed_last_as_long_as_before_as_far_as_the_steps_begin_alike() -> None:
    def step(*ops: tuple[int, float]) -> Trace:
        return Trace(tuple(Op((OpKind.FORWARD, key), str(key), (), duration_s) for key, duration_s in ops))

    later = step((0, 0.0), (1, 0.0), (2, 7.0), (4, 0.0), (5, 0.0))
    later.take_durations(step((0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0), (5, 5.0)))
    assert [op.duration_s for op in later.ops] == [1.0, 2.0, 7.0, 0.0, 0.0]


def test_two_steps_joined_have_their_common_ops_once_and_views_live_as_long_as_in_either() -> None:
    def step(letters: str, seconds: float, **until: int) -> Trace:
        return Trace(
            tuple(
                Op((OpKind.FORWARD, letter), letter, (), seconds, until.get(letter, index))
                for index, letter in enumerate(letters)
            )
        )

    joined = step("abcx", 1.0, b=2).joined(step("adcy", 2.0, a=3))
    assert [(op.name, op.duration_s, op.until) for op in joined.ops] == [
        ("a", 1.0, 5), ("b", 1.0, 3), ("d", 2.0, 2), ("c", 1.0, 3), ("x", 1.0, 4), ("y", 2.0, 5),
    ]  # fmt: skip
    assert step("ab", 1.0).joined(step("ab", 2.0)) == step("ab", 1.0)
