"""Lanes of host memory and of a device above it: what a copy up reads stays until that has begun, and no longer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from gated_device import Tiers, opened_tiers

from pagemem.frames.page import FrameId
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.tier import Tier
from scheduler.planning.task import Lane, Task, TaskKind, load_task
from scheduler.tiers.load_lane import LoadLane

R = Residency


class Lanes:
    """The lanes of both tiers, a tensor that waits to be copied up out of host frame 0, and one that wants its frame.

    The window on the device is somebody's until `end_view`.
    """

    def __init__(self, tiers: Tiers) -> None:
        self.tiers = tiers
        numbers = itertools.count()
        self.host, self.device = LoadLane(tiers.below.mover, numbers), LoadLane(tiers.device, numbers)
        self.host.above = self.device
        self.copy, self.next = tiers.stored(1, "copied up"), tiers.below.stored(2, "next")
        self.tenant = tiers.stored(3, "in the way")
        tiers.device.start_load(self.tenant, FrameId(0))
        tiers.comes(self.tenant, 1)
        tiers.arrives(self.tenant)
        tiers.comes(self.copy, 0)
        self.tenant.pins += 1

    @property
    def lower(self) -> PagedTensor:
        """What is copied up."""
        return self.tiers.device.lower(self.copy.id)

    def upload(self) -> None:
        """Ask for the copy up."""
        self.device.submit(
            [Task(TaskKind.UPLOAD, self.copy.id, Tier.DEVICE, Lane.H2D, self.copy.n_bytes, 0, frame=FrameId(0))]
        )

    def load(self) -> None:
        """Ask for the load into the frame that it is copied out of."""
        self.host.submit([load_task(self.next.id, self.next.n_bytes, FrameId(0), 0, 1)])

    def end_view(self) -> None:
        """The window on the device may be had."""
        with self.tiers.device.changed:
            self.tenant.pins -= 1
            self.device.pump()


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    with opened_tiers() as tiers:
        yield Lanes(tiers)


def test_a_load_waits_for_an_earlier_copy_out_of_its_frame(lanes: Lanes) -> None:
    lanes.upload()
    lanes.load()
    assert lanes.lower.state is R.CLEAN and lanes.next.state is R.STORED
    assert lanes.device.stuck and lanes.host.stuck, "both wait for what somebody holds"
    lanes.end_view()
    lanes.tiers.arrives(lanes.copy)
    lanes.tiers.below.files.take("read").open()
    lanes.tiers.below.mover.monitor.settle()
    assert lanes.tiers.holds(lanes.copy, 1) and lanes.tiers.below.holds(lanes.next, 2)
    assert lanes.lower.state is R.STORED


def test_a_load_does_not_wait_for_a_later_copy(lanes: Lanes) -> None:
    lanes.load()
    lanes.upload()
    assert lanes.lower.state is R.STORED and not lanes.host.stuck, "that copy waits until it comes again"
    lanes.tiers.below.files.take("read").open()
    lanes.tiers.below.mover.monitor.settle()
    assert lanes.tiers.below.holds(lanes.next, 2)
    lanes.end_view()
    assert lanes.copy.state is R.LOADING and lanes.tiers.device.take_back_load(lanes.copy)


def test_a_copy_that_is_given_up_lets_the_load_go_on(lanes: Lanes) -> None:
    lanes.upload()
    lanes.load()
    lanes.device.clear()
    assert not lanes.device.stuck
    with lanes.tiers.below.mover.changed:
        lanes.host.pump()
    lanes.tiers.below.files.take("read").open()
    lanes.tiers.below.mover.monitor.settle()
    assert lanes.tiers.below.holds(lanes.next, 2) and lanes.copy.state is R.STORED
    lanes.end_view()


def test_a_copy_that_waits_for_its_turn_is_not_taken_for_one_that_was_made(lanes: Lanes) -> None:
    """Of a lane that is held up, cancelling others leaves it held up."""
    lanes.upload()
    lanes.load()
    lanes.device.cancel(lambda task: task.tensor != lanes.copy.id)
    lanes.host.cancel(lambda task: task.tensor != lanes.next.id)
    assert lanes.device.stuck and lanes.host.stuck
    lanes.device.free(lanes.copy)
    assert lanes.copy.id not in lanes.device and lanes.copy.state is R.STORED
    with lanes.tiers.below.mover.changed:
        lanes.host.pump()
    lanes.tiers.below.files.take("read").open()
    lanes.tiers.below.mover.monitor.settle()
    lanes.end_view()


def test_rooms_are_emptied_and_nothing_comes(lanes: Lanes) -> None:
    room = lanes.next.n_bytes
    drop = Task(TaskKind.DROP, lanes.next.id, Tier.HOST, Lane.SSD_READ, room, 0, frame=FrameId(0))
    lanes.host.submit([drop])
    assert lanes.lower.state is R.STORED and lanes.next.state is R.STORED and lanes.host.first is None
    lanes.end_view()
