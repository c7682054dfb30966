"""A mover whose copies take as long as the test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import torch
from cross_references import check_mover
from event_log import EventLog
from fake_page_files import GatedPageFiles

from pagemem.devices.arena import HostArena
from pagemem.errors import StorageError
from pagemem.frames.page import FrameId
from pagemem.residency.host_mover import HostMover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag
from pagemem.units import KiB

PAGE_BYTES = 64 * KiB
N_FRAMES = 3


class Gates:
    """A mover whose copies wait for the test."""

    def __init__(self, n_frames: int) -> None:
        self.files = GatedPageFiles()
        self.log = EventLog()
        self.mover = HostMover(HostArena(n_frames, PAGE_BYTES), self.files, self.log)  # type: ignore[arg-type]
        self.training = ThreadPoolExecutor(1, "training")

    def view(self, tensor: PagedTensor) -> torch.Tensor:
        assert tensor.frame is not None
        return self.mover.arena.view(tensor.frame, 0, torch.uint8, tensor.n_bytes)

    def fill(self, tensor: PagedTensor, value: int) -> None:
        """What an op that modifies a tensor does."""
        tensor.pins += 1
        self.mover.touch(tensor)
        self.view(tensor).fill_(value)
        tensor.pins -= 1

    def holds(self, tensor: PagedTensor, value: int) -> bool:
        return bool((self.view(tensor) == value).all())

    def dirty(self, value: int, frame: int = 0, name: str = "t", n_pages: int = 1) -> PagedTensor:
        """A new tensor in host memory that no page file has."""
        tensor = self.mover.create(name, Tag.PARAM, n_pages * PAGE_BYTES)
        self.mover.start_load(tensor, FrameId(frame))
        self.fill(tensor, value)
        return tensor

    def stored(self, value: int, name: str = "t", n_pages: int = 1) -> PagedTensor:
        """A new tensor that only the page files have."""
        tensor = self.dirty(value, name=name, n_pages=n_pages)
        self.mover.start_store(tensor)
        self.files.take("write").open()
        self.mover.drop(tensor)
        return tensor

    def waits(self, until: Callable[[], bool], why: str) -> Future[None]:
        """The training thread waits for something."""
        return self.training.submit(self.mover.monitor.wait_until, until, why)

    def lease(self, tensor: PagedTensor) -> torch.Tensor:
        return self.mover.lease(tensor, 0, torch.uint8, tensor.n_bytes)


@contextmanager
def opened(n_frames: int = N_FRAMES) -> Iterator[Gates]:
    """A mover at rest again at the end, with its books in order; what was never let happen fails, so that nobody
    hangs."""
    made = Gates(n_frames)
    try:
        yield made
        assert made.files.idle(), "a copy was begun that the test did not expect"
    finally:
        made.files.fail_all(StorageError("the test is over"))
        made.training.shutdown()
        with suppress(StorageError):
            made.mover.close()
        check_mover(made.mover)
        made.mover.arena.close()
