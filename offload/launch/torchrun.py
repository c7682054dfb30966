"""Starts the ranks of `offload launch FILE --ranks N`, by torchrun on this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

import torch.distributed.run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from offload.config import Config, ConfigError
from offload.launch.interrupt import SIGNALS
from offload.launch.ranks import THREADS_GIVEN, threads_of_each
from offload.parallel.shareable import check_shareable, shards_of

#: Those that torchrun may act on itself: it kills ranks 30 s later, and their step may take longer.
_AGENTS_SIGNALS: Final = "SIGHUP,SIGQUIT"


def start_ranks(n_ranks: int, config: Config, words: Sequence[str]) -> int:
    """Be torchrun, which runs `offload launch` on each rank and ends them all when one fails.

    Args:
        words: of the command line after ``launch``.

    Returns:
        The exit code: 0, 1 where a rank failed, which has said why, 130 or 143 after a signal.

    Raises:
        ConfigError: there can be no such ranks, or not with this configuration; nothing was started.
    """
    if not 1 <= n_ranks <= 1024:
        raise ConfigError(f"--ranks is {n_ranks}; give a number from 1 to 1024")
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--ranks starts torchrun, and this process is one that torchrun has started; leave it out")
    if n_ranks > 1:
        check_shareable(config)
        shards_of(config.parallel, n_ranks)
    os.environ[THREADS_GIVEN] = str(int("OMP_NUM_THREADS" in os.environ))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_each(n_ranks)))
    # What ranks print says more than the agent's log of processes that it ends.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    standalone = ["--standalone", f"--signals-to-handle={_AGENTS_SIGNALS}", f"--nproc-per-node={n_ranks}"]
    standalone += ["-m", "offload", "launch"]
    before = {number: signal.signal(number, _forward) for number in SIGNALS}
    try:
        torchrun.run(torchrun.parse_args([*standalone, *words]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            said = f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}"
            print(f"offload: {said}; the same command resumes from the last commit", file=sys.stderr)
        return failure.exitcode if failure.exitcode in (130, 143) else 1
    except SignalException as error:
        return 128 + error.sigval
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _forward(number: int, frame: FrameType | None) -> None:
    """Pass a signal on to the ranks, which end by it; torchrun notices. Before there are any, it ends this process."""
    ranks: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            ranks += map(int, (task / "children").read_text().split())
    if not ranks:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
    for pid in ranks:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)


def of_rank() -> str:
    """Which rank a line is of, to begin it with; empty where there is one."""
    rank = os.environ.get("RANK")
    return f"rank {rank}: " if rank is not None and os.environ.get("WORLD_SIZE", "1") != "1" else ""
