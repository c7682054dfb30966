"""The rate limit, with a clock and a sleep of the test's own: no real time passes."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemem import knobs
from pagemem.files import rate_limit
from pagemem.files.rate_limit import TokenBucket

RATE = 1000.0


class FakeTime:
    """A clock that moves only when somebody sleeps (unless frozen) or the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []
        self.frozen = False

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if not self.frozen:
            self.now_s += seconds


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    made = FakeTime()
    monkeypatch.setattr(rate_limit, "time", made)
    return made


def test_the_burst_passes_at_once_and_the_rest_at_the_rate(fake: FakeTime) -> None:
    limit = TokenBucket(RATE)
    assert limit.take(50) == 0.0
    assert fake.slept == []
    assert limit.take(200) == pytest.approx(0.2)
    assert limit.take(1000) == pytest.approx(1.0)
    assert fake.now_s == pytest.approx(101.2)


def test_a_request_larger_than_the_burst_is_served(fake: FakeTime) -> None:
    assert TokenBucket(RATE).take(4000) == pytest.approx(3.95)


def test_idling_gathers_no_more_than_the_burst(fake: FakeTime) -> None:
    limit = TokenBucket(RATE)
    limit.take(50)
    fake.now_s += 3600
    assert limit.take(50) == 0.0
    assert limit.take(100) == pytest.approx(0.1)


def test_time_passing_elsewhere_pays_off_the_debt(fake: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.frozen = True
    monkeypatch.setattr(knobs, "BURST_S", 0.0)
    limit = TokenBucket(RATE)
    assert limit.take(500) == pytest.approx(0.5)
    fake.now_s += 0.4
    assert limit.take(0) == pytest.approx(0.1)


def test_threads_queue_up_behind_each_other(fake: FakeTime) -> None:
    fake.frozen = True
    limit = TokenBucket(RATE)
    threads = [threading.Thread(target=limit.take, args=(100,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The clock stood still, so each one waits for all before it, in whatever order they came.
    assert sorted(fake.slept) == pytest.approx([(k * 100 - 50) / RATE for k in range(1, 9)])


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10_000)), min_size=1, max_size=30))
def test_never_more_than_burst_and_rate_allow(requests: list[tuple[float, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeTime()
        patch.setattr(rate_limit, "time", fake)
        _never_more(fake, requests)


def _never_more(fake: FakeTime, requests: list[tuple[float, int]]) -> None:
    limit = TokenBucket(RATE)
    start_s, admitted = fake.now_s, 0
    for idle_s, n_bytes in requests:
        fake.now_s += idle_s
        limit.take(n_bytes)
        admitted += n_bytes
        assert admitted <= limit.burst_bytes + RATE * (fake.now_s - start_s) + 1e-3
