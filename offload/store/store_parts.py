"""What a page store is made of, one method for each part: a rehearsal replaces the parts that would hold bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from offload.config import Config
from offload.parallel.shareable import check_shareable, shards_of
from offload.parallel.world import World
from optim.lockfree.unit_channel import UnitChannel
from optim.scaling.loss_scale import LossScale, Scaling
from optim.unit import Unit
from pagemem.devices.accelerator import Accelerator, RamDevice
from pagemem.devices.arena import Arena, HostArena
from pagemem.devices.cuda import CudaDevice
from pagemem.files.page_file import PageFiles
from pagemem.folders.run_directory import RunDirectory
from pagemem.ranks.collectives import Collectives
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.mover import Mover
from pagemem.sources.source_reader import CHUNK_BYTES
from pagemem.sources.source_transfers import SourceFiles
from pagemem.telemetry.events import EventSink
from scheduler.execution.driver import Driver


class StoreParts:
    """Makes the parts that a configuration asks for."""

    #: Where parameters are built.
    device: ClassVar[str] = "cpu"

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def spill_folder(self) -> Path | None:
        """Where large copies of parameters and states are, as ``state_dict()`` returns them."""
        return Path(self.config.ssd.paths[0]) if self.config.ssd.paths else None

    def accelerator(self) -> Accelerator:
        """The device of a configuration that has one.

        Raises:
            DeviceError: there is no such device.
        """
        if self.config.device == "cpu-emulated":
            return RamDevice()
        _, _, index = self.config.device.partition(":")
        return CudaDevice(int(index) if index else None)

    def collectives(self) -> Collectives | None:
        """What connects the ranks that share the model; None: there is one rank.

        Raises:
            RankError: the environment names ranks, but not how to reach them. ConfigError: other ranks were asked for.
        """
        world = World.current()
        n_shards = shards_of(self.config.parallel, 1 if world is None else world.n_ranks)
        if world is None:
            return None
        check_shareable(self.config)
        return world.collectives(n_shards)

    def channel(self, unit: Unit) -> UnitChannel:
        """What hands a unit's gradients to the update thread, in lock-free mode."""
        return UnitChannel(unit)

    def arena(self, n_frames: int, page_bytes: int) -> Arena:
        """Host memory of so many pages.

        Raises:
            MemoryError: it cannot be mapped.
        """
        return HostArena(n_frames, page_bytes)

    def page_files(self, directories: Sequence[RunDirectory], page_bytes: int) -> PageFiles:
        """The SSD tier."""
        ssd = self.config.ssd
        # Where computing takes every core, more threads to wake cost more than they hide: 0.02 of a step at 27M.
        has_idle_cores = torch.get_num_threads() < len(os.sched_getaffinity(0))
        return PageFiles(
            directories,
            page_bytes=page_bytes,
            checksums=ssd.checksums,
            direct=None if ssd.direct == "auto" else ssd.direct,
            threads_per_path=ssd.threads,
            finishing_threads=None if has_idle_cores else 0,
            max_request_bytes=ssd.max_request,
            limit_mb_per_s=ssd.limit_mb_per_s,
        )

    def source_files(self, page_files: PageFiles) -> SourceFiles:
        """Files of others, for parameters that are read where they lie."""
        # Each of these threads copies what it has read: as many as read page files read while as many copy.
        n_threads = 2 * self.config.ssd.threads
        chunk_bytes = min(CHUNK_BYTES, page_files.page_bytes) // 2
        return SourceFiles(page_files.reads, page_files.throttle, n_threads=n_threads, chunk_bytes=chunk_bytes)

    def driver(self, mover: Mover, sink: EventSink) -> Driver:
        """The driver, which knows host memory; see `connect`."""
        return Driver(mover, sink, mover.bandwidth)

    def connect(self, driver: Driver, mover: DeviceMover) -> None:
        """Have a driver give ops the pages of a device, too."""
        driver.add_device(mover, mover.bandwidth, mover.accelerator)

    def add_worker(self, driver: Driver) -> None:
        """Have updates made beside compute where that is asked for: by every core where compute is a device, otherwise
        by those that do not compute, at least one.

        Raises:
            StorageError: the system starts no more threads.
        """
        if self.worker_wanted:
            n_threads = torch.get_num_threads()
            if self.config.device == "cpu":
                n_threads = max(1, len(os.sched_getaffinity(0)) - n_threads)
            driver.updates.add_worker(n_threads)

    @property
    def worker_wanted(self) -> bool:
        """Whether updates are to be made beside compute."""
        wanted = self.config.update.worker
        return self.config.device != "cpu" if wanted == "auto" else bool(wanted)

    def scaling(self) -> Scaling:
        """Clipping and loss scaling: the latter dynamic for fp16 parameters unless the configuration says otherwise."""
        wanted = self.config.update.loss_scale
        fp16 = self.config.model is not None and self.config.model.dtype == "fp16"
        loss_scale = None
        if wanted != "auto":
            loss_scale = LossScale(float(wanted), dynamic=False)
        elif fp16:
            loss_scale = LossScale()
        return Scaling(self.config.update.clip_norm, loss_scale)
