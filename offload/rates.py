"""What a machine does in a second, as given or as measured here: what forecasts of time are made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from offload.config import Config, ConfigError
from offload.kernels import Kernels, RatedKernels, TimedKernels
from pagemem.mover import ASSUMED_BYTES_PER_S
from pagemem.units import MiB

_MATRIX: Final = 768
_COPY_BYTES: Final = 64 * MiB
_REPEATS: Final = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        flops: floating-point operations of matrix products. ram: bytes that other kernels read and write. Both None: each kernel
            is timed on this machine.
        ssd_read, ssd_write: bytes of the page files.
    """

    flops: float | None
    ram: float | None
    ssd_read: float
    ssd_write: float


def rates_of(
    config: Config, *, flops: float | None = None, ram: float | None = None, ssd_read: float | None = None, ssd_write: float | None = None
) -> Rates:
    """The rates given, and for others: compute as measured now (if only one of both is given; else its kernels are timed later), the
    disk as ``ssd.limit_mb_per_s`` says or as the engine assumes.

    Raises:
        ConfigError: a rate is not above 0.
    """
    for name, value in (("--flops", flops), ("--ram-speed", ram), ("--ssd-read", ssd_read), ("--ssd-write", ssd_write)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value:g}; it must be a number above 0")
    limit = config.ssd.limit_mb_per_s
    assumed = ASSUMED_BYTES_PER_S if limit is None else limit * 1e6
    disk = ssd_read or assumed, ssd_write or assumed
    if flops is None and ram is None:
        return Rates(None, None, *disk)
    with threads_of(config):
        return Rates(flops or _measured_flops(), ram or _measured_copy(), *disk)


def _best_s(run: Callable[[], object]) -> float:
    """The shortest of some runs: what disturbs them only makes them longer."""
    took_s = []
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        run()
        took_s.append(time.perf_counter() - started_s)
    return min(took_s)


def _measured_flops() -> float:
    a = torch.ones(_MATRIX, _MATRIX)
    return 2.0 * _MATRIX**3 / _best_s(lambda: a @ a)


def _measured_copy() -> float:
    source, target = torch.ones(_COPY_BYTES // 4), torch.empty(_COPY_BYTES // 4)
    return 2.0 * _COPY_BYTES / _best_s(lambda: target.copy_(source))


def kernels_of(rates: Rates) -> Kernels:
    """What tells the time of kernels: the rates, or this machine."""
    if rates.flops is not None and rates.ram is not None:
        return RatedKernels(rates.flops, rates.ram)
    return TimedKernels(RatedKernels(_measured_flops(), _measured_copy()))


@contextmanager
def threads_of(config: Config) -> Iterator[None]:
    """Inside, torch computes with the threads that the run would have."""
    threads = torch.get_num_threads()
    torch.set_num_threads((config.train and config.train.threads) or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
