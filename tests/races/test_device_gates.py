"""Copies up to the device while host pages come when the test lets them: what waits for what, and what is taken
back."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from broken_device import broken, fails
from cross_references import check_mover
from event_log import EventLog
from gated_device import GatedDevice, Tiers, opened_tiers
from gated_mover import PAGE_BYTES, opened

from pagemem.devices.arena import HostArena
from pagemem.errors import StorageError, TransitionError
from pagemem.frames.page import FrameId
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.residency.upload_queue import _close_at_exit
from scheduler.planning.task import load_task
from scheduler.tiers.load_lane import LoadLane

R = Residency


@pytest.fixture
def tiers() -> Iterator[Tiers]:
    """Tiers for one test."""
    with opened_tiers() as made:
        yield made


def test_a_copy_waits_for_its_host_pages(tiers: Tiers) -> None:
    tensor = tiers.stored(7, "t")
    tiers.device.start_load(tensor, FrameId(1))
    assert tensor.state is R.LOADING
    tiers.comes(tensor, 0)
    tiers.arrives(tensor)
    assert tiers.holds(tensor, 7)
    tiers.below.mover.monitor.settle()
    assert tiers.device.lower(tensor.id).uploads == 0 and tiers.device.lower(tensor.id).id != tensor.id


def test_copies_overtake_those_that_wait(tiers: Tiers) -> None:
    first, second = tiers.stored(1, "first"), tiers.stored(2, "second")
    tiers.device.start_load(first, FrameId(0))
    tiers.device.start_load(second, FrameId(1))
    tiers.comes(second, 0)
    tiers.arrives(second)
    assert first.state is R.LOADING and tiers.holds(second, 2)
    tiers.comes(first, 1)
    tiers.arrives(first)
    assert tiers.holds(first, 1)


def test_a_copy_that_has_not_begun_is_taken_back(tiers: Tiers) -> None:
    tensor = tiers.stored(7, "t")
    tiers.device.start_load(tensor, FrameId(0))
    assert tiers.device.take_back_load(tensor)
    assert tensor.state is R.STORED and tensor.frame is None
    assert not tiers.device.take_back_load(tensor), "there is none any more"
    tiers.device.monitor.settle()
    tiers.comes(tensor, 0)
    assert tensor.state is R.STORED, "nobody wants it now"


def test_a_window_is_freed_of_a_copy_that_waits(tiers: Tiers) -> None:
    """Otherwise what is used first would wait for what the host brings only afterwards."""
    late, soon = tiers.stored(1, "late"), tiers.stored(2, "soon")
    lane = LoadLane(tiers.device)
    tiers.device.start_load(late, FrameId(0))
    lane.submit([load_task(soon.id, soon.n_bytes, FrameId(0), 0, 1)])
    assert late.state is R.STORED and soon.state is R.LOADING
    tiers.comes(soon, 0)
    tiers.arrives(soon)
    assert tiers.holds(soon, 2)


def test_an_update_drops_the_copy_or_says_that_it_is_in_use(tiers: Tiers) -> None:
    tensor = tiers.device.mirror(tiers.below.dirty(1))
    tiers.device.start_load(tensor, FrameId(0))
    tiers.arrives(tensor)
    tensor.pins += 1
    assert not tiers.device.renew(tensor) and tensor.state is R.CLEAN
    tensor.pins -= 1
    assert tiers.device.renew(tensor) and tensor.state is R.STORED
    tiers.below.mover.monitor.settle()
    tiers.below.mover.discard(tiers.device.lower(tensor.id))


def test_host_pages_that_are_being_copied_neither_leave_nor_change(tiers: Tiers) -> None:
    lower = tiers.below.dirty(1)
    source = tiers.below.mover.begin_upload(lower)
    assert not tiers.below.mover.tenants.droppable(lower.id)
    with pytest.raises(AssertionError, match="cannot discard"):
        tiers.below.mover.discard(lower)
    assert bool((source == 1).all())
    del source
    tiers.below.mover.end_upload(lower)
    assert tiers.below.mover.tenants.droppable(lower.id)
    tiers.below.mover.discard(lower)


def test_an_edit_stays_on_the_device_until_it_is_written_back(tiers: Tiers) -> None:
    tensor = tiers.device.mirror(tiers.below.dirty(1))
    tiers.device.start_load(tensor, FrameId(0))
    tiers.arrives(tensor)
    tiers.device.touch(tensor)
    tiers.device.start_store(tensor)
    assert tensor.state is R.DIRTY and tensor.id in tiers.device.edited
    tiers.device.written_back(tensor)
    assert tensor.state is R.CLEAN and not tiers.device.edited
    tiers.below.mover.monitor.settle()
    tiers.below.mover.discard(tiers.device.lower(tensor.id))


def test_host_pages_that_cannot_be_read_leave_the_device_as_it_was(tiers: Tiers) -> None:
    tensor = tiers.stored(7, "t")
    tiers.device.start_load(tensor, FrameId(0))
    tiers.below.mover.start_load(tiers.device.lower(tensor.id), FrameId(0))
    tiers.below.files.take("read").fail(StorageError("EIO"))
    assert tensor.state is R.LOADING
    with pytest.raises(StorageError, match="EIO"):
        tiers.below.mover.monitor.check()
    assert tiers.device.take_back_load(tensor) and tensor.state is R.STORED


def test_a_copy_that_fails_is_told_and_leaves_the_tensor_below(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no copy")

    tensor = tiers.device.mirror(tiers.below.dirty(1))
    with monkeypatch.context() as broken:
        broken.setattr("pagemem.devices.accelerator.np.copyto", fails)
        tiers.device.start_load(tensor, FrameId(0))
        with pytest.raises(MemoryError, match="no copy"):
            tiers.arrives(tensor)
    assert tensor.state is R.STORED and tiers.device.lower(tensor.id).uploads == 0
    tiers.device.start_load(tensor, FrameId(0))
    tiers.arrives(tensor)
    assert tiers.holds(tensor, 1), "the thread goes on"
    tiers.below.mover.monitor.settle()
    tiers.below.mover.discard(tiers.device.lower(tensor.id))


# ---- bytes of the device on their way down --------------------------------------------------------------------------


def test_host_pages_that_the_device_fills_are_neither_read_nor_moved_before(tiers: Tiers) -> None:
    lower = tiers.saved(5)
    assert lower.state is R.ARRIVING and not lower.readable and not tiers.below.mover.tenants.droppable(lower.id)
    check_mover(tiers.below.mover)
    with pytest.raises(TransitionError, match="arriving -> absent"):
        tiers.below.mover.discard(lower)
    with pytest.raises(TransitionError, match="arriving -> storing"):
        tiers.below.mover.start_store(lower)
    tiers.is_there(lower)
    assert lower.state is R.DIRTY and tiers.below.holds(lower, 5)
    tiers.below.mover.discard(lower)


def test_what_was_to_be_stored_by_now_is_stored_when_it_is_there(tiers: Tiers) -> None:
    lower = tiers.saved(5)
    lower.to_store = True
    tiers.is_there(lower)
    assert lower.state is R.STORING and not lower.to_store
    tiers.below.files.take("write").open()
    assert lower.state is R.CLEAN
    tiers.below.mover.discard(lower)


def test_a_load_waits_for_what_arrives_in_its_place_and_then_for_its_way_out(tiers: Tiers) -> None:
    waiting = tiers.below.stored(1, "waiting")
    lower, lane = tiers.saved(5), LoadLane(tiers.below.mover)
    lane.submit([load_task(waiting.id, waiting.n_bytes, FrameId(0), 0, 1)])
    assert not lane.stuck and lower.state is R.ARRIVING and waiting.state is R.STORED
    tiers.is_there(lower)
    assert lower.state is R.STORING
    tiers.below.files.take("write").open()
    tiers.below.files.take("read").open()
    assert waiting.state is R.CLEAN and lower.state is R.STORED


@pytest.mark.parametrize("while_it_arrives", [True, False])
def test_what_nobody_wants_any_more_goes_when_it_is_there(while_it_arrives: bool, tiers: Tiers) -> None:
    lower = tiers.saved(5)
    lower.to_store = True
    if while_it_arrives:
        tiers.below.mover.discard_soon(lower)
        assert lower.state is R.ARRIVING
        tiers.is_there(lower)
    else:
        tiers.is_there(lower)
        tiers.below.mover.discard_soon(lower)
        assert lower.state is R.STORING
        tiers.below.files.take("write").open()
    assert lower.state is R.ABSENT and lower.frame is None


def test_what_is_copied_up_is_discarded_when_the_copy_is_made(tiers: Tiers) -> None:
    lower = tiers.below.dirty(3)
    into = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
    tiers.below.mover.begin_upload(lower)
    tiers.device.restore(lower, into).wait()
    assert bool((into == 3).all())
    tiers.below.mover.discard_soon(lower)
    assert lower.state is R.DIRTY, "the first copy is still being made"
    tiers.below.mover.end_upload(lower)
    assert lower.state is R.ABSENT


def test_a_load_into_the_frames_that_a_tensor_is_about_to_lose_waits_for_that(tiers: Tiers) -> None:
    """What is created anew there by plan must not be taken for what is still being copied from there."""
    lower, lane = tiers.below.dirty(3), LoadLane(tiers.below.mover)
    tiers.below.mover.begin_upload(lower)
    tiers.below.mover.discard_soon(lower)
    lane.submit([load_task(lower.id, lower.n_bytes, FrameId(0), 0, 1, fresh=True)])
    assert lane.first is not None and not lane.stuck
    tiers.below.mover.end_upload(lower)
    assert lane.first is None and lower.state is R.CLEAN and lower.frame == 0
    tiers.below.mover.drop(lower)


def test_what_is_waited_for_to_go_is_not_taken_for_what_is_to_come(tiers: Tiers) -> None:
    lower, lane = tiers.below.dirty(3), LoadLane(tiers.below.mover)
    tiers.below.mover.begin_upload(lower)
    tiers.below.mover.discard_soon(lower)
    lane.submit([load_task(lower.id, lower.n_bytes, FrameId(0), 0, 1, fresh=True)])
    gone = tiers.below.training.submit(tiers.below.mover.end_expiry, lower)
    assert not gone.done()
    tiers.below.mover.end_upload(lower)
    gone.result(30)
    assert lane.first is None and lower.state is R.CLEAN and lower.frame == 0
    tiers.below.mover.drop(lower)


def test_a_device_that_fails_to_fill_is_heard_of_and_nobody_waits_for_ever(tiers: Tiers) -> None:
    lower = tiers.saved(5)
    tiers.down.error = RuntimeError("the device is lost")
    tiers.down.open()
    with pytest.raises(RuntimeError, match="the device is lost"):
        tiers.below.mover.monitor.wait_until(
            lambda: lower.state is not R.ARRIVING and tiers.below.mover.monitor.failed, lower.name
        )
        tiers.below.mover.monitor.check()
    assert lower.state is R.DIRTY
    tiers.below.mover.discard(lower)


# ---- a device that has failed ---------------------------------------------------------------------------------------


def test_a_copy_up_of_a_device_that_failed_ends(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = tiers.device.mirror(tiers.below.dirty(1))
    monkeypatch.setattr(tiers.device.accelerator, "copy_up", broken)
    tiers.device.start_load(tensor, FrameId(0))
    tiers.arrives(tensor)  # it was given: who puts compute behind it hears of the error
    tiers.below.mover.monitor.settle()
    assert tiers.device.lower(tensor.id).uploads == 0
    with pytest.raises(RuntimeError, match="device-side assert"):
        tiers.below.mover.monitor.check()
    with pytest.raises(RuntimeError, match="device-side assert"):
        tiers.device.wait_for(tensor)
    tiers.below.mover.discard(tiers.device.lower(tensor.id))


def test_a_copy_down_of_a_device_that_failed_ends(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = tiers.below.dirty(0, 0, "saved")
    monkeypatch.setattr(tiers.device.accelerator, "copy_out", broken)
    tiers.device.save(torch.ones(PAGE_BYTES, dtype=torch.uint8), lower)
    tiers.below.mover.monitor.settle()
    assert lower.state is R.DIRTY
    with pytest.raises(RuntimeError, match="device-side assert"):
        tiers.below.mover.monitor.check()
    tiers.below.mover.discard(lower)


def test_a_copy_back_of_a_device_that_failed_ends(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = tiers.below.dirty(3)
    monkeypatch.setattr(tiers.device.accelerator, "copy_up", broken)
    tiers.device.restore(lower, torch.zeros(PAGE_BYTES, dtype=torch.uint8))
    tiers.below.mover.monitor.settle()
    assert lower.uploads == 0
    with pytest.raises(RuntimeError, match="device-side assert"):
        tiers.below.mover.monitor.check()
    tiers.below.mover.discard(lower)


def test_a_copy_up_that_a_failed_device_takes_no_mark_for_is_none(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = tiers.device.mirror(tiers.below.dirty(1))
    monkeypatch.setattr(tiers.device.accelerator, "record_event", fails)
    tiers.device.start_load(tensor, FrameId(0))
    assert tensor.state is R.STORED and tensor.frame is None
    tiers.device.monitor.settle()
    with pytest.raises(RuntimeError, match="device-side assert"):
        tiers.device.monitor.check()
    tiers.below.mover.discard(tiers.device.lower(tensor.id))


def test_a_copy_whose_end_cannot_be_noted_at_once_is_told_of_all_the_same(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise whoever waits for it waits for ever."""
    tensor = tiers.device.mirror(tiers.below.dirty(1))
    end_upload = tiers.below.mover.end_upload

    def ends(lower: PagedTensor) -> None:
        end_upload(lower)
        raise StorageError("ENOSPC")

    monkeypatch.setattr(tiers.below.mover, "end_upload", ends)
    tiers.device.start_load(tensor, FrameId(0))
    with pytest.raises(StorageError, match="ENOSPC"):
        tiers.device.monitor.wait_until(lambda: tiers.device.monitor.failed and tensor.state is R.CLEAN, tensor.name)
        tiers.device.monitor.check()
    assert tensor.state is R.CLEAN and tiers.holds(tensor, 1)
    tiers.below.mover.discard(tiers.device.lower(tensor.id))


def test_threads_join_the_device_before_anything_else() -> None:
    joined: list[str] = []

    class Joined(GatedDevice):
        def use_in_thread(self) -> None:
            joined.append(threading.current_thread().name)

    with opened() as below:
        mover = DeviceMover(HostArena(1, PAGE_BYTES), below.mover, Joined(), EventLog())
        mover.close()
        mover.arena.close()
    assert sorted(joined) == ["pagemem-d2h-ends", "pagemem-h2d", "pagemem-h2d-ends"]


def test_the_end_of_the_program_ends_the_threads_of_a_mover_that_nobody_closed(tiers: Tiers) -> None:
    copier = tiers.device._copier
    close = copier._at_exit
    assert close.func is _close_at_exit
    _close_at_exit(weakref.ref(copier), os.getpid() + 1)
    assert copier._begins.is_alive() and copier._up_ends._thread.is_alive(), "a child process has no such threads"
    tensor = tiers.stored(7, "its pages never come")
    tiers.device.start_load(tensor, FrameId(0))
    close()
    assert not copier._begins.is_alive() and not copier._up_ends._thread.is_alive()
