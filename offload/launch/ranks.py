"""The ranks of a launched run: what one does for all, and what all decide together. One rank alone is a case of it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import torch
from rich.console import Console

from offload.config import TrainingConfig
from offload.console.output import Output, is_closed
from offload.launch.interrupt import Interrupt
from offload.parallel.shareable import shards_of
from offload.parallel.world import World
from pagemem.errors import RankError
from pagemem.ranks.collectives import Collectives

T = TypeVar("T")
#: Set to 1 for ranks whose OMP_NUM_THREADS is the user's, also where it is 1.
THREADS_GIVEN: Final = "OFFLOAD_RANK_THREADS_GIVEN"
_PROCESSORS: Final = "the processors divided by the ranks of this machine"


class SaidByAnotherRankError(RankError):
    """What ends this rank is an error that another one prints."""


class LaunchRanks:
    """Of one process. Training thread only; methods that agree are called on all ranks in the same order.

    Attributes:
        wait_s: seconds that those methods have waited for other ranks.

    Raises:
        RankError: the environment names ranks, but not how to reach them.
    """

    def __init__(self) -> None:
        self._world = World.current()
        self._collectives: Collectives | None = None
        self.wait_s = 0.0
        if self._world is not None:
            self._collectives = self._world.collectives(self._world.n_ranks)

    @property
    def rank(self) -> int:
        """This one's number."""
        return 0 if self._world is None else self._world.rank

    @property
    def n_ranks(self) -> int:
        """How many there are."""
        return 1 if self._world is None else self._world.n_ranks

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints, and writes what is not of one rank."""
        return self.rank == 0

    def console(self) -> Console:
        """Where this rank prints to: nowhere, but for the first."""
        return Output(outlives_reader=True) if self.is_first else Console(quiet=True)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag if self._collectives is None else any(bool(said) for (said,) in self._agree([float(flag)]))

    def mean(self, value: float) -> float:
        """The mean over ranks, summed in rank order."""
        found = self.all(value)
        return sum(found) / len(found)

    def all(self, value: float) -> list[float]:
        """What every rank says, in rank order."""
        return [value] if self._collectives is None else [said for (said,) in self._agree([value])]

    def first_then_others(self, call: Callable[[], T]) -> T:
        """Call something on the first rank, and then, with what it has left on the disk, on the others."""
        if self.is_first:
            made = call()
        self.any(False)
        if not self.is_first:
            made = call()
        self.any(False)
        return made

    def _agree(self, values: list[float]) -> list[list[float]]:
        assert self._collectives is not None
        began_s = time.perf_counter()
        found = [list(said) for said in self._collectives.agree(values)]
        self.wait_s += time.perf_counter() - began_s
        return found

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error of the block ends all ranks, with it for the cause."""
        try:
            yield
        except SaidByAnotherRankError:
            raise
        except BaseException as error:
            if self._world is None:
                raise
            why = str(error) if isinstance(error, RankError) else self._world.fail(error)  # of the first all know
            if is_said_elsewhere(error, why):
                raise SaidByAnotherRankError(why) from error
            raise


def is_said_elsewhere(error: BaseException, why: str) -> bool:
    """Whether another rank of this machine prints what this one fails with.

    Args:
        why: the first cause why the ranks stop.
    """
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    first = rank - local_rank
    named = re.match(r"rank (\d+) \(", why)
    cause = -1 if named is None else int(named[1])
    if cause == rank or not isinstance(error, Exception):
        return False
    raised = re.match(r"rank \d+ \([^)]*\) raised ", why) is not None
    if raised and first <= cause < first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return isinstance(error, RankError) or why.endswith(f": {(str(error).splitlines() or [''])[0]}")
    return isinstance(error, RankError) and rank != (first + 1 if cause == first else first)


def ranks_line(config: TrainingConfig, ranks: LaunchRanks) -> str:
    """How many ranks there are, how they share the model, and the batch of all of them."""
    parallel, n = config.parallel, ranks.n_ranks
    shards = shards_of(parallel, n)
    mesh = f"{n} ranks" if shards == n else f"{n} ranks, {n // shards} groups of {shards}"
    rows = config.train.batch * config.update.accumulation
    n_threads = torch.get_num_threads()
    threads = f"{n_threads} thread{'s' * (n_threads > 1)} each, by {_threads_source(config)}"
    return f'{mesh}, degree "{parallel.degree}"; a step has {rows * n} rows, {rows} of each rank; {threads}'


def set_rank_threads(config: TrainingConfig) -> None:
    """Have this rank compute on its part of the machine's processors, where nothing else is said: torchrun sets
    OMP_NUM_THREADS to 1 where it is not set."""
    if _threads_source(config) == _PROCESSORS:
        torch.set_num_threads(threads_of_each(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def threads_of_each(n_local: int) -> int:
    """Threads of each of ``n_local`` ranks of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // n_local)


def _threads_source(config: TrainingConfig) -> str:
    if config.train.threads is not None:
        return "train.threads"
    by_user = os.environ.get(THREADS_GIVEN) == "1" or os.environ.get("OMP_NUM_THREADS", "1") != "1"
    return "OMP_NUM_THREADS" if by_user else _PROCESSORS


class SharedInterrupt:
    """Whether a run has been asked to end, on any rank: asked for on all of them alike."""

    def __init__(self, own: Interrupt, ranks: LaunchRanks, console: Console) -> None:
        self._own = own
        self._ranks = ranks
        self._console = console

    def asked(self) -> bool:
        """Whether a signal has come."""
        asked = self._ranks.any(self._own.asked())
        if asked and self._ranks.is_first:
            self._own.answer()
        return asked

    @property
    def exit_code(self) -> int:
        """As `Interrupt.exit_code`, the same on all ranks."""
        return int(max(self._ranks.all(self._own.exit_code)))

    def closed(self) -> bool:
        """Whether nobody reads the output any more."""
        return self._ranks.any(is_closed(self._console))
