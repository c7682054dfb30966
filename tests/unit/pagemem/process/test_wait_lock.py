"""Counts of a lock's use: what is counted, from when to when, and that nothing is where nobody counts."""

from __future__ import annotations

import threading

import pytest

from pagemem.process.wait_lock import WaitLock, counted


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("pagemem.process.wait_lock.time", made)
    return made


def test_only_the_outermost_block_counts_and_the_longest_is_kept(clock: Clock) -> None:
    lock = WaitLock("pages")
    with lock:
        pass
    with counted(lock) as found:
        for held_s in (2.0, 5.0, 1.0):
            with lock, lock:
                clock.now_s += held_s
            clock.now_s += 10.0
    with lock:
        clock.now_s += 99.0
    use = found["pages"]
    assert (use.acquisitions, use.held_s, use.longest_hold_s) == (3, 8.0, 5.0)
    assert type(lock) is WaitLock


def test_a_wait_ends_one_hold_and_begins_another(clock: Clock) -> None:
    lock, told = WaitLock("updates"), threading.Event()

    def tell() -> None:
        with lock:
            clock.now_s += 100.0
            lock.notify_all()
        told.set()

    with counted(lock) as found:
        thread = threading.Thread(target=tell)
        with lock, lock:
            clock.now_s += 1.0
            thread.start()
            lock.wait(30.0)
            clock.now_s += 2.0
        assert told.wait(30.0)
        thread.join()
    use = found["updates"]
    assert (use.acquisitions, use.held_s, use.longest_hold_s) == (3, 103.0, 100.0)


def test_counting_that_begins_and_ends_while_the_lock_is_held(clock: Clock) -> None:
    lock = WaitLock("pages")
    with lock:
        with counted(lock) as found, lock:
            clock.now_s += 1.0
        clock.now_s += 1.0
    with pytest.raises(ValueError, match="raised inside"), counted(lock) as again, lock:
        raise ValueError("raised inside")
    assert found["pages"].held_s == 1.0 and again["pages"].acquisitions == 1
    assert lock.acquire(blocking=False), "free again"
    lock.release()


def test_counting_that_ends_while_a_thread_waits_inside_its_block() -> None:
    lock, waits, errors = WaitLock("pages"), threading.Event(), []

    def wait() -> None:
        try:
            with lock:
                waits.set()
                lock.wait(30.0)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    with counted(lock):
        thread.start()
        assert waits.wait(30.0)
        with lock:  # once it waits
            pass
    with lock:
        lock.notify_all()
    thread.join(30.0)
    assert not errors and not thread.is_alive()
    assert lock.acquire(blocking=False)
    lock.release()


def test_two_threads_exclude_each_other_while_they_are_counted() -> None:
    lock, made = WaitLock("pages"), [0]

    def add() -> None:
        for _ in range(2000):
            with lock:
                before = made[0]
                made[0] = before + 1

    with counted(lock) as found:
        threads = [threading.Thread(target=add) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert made[0] == found["pages"].acquisitions == 6000
