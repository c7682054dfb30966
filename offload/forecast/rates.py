"""What a machine does in a second, as given or as measured here: what forecasts of time are made of."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from offload.config import Config, ConfigError
from offload.forecast.kernels import Kernels, RatedKernels, TimedKernels
from offload.machine.calibration import Calibration
from offload.machine.facts import copy_gb_per_s
from offload.parallel.shareable import sent_share
from pagemem.knobs import ASSUMED_BYTES_PER_S, ASSUMED_UPLOAD_BYTES_PER_S
from scheduler.knobs import ASSUMED_COMM_BYTES_PER_S

_MATRIX: Final = 768


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        flops: floating-point operations of matrix products. ram: bytes that other kernels read and write. Both None:
            each kernel is timed on this machine.
        ssd_read, ssd_write: bytes of the page files. h2d: bytes copied from RAM to the device.
        device_ram: as ``ram``, of kernels on the device; optimizer's updates are made in RAM. None: as ``ram``.
        ssd_limit: bytes of the page files, read and written together (``ssd.limit_mb_per_s``); None: no limit.
        move_s_per_byte: of a processor, that a byte moved takes from compute. None: as where the benchmarks were made.
        link: bytes that a rank sends to others. n_ranks: that share the model. sent_share: see
            `offload.parallel.shareable.sent_share`.
        source: where rates that were not given come from, for people; "": they are built in.
    """

    flops: float | None
    ram: float | None
    ssd_read: float
    ssd_write: float
    h2d: float = ASSUMED_UPLOAD_BYTES_PER_S
    device_ram: float | None = None
    ssd_limit: float | None = None
    move_s_per_byte: float | None = None
    source: str = ""
    link: float = ASSUMED_COMM_BYTES_PER_S
    n_ranks: int = 1
    sent_share: float = 1.0

    @property
    def comm(self) -> float:
        """Bytes of whole units that are gathered or summed in a second."""
        return self.link / self.sent_share

    @property
    def ssd_beside(self) -> tuple[float, float]:
        """Bytes of the page files read, and written, while both go on: what a run that does both sees."""
        limit, slower = self.ssd_limit, min(self.ssd_read, self.ssd_write)
        if limit is None or self.ssd_read + self.ssd_write <= limit:
            return self.ssd_read, self.ssd_write
        least = min(slower, limit / 2)
        return (least, limit - least) if self.ssd_read <= self.ssd_write else (limit - least, least)


def rates_of(
    config: Config,
    *,
    flops: float | None = None,
    ram: float | None = None,
    ssd_read: float | None = None,
    ssd_write: float | None = None,
    h2d: float | None = None,
    device_ram: float | None = None,
    here: Calibration | None = None,
    link: float | None = None,
    n_ranks: int = 1,
) -> Rates:
    """The rates given, and for others: compute as measured now (if only one of both is given; else its kernels are
    timed later), the disk as ``ssd.limit_mb_per_s`` says, as it is ``here``, or as the engine assumes, copies to the
    device as it assumes. That limit is one for reads and writes together, and holds beside given rates.

    Raises:
        ConfigError: a rate is not above 0, or is of a device without the others that a forecast for another machine
            needs.
    """
    given = {
        "--flops": flops,
        "--ram-speed": ram,
        "--ssd-read": ssd_read,
        "--ssd-write": ssd_write,
        "--h2d": h2d,
        "--device-ram-speed": device_ram,
        "--link": link,
    }
    _check_above_0(given)
    if device_ram is not None and (flops is None or ram is None):
        raise ConfigError(
            "--device-ram-speed tells of another machine's device: give its --flops, and --ram-speed of its RAM, too"
        )
    limit = config.ssd.limit_mb_per_s
    shared = None if limit is None else limit * 1e6
    of_this = (None, None) if here is None else (here.ssd_read, here.ssd_write)
    read = ssd_read or shared or of_this[0] or ASSUMED_BYTES_PER_S
    write = ssd_write or shared or of_this[1] or ASSUMED_BYTES_PER_S
    move_s, source = (None, "") if here is None else (here.move_s_per_byte, here.line)
    up = h2d or ASSUMED_UPLOAD_BYTES_PER_S
    share = sent_share(config.parallel, n_ranks) if n_ranks > 1 else 1.0
    others = shared, move_s, source, link or ASSUMED_COMM_BYTES_PER_S, n_ranks, share
    if flops is None and ram is None:
        return Rates(None, None, read, write, up, None, *others)
    with threads_of(config):
        return Rates(
            flops or _measured_flops(), ram or measured_ram_speed(), read, write, up, device_ram, *others
        )  # fmt: skip


def _check_above_0(given: Mapping[str, float | None]) -> None:
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value:g}; it must be a number above 0")


def _measured_flops() -> float:
    a = torch.ones(_MATRIX, _MATRIX)
    return 2.0 * _MATRIX**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=5))


def measured_ram_speed() -> float:
    """Bytes a second that a copy reads and writes here."""
    return 2e9 * copy_gb_per_s()


def kernels_of(rates: Rates, progress: Callable[[int], None] = lambda n_timed: None) -> Kernels:
    """What tells the time of kernels: the rates, or this machine; ``progress`` is told how many it has timed."""
    if rates.flops is not None and rates.ram is not None:
        return RatedKernels(rates.flops, rates.device_ram or rates.ram, rates.ram)
    return TimedKernels(RatedKernels(_measured_flops(), measured_ram_speed()), progress)


@contextmanager
def threads_of(config: Config) -> Iterator[None]:
    """Inside, torch computes with the threads that the run would have."""
    threads = torch.get_num_threads()
    torch.set_num_threads((config.train and config.train.threads) or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
