"""How long something takes on this machine while other programs compute beside it.

A thread that had to wait for a processor makes a run longer by the time slices of whoever had it: milliseconds, for a
kernel of microseconds, and with several compute threads at every barrier. Such runs are not counted, but made again;
where there is no other, the shortest tells most.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

#: Runs are made until those that count took so long in all, and at least `_LEAST_RUNS`, but no more than `_MOST_RUNS`.
_LEAST_S: Final = 0.02
_LEAST_RUNS: Final = 2
_MOST_RUNS: Final = 5
#: Runs that do not count are made again so often, and so long, at most.
_MOST_DISTURBED: Final = 10
_MOST_DISTURBED_S: Final = 0.1
#: A run counts whose thread had a processor for this share of it, or more.
UNDISTURBED: Final = 0.9


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One run.

    Attributes:
        on_processor_s: of ``took_s``, with a processor for the thread that ran it.
        preempted: whether another program took a processor from a thread of this process meanwhile.
    """

    took_s: float
    on_processor_s: float
    preempted: bool = False

    @property
    def counts(self) -> bool:
        """Whether nothing else delayed it."""
        return not self.preempted and self.on_processor_s >= UNDISTURBED * self.took_s


def timed_run(run: Callable[[], object]) -> TimedRun:
    """Run and time it once."""
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    began_s, on_processor_s = time.perf_counter(), time.thread_time()
    run()
    on_processor_s, took_s = time.thread_time() - on_processor_s, time.perf_counter() - began_s
    return TimedRun(took_s, on_processor_s, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > switches)


def timed_runs(run: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> list[TimedRun]:
    """Run it until enough runs count, or too many do not.

    Args:
        prepare: called before each run, untimed.
    """
    made: list[TimedRun] = []
    while not _enough(made):
        prepare()
        made.append(timed_run(run))
    return made


def _enough(made: Sequence[TimedRun]) -> bool:
    counted_s = [one.took_s for one in made if one.counts]
    others_s = [one.took_s for one in made if not one.counts]
    if len(counted_s) >= _LEAST_RUNS and (sum(counted_s) >= _LEAST_S or len(counted_s) >= _MOST_RUNS):
        return True
    return len(others_s) >= _MOST_DISTURBED or (len(others_s) > _LEAST_RUNS and sum(others_s) >= _MOST_DISTURBED_S)


def counted(made: Sequence[TimedRun]) -> list[TimedRun]:
    """Those that count, or the shortest where none does."""
    return [one for one in made if one.counts] or [min(made, key=lambda one: one.took_s)]


def told_s(made: Sequence[TimedRun]) -> float:
    """What one run takes: the median of those that count."""
    return statistics.median(one.took_s for one in counted(made))
