"""Lanes and a training thread in real time, to hold a simulation against: each lane is a thread that sleeps as long as
its bytes take, and ops sleep as long as they compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Final

from pagemem.files.rate_limit import TokenBucket
from scheduler.planning.machine import Machine
from scheduler.planning.task import Lane, Task
from scheduler.planning.trace import Op

#: What passes a shared rate at a time, as a request of page files would.
_REQUEST_BYTES: Final = 1 << 18


@dataclass(slots=True)
class _RealRun:
    task: Task
    follows: tuple[threading.Event, ...]
    takes_s: float | None
    needs_lane: bool
    over: threading.Event = field(default_factory=threading.Event)


class _LaneThreads:
    """A lane: one thread finds out in order which run could begin, one works on them. Ends with None."""

    def __init__(self, lane: Lane, machine: Machine, shared: TokenBucket | None) -> None:
        self._lane, self._machine, self._shared = lane, machine, shared
        self.waiting: SimpleQueue[_RealRun | None] = SimpleQueue()
        self._ready: SimpleQueue[_RealRun | None] = SimpleQueue()
        self._threads = [threading.Thread(target=run, name=lane.value) for run in (self._look, self._work)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Wait for what is queued, and end."""
        self.waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _look(self) -> None:
        while (run := self.waiting.get()) is not None:
            for other in run.follows:
                other.wait()
            if run.needs_lane:
                self._ready.put(run)
            else:
                run.over.set()
        self._ready.put(None)

    def _work(self) -> None:
        free_s = 0.0
        while (run := self._ready.get()) is not None:
            if run.takes_s is None and self._shared is not None:
                for begin in range(0, run.task.n_bytes, _REQUEST_BYTES):
                    self._shared.take(min(_REQUEST_BYTES, run.task.n_bytes - begin))
            else:
                takes_s = self._machine.seconds(self._lane, run.task.n_bytes) if run.takes_s is None else run.takes_s
                # What a sleep took too long is made up for while the lane stays busy.
                now_s = time.perf_counter()
                free_s = (free_s if now_s - free_s < 1e-3 else now_s) + takes_s
                sleep_until(free_s)
            run.over.set()


class RealLanes:
    """What `scheduler.planning.bounds.Replay` tells of tasks and ops, done; has the methods of `SimulatedLanes` that it
    calls. One thread.

    Args:
        machine: how long bytes take; a shared rate is that of requests which take turns.

    Attributes:
        waited_s: of ops, for tasks.
    """

    def __init__(self, machine: Machine) -> None:
        buckets: dict[Lane, TokenBucket] = {}
        for rate in machine.shared:
            one = TokenBucket(rate.bytes_per_s)
            buckets.update(dict.fromkeys(rate.lanes, one))
        self._lanes = {lane: _LaneThreads(lane, machine, buckets.get(lane)) for lane in Lane}
        self._over: dict[int, threading.Event] = {}
        self._now_s = time.perf_counter()
        self.waited_s = 0.0

    def start(
        self, run: int, task: Task, follows: Iterable[int], duration_s: float | None = None, *, needs_lane: bool = True
    ) -> None:
        """A task goes to its lane."""
        events = tuple(self._over[other] for other in follows if other in self._over)
        made = _RealRun(task, events, duration_s, needs_lane)
        self._over[run] = made.over
        self._lanes[task.lane].waiting.put(made)

    def perform(self, op: Op, _position: int, waits_for: Iterable[int]) -> None:
        """An op waits for tasks and sleeps."""
        wanted = [self._over[run] for run in waits_for if run in self._over]
        began_s = time.perf_counter()
        late = [event for event in wanted if not event.is_set()]
        for event in late:
            event.wait()
        now_s = time.perf_counter()
        if late:
            self.waited_s += now_s - began_s
            self._now_s = now_s
        elif now_s - self._now_s > 1e-2:
            self._now_s = now_s
        self._now_s += op.duration_s
        sleep_until(self._now_s)

    def close(self) -> None:
        """Wait for all tasks and end all threads."""
        for lane in self._lanes.values():
            lane.close()


def sleep_until(at_s: float) -> None:
    """On `time.perf_counter`'s clock; to about a tenth of a millisecond."""
    left_s = at_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)
