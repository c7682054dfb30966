"""Moves during which a signal's handler raises, at every instant: each one that was begun ends once, and nobody waits
for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
from event_log import EventLog
from raising_signal import Raised, raising

from pagemem.devices.arena import HostArena
from pagemem.files.page_file import PageFiles
from pagemem.folders.run_directory import RunDirectory
from pagemem.frames.page import FrameId
from pagemem.residency.host_mover import HostMover
from pagemem.residency.paged_tensor import IN_FLIGHT
from pagemem.tier import Tag
from pagemem.units import KiB

PAGE_BYTES = 64 * KiB


def moved(folder: Path, at: int, finishing_threads: int) -> bool:
    """Store and load a tensor of three requests, with an exception at one instant; returns whether there was one."""
    with RunDirectory(folder) as directory:
        files = PageFiles(
            [directory], page_bytes=PAGE_BYTES, threads_per_path=2, finishing_threads=finishing_threads,
            max_request_bytes=PAGE_BYTES, slab_bytes=4 * PAGE_BYTES,
        )  # fmt: skip
        arena = HostArena(3, PAGE_BYTES)
        # An exception between the opening of a file and the next instruction leaves it open: Python offers no remedy.
        files.grow(6)
        mover = HostMover(arena, files, EventLog())
        tensor = mover.create("t", Tag.PARAM, 3 * PAGE_BYTES)
        mover.start_load(tensor, FrameId(0))
        mover.touch(tensor)
        mover.tenants.bytes_of(tensor).fill_(7)
        with raising(at) as instants:
            try:
                mover.start_store(tensor)
                mover.monitor.wait_until(lambda: not tensor.moving, "store")
                mover.drop(tensor)
                mover.start_load(tensor, FrameId(0))
                mover.monitor.wait_until(lambda: not tensor.moving, "load")
            except Raised:
                pass
        mover.monitor.settle()
        assert mover.monitor.in_flight == 0 and tensor.state not in IN_FLIGHT
        if tensor.readable:
            assert (mover.tenants.bytes_of(tensor) == 7).all()
        mover.close()
        files.close()  # raises what a completion raised: one that was called twice, say
        assert files.failure is None
        arena.close()
    return instants.raised


@pytest.mark.parametrize("finishing_threads", [0, 1], ids=["one job a request", "checksums beside"])
@pytest.mark.timeout(120)
def test_at_every_instant(tmp_path: Path, finishing_threads: int) -> None:
    at = 1
    while moved(tmp_path / "pages", at, finishing_threads):
        at += 1
    assert at > 100
