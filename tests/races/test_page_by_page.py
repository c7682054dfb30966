"""Copies up of tensors that are still being read: page by page, whole, of one version, and forgotten if the read
fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from fake_page_files import Held
from gated_device import GatedEvent, Tiers, opened_tiers
from gated_mover import PAGE_BYTES

from pagemem.errors import StorageError
from pagemem.frames.page import FrameId
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.telemetry.events import EventKind

R = Residency


class Coming:
    """A tensor on its way up while it is read."""

    def __init__(self, tiers: Tiers, tensor: PagedTensor, read: Held) -> None:
        self.tiers, self.tensor, self.read = tiers, tensor, read
        self.lower = tiers.device.lower(tensor.id)

    def has(self, page: int) -> bool:
        """Whether the device has a page of it."""
        return bool(
            (self.tiers.device.tenants.bytes_of(self.tensor)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] == 7).all()
        )

    def copied(self, page: int) -> None:
        """Wait until it has."""
        ends_s = time.monotonic() + 30
        while not self.has(page):
            assert time.monotonic() < ends_s, f"page {page} was not copied up"
            time.sleep(0.001)


@pytest.fixture
def tiers() -> Iterator[Tiers]:
    """Tiers for one test."""
    with opened_tiers() as made:
        yield made


@pytest.fixture
def coming(tiers: Tiers) -> Iterator[Coming]:
    """A tensor of two pages that is wanted on the device and is being read from the page files."""
    tensor = tiers.stored(7, "t", n_pages=2)
    tiers.device.start_load(tensor, FrameId(0))
    tiers.below.mover.start_load(tiers.device.lower(tensor.id), FrameId(0))
    yield Coming(tiers, tensor, tiers.below.files.take("read"))
    tiers.below.mover.monitor.settle()
    assert tiers.device.lower(tensor.id).uploads == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_pages_are_copied_up_while_the_others_are_read(coming: Coming, order: tuple[int, int]) -> None:
    first, last = order
    coming.read.arrive(first)
    coming.copied(first)
    assert not coming.has(last) and coming.tensor.state is R.LOADING and coming.lower.state is R.LOADING
    coming.read.arrive(last)
    coming.copied(last)
    assert coming.tensor.state is R.LOADING, "the read may still turn out to have failed"
    coming.read.open()
    coming.tiers.arrives(coming.tensor)
    assert coming.tiers.holds(coming.tensor, 7)


def test_pages_that_were_not_told_of_are_copied_when_all_are_there(coming: Coming) -> None:
    coming.read.arrive(1)
    coming.copied(1)
    coming.read.open()
    coming.tiers.arrives(coming.tensor)
    assert coming.tiers.holds(coming.tensor, 7)


def test_each_page_is_copied_once(coming: Coming) -> None:
    coming.read.arrive(0)
    coming.copied(0)
    coming.read.arrive(1)
    coming.read.open()
    coming.tiers.arrives(coming.tensor)
    coming.tiers.below.mover.monitor.settle()
    assert coming.tiers.device._copier.copied_bytes == 2 * PAGE_BYTES
    assert next(event.n_bytes for event in coming.tiers.log.events if event.kind is EventKind.UPLOAD) == PAGE_BYTES


def test_a_copy_that_has_begun_is_not_taken_back_and_its_host_pages_stay(coming: Coming) -> None:
    coming.read.arrive(0)
    coming.copied(0)
    assert not coming.tiers.device.take_back_load(coming.tensor)
    coming.read.arrive(1)
    coming.copied(1)
    assert coming.lower.uploads == 1, "an update now would be half of the next version"
    coming.read.open()
    coming.tiers.arrives(coming.tensor)


def test_a_read_that_fails_half_way_is_forgotten_and_the_next_one_is_copied_whole(coming: Coming) -> None:
    below = coming.tiers.below
    coming.read.arrive(0)
    coming.copied(0)
    coming.read.fail(StorageError("EIO"))
    with pytest.raises(StorageError, match="EIO"):
        below.mover.monitor.check()
    below.mover.monitor.settle()
    assert coming.lower.state is R.STORED and coming.lower.uploads == 0 and coming.tensor.state is R.LOADING
    coming.tiers.device.tenants.bytes_of(coming.tensor).zero_()
    coming.read.arrive(1)  # the old one, late: nobody listens
    below.mover.start_load(coming.lower, FrameId(1))
    again = below.files.take("read")
    again.arrive(1)
    coming.copied(1)
    assert not coming.has(0)
    again.open()
    coming.tiers.arrives(coming.tensor)
    assert coming.tiers.holds(coming.tensor, 7)


def test_after_a_read_that_fails_half_way_the_copy_can_be_taken_back(coming: Coming) -> None:
    coming.read.arrive(0)
    coming.copied(0)
    coming.read.fail(StorageError("EIO"))
    with pytest.raises(StorageError, match="EIO"):
        coming.tiers.below.mover.monitor.check()
    coming.tiers.below.mover.monitor.settle()
    assert coming.tiers.device.take_back_load(coming.tensor) and coming.tensor.state is R.STORED


def test_a_copy_that_fails_half_way_is_told(coming: Coming, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no copy")

    coming.read.arrive(0)
    coming.copied(0)
    with monkeypatch.context() as broken:
        broken.setattr("pagemem.devices.accelerator.np.copyto", fails)
        coming.read.arrive(1)
        with pytest.raises(MemoryError, match="no copy"):
            coming.tiers.arrives(coming.tensor)
    assert coming.tensor.state is R.STORED
    coming.read.open()


@pytest.mark.parametrize("lost", [False, True])
def test_frames_of_a_copy_that_fails_half_way_are_kept_until_what_was_given_before_is_made(
    lost: bool, coming: Coming, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute may have them next, and the device would write what it was given over that."""
    given = GatedEvent()
    copies = iter([given])

    def copy_up(*_: object) -> GatedEvent:
        for copy in copies:
            begun.set()
            return copy
        refused.set()
        raise RuntimeError("no second copy")

    begun, refused = threading.Event(), threading.Event()
    monkeypatch.setattr(coming.tiers.device.accelerator, "copy_up", copy_up)
    coming.read.arrive(0)
    assert begun.wait(30)
    coming.read.arrive(1)
    coming.read.open()
    assert refused.wait(30)
    assert coming.tensor.state is R.LOADING and coming.tensor.frame is not None
    given.error = RuntimeError("the device is lost") if lost else None
    given.open()
    with pytest.raises(RuntimeError, match="no second copy") as caught:
        coming.tiers.arrives(coming.tensor)
    assert getattr(caught.value, "__notes__", []) == lost * ["the copy before it failed, too: the device is lost"]
    assert coming.tensor.state is R.STORED and coming.tensor.frame is None
    coming.tiers.below.mover.monitor.settle()
    if lost:
        with pytest.raises(RuntimeError, match="the device is lost"):
            coming.tiers.below.mover.monitor.wait_until(lambda: False, "the error, which another thread notes")
