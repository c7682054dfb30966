"""The world of ranks that this process is one of, as torchrun has started it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from types import TracebackType
from typing import ClassVar, Final

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from offload.parallel.channel import Channel
from offload.parallel.connections import connect
from offload.parallel.liveness import Liveness
from offload.parallel.rank_collectives import RankCollectives
from offload.parallel.stop_signal import StopSignal
from pagemem.errors import RankError

_VARIABLES: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def ranks_in_environment() -> tuple[int, int]:
    """This process's rank, and how many there are, by the variables that torchrun sets; (0, 1) where none is set.

    Raises:
        RankError: some are set and others not, or they make no sense; names them.
    """
    found = {name: os.environ.get(name) for name in _VARIABLES}
    if found["RANK"] is None and found["WORLD_SIZE"] is None:
        return 0, 1
    missing = [name for name, value in found.items() if value is None]
    if missing:
        there = [name for name, value in found.items() if value is not None]
        raise RankError(f"{', '.join(there)} is set, but not {', '.join(missing)}; start ranks by torchrun")
    numbers = found["RANK"] or "", found["WORLD_SIZE"] or ""
    rank, n_ranks = (int(number) if number.isdecimal() else -1 for number in numbers)
    if not 0 <= rank < n_ranks:
        raise RankError(f"RANK is {numbers[0]!r} and WORLD_SIZE {numbers[1]!r}; start ranks by torchrun")
    return rank, n_ranks


class World:
    """The ranks of a run, one in each process. Use `World.current`.

    Attributes:
        rank, n_ranks: of this process, and of all.
        stop: says why the ranks have stopped, if they have.
    """

    _current: ClassVar[World | None] = None
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, rank: int, n_ranks: int) -> None:
        self.rank, self.n_ranks = rank, n_ranks
        self.stop = StopSignal()
        self._channels: list[Channel] = []
        self._n_made = 0
        self._at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun has a store; started otherwise, rank 0 has it. Each thread has a client of its own.
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not dist.is_initialized()
        self._store = TCPStore(*self._at, is_master=hosts, wait_for_workers=False)
        # Ranks that torchrun starts again find nothing of those before.
        self._prefix = f"offload/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        client = TCPStore(*self._at, is_master=False)
        self._liveness = Liveness(client, self._prefix, rank, n_ranks, self.stop, self._waiting_since_s)
        self._tell_of_exceptions()
        atexit.register(self._end)

    @classmethod
    def current(cls) -> World | None:
        """The world of this process, which is joined at the first call; None: it is the only rank.

        Raises:
            RankError: as `ranks_in_environment`. RuntimeError: the others cannot be reached.
        """
        with cls._guard:
            rank, n_ranks = ranks_in_environment()
            if n_ranks > 1 and cls._current is None:
                cls._current = World(rank, n_ranks)
            return cls._current

    def collectives(self, n_shards: int) -> RankCollectives:
        """New collectives; on all ranks alike, in the same order.

        Args:
            n_shards: ranks in a group that has the whole model.

        Raises:
            RankError: the ranks have stopped.
        """
        if self.stop.why is not None:
            raise RankError(self.stop.why)
        lane, agreement, beside = self._channel(), self._channel(), self._channel()
        return RankCollectives(lane, agreement, beside, self.stop, self._liveness.who, n_shards)

    def fail(self, error: BaseException) -> str:
        """This process fails with an error: have all ranks stop; returns the first cause that any rank has had."""
        said = (str(error).splitlines() or [""])[0]
        self.stop.set(f"{self._liveness.who} raised {type(error).__name__}: {said}")
        assert self.stop.why is not None
        try:
            return self._liveness.publish(self.stop.why)
        except RuntimeError:  # The store has gone, with whoever started the ranks; nobody can be told.
            return self.stop.why

    def _channel(self) -> Channel:
        self._n_made += 1
        prefix = f"{self._prefix}/channel-{self._n_made}"
        connections = connect(self._store, prefix, self.rank, self.n_ranks, self._at, self.stop)
        self._channels.append(Channel(self.rank, connections, self.stop, self._liveness.lost))
        return self._channels[-1]

    def _waiting_since_s(self) -> float | None:
        waits = [channel.waiting_since_s for channel in self._channels]
        return min((since_s for since_s in waits if since_s is not None), default=None)

    def _tell_of_exceptions(self) -> None:
        """Have other ranks know what this process dies of, where Python sees it."""
        before = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            self.fail(error)
            before(kind, error, trace)

        sys.excepthook = hook

    def _end(self) -> None:
        """The process ends."""
        if self.stop.why is None:
            self._liveness.end()
        self._liveness.close()
        for channel in self._channels:
            channel.close()
