"""The I/O threads: order, hand-over, failures and the end."""

from __future__ import annotations

import queue
import threading

import pytest

from pagemem.files.threads import IoPool

TIMEOUT_S = 30.0


class Log:
    """What a pool served, in order, and what failed."""

    def __init__(self) -> None:
        self.served: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.failures: list[BaseException] = []

    def take(self, n: int) -> list[object]:
        return [self.served.get(timeout=TIMEOUT_S) for _ in range(n)]


def test_one_thread_serves_in_order_and_close_serves_what_is_queued() -> None:
    log, gate = Log(), threading.Event()

    def serve(item: int) -> None:
        gate.wait(TIMEOUT_S)
        log.served.put(item)

    pool: IoPool[int] = IoPool("test", 1, serve, log.failures.append)
    for item in range(100):
        pool.submit(item)
    gate.set()
    pool.close()
    pool.close()
    assert log.take(100) == list(range(100))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-")]


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_items_submitted_while_serving_are_all_served(n_threads: int) -> None:
    log = Log()

    def serve(depth: int) -> None:  # a tree: each item but the leaves begins two more
        log.served.put(depth)
        if depth:
            pool.submit(depth - 1)
            pool.submit(depth - 1)

    pool: IoPool[int] = IoPool("test", n_threads, serve, log.failures.append)
    for _ in range(20):
        pool.submit(6)
        assert sum(1 for _ in log.take(2**7 - 1)) == 2**7 - 1
    pool.close()
    assert log.failures == []


def test_a_second_item_from_inside_goes_to_an_idle_thread() -> None:
    log, both_under_way = Log(), threading.Barrier(2)

    def serve(item: str) -> None:
        if item == "first":
            pool.submit("spared a waking")
            pool.submit("woke somebody")
        both_under_way.wait(TIMEOUT_S)  # broken unless two threads serve at once
        log.served.put(item)

    pool: IoPool[str] = IoPool("test", 2, serve, log.failures.append)
    pool.submit("first")
    assert set(log.take(2)) == {"first", "spared a waking"}
    pool.submit("fourth")
    assert set(log.take(2)) == {"woke somebody", "fourth"}
    pool.close()
    assert log.failures == []


def test_threads_serve_side_by_side() -> None:
    log, everybody = Log(), threading.Barrier(4)

    def serve(item: int) -> None:
        everybody.wait(TIMEOUT_S)
        log.served.put(item)

    pool: IoPool[int] = IoPool("test", 4, serve, log.failures.append)
    for item in range(8):
        pool.submit(item)
    assert sorted(map(str, log.take(8))) == sorted(map(str, range(8)))
    pool.close()
    assert log.failures == []


def test_what_serving_raises_is_reported_and_the_thread_goes_on() -> None:
    log = Log()

    def serve(item: int) -> None:
        if item == 0:
            raise KeyboardInterrupt("even this")
        log.served.put(item)

    pool: IoPool[int] = IoPool("test", 1, serve, log.failures.append)
    pool.submit(0)
    pool.submit(1)
    assert log.take(1) == [1]
    pool.close()
    assert [type(failure) for failure in log.failures] == [KeyboardInterrupt]


def test_background_items_give_way_to_the_others() -> None:
    log, gate = Log(), threading.Event()

    def serve(item: str) -> None:
        gate.wait(TIMEOUT_S)
        log.served.put(item)

    pool: IoPool[str] = IoPool("test", 1, serve, log.failures.append)
    pool.submit("first")
    for number in range(3):
        pool.submit(f"background {number}", background=True)
        pool.submit(f"ordinary {number}")
    gate.set()
    pool.close()
    ordinary, background = [[f"{kind} {number}" for number in range(3)] for kind in ("ordinary", "background")]
    served = log.take(7)
    served.remove("first")
    assert served == [*ordinary, *background]


def test_background_items_leave_threads_for_the_others() -> None:
    gates = {name: threading.Event() for name in ("b0", "b1", "b2")}
    log = Log()

    def serve(item: str) -> None:
        log.served.put(item)
        if item in gates:
            gates[item].wait(TIMEOUT_S)

    pool: IoPool[str] = IoPool("test", 3, serve, log.failures.append, 2)
    for name in gates:
        pool.submit(name, background=True)
    assert sorted(str(item) for item in log.take(2)) == ["b0", "b1"]
    pool.submit("ordinary")
    assert log.take(1) == ["ordinary"]
    gates["b1"].set()
    assert log.take(1) == ["b2"]
    for gate in gates.values():
        gate.set()
    pool.close()


def test_background_items_beyond_the_limit_are_served_before_the_pool_ends() -> None:
    log, gate = Log(), threading.Event()

    def serve(item: int) -> None:
        gate.wait(TIMEOUT_S)
        log.served.put(item)

    pool: IoPool[int] = IoPool("test", 2, serve, log.failures.append)
    for item in range(50):
        pool.submit(item, background=True)
    closing = threading.Thread(target=pool.close)
    closing.start()
    gate.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert sorted(int(str(item)) for item in log.take(50)) == list(range(50))
