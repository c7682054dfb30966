"""Where KeyboardInterrupt is raised: never inside code that is covered, and never nowhere."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from covered_code import covered

from pagemem.process import interrupts
from pagemem.process.closing import finish

interrupts.cover(covered.__file__)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    covered.inside[0] = 0
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.gettrace() is None and interrupts._waiting is None and not interrupts._guards
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def guarded() -> Iterator[None]:
    interrupts.guard(interrupts)
    yield
    interrupts.unguard(interrupts)


def test_unguarded_it_is_raised_where_it_comes() -> None:
    with pytest.raises(KeyboardInterrupt):
        covered.call(ctrl_c)
    assert covered.inside == [1]


@pytest.mark.usefixtures("guarded")
def test_outside_of_covered_code_it_is_raised_where_it_comes() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
        reached = True
    assert not reached


@pytest.mark.usefixtures("guarded")
def test_covered_code_comes_to_its_end_first() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        covered.call(lambda: (ctrl_c(), covered.work(100), reached.append("end")))
        reached.append("next line")
    assert covered.inside == [0] and reached == ["end"]


@pytest.mark.usefixtures("guarded")
def test_of_two_calls_on_one_line_the_second_is_not_begun() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        _ = covered.call(ctrl_c), reached.append("second")
    assert covered.inside == [0] and not reached


@pytest.mark.usefixtures("guarded")
def test_in_a_finalizer_it_is_not_lost() -> None:
    note = covered.Notes(ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        del note
        pytest.fail("not raised")
    assert covered.inside == [0]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("at", ["enter", "leave"])
def test_a_with_block_is_left(at: str) -> None:
    entered = 0
    with pytest.raises(KeyboardInterrupt):
        with covered.block(ctrl_c if at == "enter" else int, ctrl_c if at == "leave" else int):
            entered += 1
        pytest.fail("not raised")
    assert covered.inside == [0] and entered == (at == "leave")


@pytest.mark.usefixtures("guarded")
def test_an_error_of_ours_is_its_context() -> None:
    def fail() -> None:
        ctrl_c()
        raise ValueError("ours")

    with pytest.raises(KeyboardInterrupt) as raised:
        covered.call(fail)
    assert isinstance(raised.value.__context__, ValueError)


@pytest.mark.usefixtures("guarded")
def test_several_while_one_waits_are_one() -> None:
    with pytest.raises(KeyboardInterrupt):
        covered.call(lambda: [ctrl_c() for _ in range(6)])
    assert covered.inside == [0]
    covered.work(10)


@pytest.mark.usefixtures("guarded")
def test_long_after_the_first_the_second_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "IMPATIENT_AFTER_S", -1.0)
    with pytest.raises(KeyboardInterrupt):
        covered.call(lambda: (ctrl_c(), ctrl_c()))
    assert covered.inside == [1]
    covered.work(10)


@pytest.mark.usefixtures("guarded")
def test_covered_code_can_ask_for_it() -> None:
    asked = []

    def asks() -> None:
        ctrl_c()
        thread = threading.Thread(target=interrupts.check)  # the main thread's alone
        thread.start()
        thread.join()
        asked.append("thread")
        interrupts.check()
        asked.append("never")

    with pytest.raises(KeyboardInterrupt):
        covered.call(asks)
    assert asked == ["thread"] and covered.inside == [1]
    interrupts.check()


@pytest.mark.usefixtures("guarded")
def test_what_is_left_open_is_interrupted_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_open_functions", {covered.call.__code__})
    with pytest.raises(KeyboardInterrupt):
        covered.call(ctrl_c)
    assert covered.inside == [1]
    with pytest.raises(KeyboardInterrupt):
        covered.call(lambda: covered.block(ctrl_c, int).__enter__())
    assert covered.inside == [2]  # the block's own end was made: it is closed


def test_another_handler_is_left_alone() -> None:
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(1))
    interrupts.guard(interrupts)
    covered.call(ctrl_c)
    assert came == [1]
    interrupts.unguard(interrupts)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_place_of_pythons_handler_is_taken_again() -> None:
    interrupts.guard(interrupts)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.renew()
    with pytest.raises(KeyboardInterrupt):
        covered.call(ctrl_c)
    assert covered.inside == [0]
    interrupts.unguard(interrupts)


def test_a_step_comes_to_its_end_whatever_interrupts_it() -> None:
    left = [KeyboardInterrupt(), SystemExit(143)]

    def step() -> None:
        if left:
            raise left.pop(0)

    with pytest.raises(SystemExit):
        finish(step)
    assert not left
    with pytest.raises(ValueError, match="ours"):
        finish(lambda: (_ for _ in ()).throw(ValueError("ours")))


@pytest.mark.usefixtures("guarded")
def test_at_random_instants_each_is_raised_once() -> None:
    chosen, go, over = random.Random(5), threading.Event(), False

    def send() -> None:
        while go.wait() and not over:
            go.clear()
            time.sleep(chosen.random() * 0.002)
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    caught = 0
    for _ in range(300):
        end_s = time.monotonic() + 20.0
        try:
            go.set()
            while time.monotonic() < end_s:
                covered.work(50)
                with covered.block(int, lambda: covered.work(10)):
                    sum(range(20))
        except KeyboardInterrupt:
            caught += 1
        assert covered.inside == [0]
    over = True
    go.set()
    sender.join()
    assert caught == 300
