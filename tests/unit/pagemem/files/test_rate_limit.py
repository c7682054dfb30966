"""The rate limit, with a clock and a sleep of the test's own: no real time passes."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemem.files.rate_limit import TokenBucket

RATE = 1000.0


class FakeTime:
    """A clock that moves only when somebody sleeps (unless frozen) or the test says so."""

    def __init__(self, frozen: bool = False) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []
        self._frozen = frozen

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if not self._frozen:
            self.now_s += seconds


def bucket(time: FakeTime, burst_s: float = 0.05) -> TokenBucket:
    return TokenBucket(RATE, burst_s=burst_s, clock=time.clock, sleep=time.sleep)


def test_the_burst_passes_at_once_and_the_rest_at_the_rate() -> None:
    time = FakeTime()
    limit = bucket(time)
    assert limit.take(50) == 0.0
    assert time.slept == []
    assert limit.take(200) == pytest.approx(0.2)
    assert limit.take(1000) == pytest.approx(1.0)
    assert time.now_s == pytest.approx(101.2)
    assert limit.taken_bytes == 1250


def test_a_request_larger_than_the_burst_is_served() -> None:
    time = FakeTime()
    assert bucket(time).take(4000) == pytest.approx(3.95)


def test_idling_gathers_no_more_than_the_burst() -> None:
    time = FakeTime()
    limit = bucket(time)
    limit.take(50)
    time.now_s += 3600
    assert limit.take(50) == 0.0
    assert limit.take(100) == pytest.approx(0.1)


def test_time_passing_elsewhere_pays_off_the_debt() -> None:
    time = FakeTime(frozen=True)
    limit = bucket(time, burst_s=0.0)
    assert limit.take(500) == pytest.approx(0.5)
    time.now_s += 0.4
    assert limit.take(0) == pytest.approx(0.1)


def test_threads_queue_up_behind_each_other() -> None:
    time = FakeTime(frozen=True)
    limit = bucket(time)
    threads = [threading.Thread(target=limit.take, args=(100,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The clock stood still, so each one waits for all before it, in whatever order they came.
    assert sorted(time.slept) == pytest.approx([(k * 100 - 50) / RATE for k in range(1, 9)])


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10_000)), min_size=1, max_size=30))
def test_never_more_than_burst_and_rate_allow(requests: list[tuple[float, int]]) -> None:
    time = FakeTime()
    limit = bucket(time)
    start_s, admitted = time.now_s, 0
    for idle_s, n_bytes in requests:
        time.now_s += idle_s
        limit.take(n_bytes)
        admitted += n_bytes
        assert admitted <= limit.burst_bytes + RATE * (time.now_s - start_s) + 1e-3


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_must_be_positive(rate: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        TokenBucket(rate)


def test_a_burst_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="negative"):
        TokenBucket(1.0, burst_s=-1.0)
