"""The ranks of a launched run: what one does for all, and what all decide together. One rank alone is a case of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console

from offload.config import TrainingConfig
from offload.console.output import Output, is_closed
from offload.launch.interrupt import Interrupt
from offload.parallel.shareable import shards_of
from offload.parallel.world import World
from pagemem.errors import RankError
from pagemem.ranks.collectives import Collectives

T = TypeVar("T")


class LaunchRanks:
    """Of one process. Training thread only; methods that agree are called on all ranks in the same order.

    Raises:
        RankError: the environment names ranks, but not how to reach them.
    """

    def __init__(self) -> None:
        self._world = World.current()
        self._collectives: Collectives | None = None
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
        return [list(said) for said in self._collectives.agree(values)]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error of the block ends all ranks, with it for the cause."""
        try:
            yield
        except RankError:
            raise  # all know
        except BaseException as error:
            if self._world is not None:
                self._world.fail(error)
            raise


def ranks_line(config: TrainingConfig, ranks: LaunchRanks) -> str:
    """How many ranks there are, how they share the model, and the batch of all of them."""
    parallel, n = config.parallel, ranks.n_ranks
    shards = shards_of(parallel, n)
    mesh = f"{n} ranks" if shards == n else f"{n} ranks, {n // shards} groups of {shards}"
    rows = config.train.batch * config.update.accumulation
    return f'{mesh}, degree "{parallel.degree}"; a step has {rows * n} rows, {rows} of each rank'


class SharedInterrupt:
    """Whether a run has been asked to end, on any rank: asked for on all of them alike."""

    def __init__(self, own: Interrupt, ranks: LaunchRanks, console: Console) -> None:
        self._own = own
        self._ranks = ranks
        self._console = console

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._ranks.any(self._own.asked())

    def closed(self) -> bool:
        """Whether nobody reads the output any more."""
        return self._ranks.any(is_closed(self._console))
