"""Snapshots that fail or are abandoned, and tensors that go on from a commit."""

from __future__ import annotations

import errno

import pytest
from fake_page_files import TIMEOUT_S
from gated_mover import Gates
from snapshot_steps import R, begin, change, changing, content, several, store_next

from pagemem.errors import DiskFullError, StorageError, TransitionError
from pagemem.frames.page import FrameId
from pagemem.residency.snapshot import SnapshotState

# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_store_that_fails_gives_it_up_and_training_and_the_next_one_go_on(gates: Gates) -> None:
    stored = gates.stored(7, name="stored")
    tensors = several(gates, 4)
    used = gates.mover.ssd.used_frames
    snapshot = begin(gates, stored, *tensors)
    good, bad = gates.files.take("write"), gates.files.take("write")
    good.open()
    third = gates.files.take("write")
    bad.fail(StorageError("the disk went away"))
    assert snapshot.state is SnapshotState.RELEASED and "went away" in str(snapshot.error)
    assert not any(tensor.snapshot_pending for tensor in tensors)
    with pytest.raises(StorageError, match="went away"):
        gates.mover.monitor.check()
    third.open()
    change(gates, tensors[1], 99)
    assert gates.files.idle(), "nothing is stored for it any more"
    assert gates.mover.ssd.used_frames == used + 3, "each tensor that was stored has one copy"
    again = begin(gates, stored, *tensors)
    for _ in range(2):
        store_next(gates)
    assert again.state is SnapshotState.COMPLETE
    assert content(gates, again) == {"stored": 7, "t0": 10, "t1": 99, "t2": 12, "t3": 13}


def test_whoever_waits_goes_on_after_the_failure_and_the_next_op_hears_of_it(gates: Gates) -> None:
    tensor = gates.dirty(5)
    snapshot = begin(gates, tensor)
    changed = changing(gates, tensor, 6)
    gates.files.take("write").fail(StorageError("no space"))
    changed.result(timeout=TIMEOUT_S)
    assert snapshot.state is SnapshotState.RELEASED and gates.holds(tensor, 6)
    with pytest.raises(StorageError, match="no space"):
        gates.mover.monitor.check()


def test_a_load_that_fails_meanwhile_does_not_stop_it(gates: Gates) -> None:
    """Nobody may be left to hear of the load's failure: the commit must come to its end all the same."""
    elsewhere, tensors = gates.stored(7, name="elsewhere"), several(gates, 4)
    snapshot = begin(gates, *tensors)
    writes = [gates.files.take("write") for _ in range(2)]
    gates.mover.start_load(elsewhere, FrameId(5))
    gates.files.take("read").fail(StorageError("gone"))
    for write in writes:
        write.open()
    for _ in range(2):
        store_next(gates)
    assert snapshot.state is SnapshotState.COMPLETE
    with pytest.raises(StorageError, match="gone"):
        gates.mover.monitor.check()


def test_without_room_on_the_disk_it_is_refused_before_anything_is_written(
    gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = several(gates, 3)
    n_frames = gates.files.n_frames

    def full(n_frames: int) -> None:
        raise DiskFullError(f"{errno.ENOSPC}: no room for {n_frames} frames")

    with monkeypatch.context() as patch:
        patch.setattr(gates.files, "grow", full)
        with pytest.raises(DiskFullError):
            begin(gates, *tensors)
    assert (
        gates.files.idle()
        and gates.files.n_frames == n_frames
        and not any(t.snapshot_pending or t.copy for t in tensors)
    )
    snapshot = begin(gates, *tensors)
    for _ in tensors:
        store_next(gates)
    assert snapshot.state is SnapshotState.COMPLETE


def test_it_can_be_abandoned_while_it_is_made_and_afterwards(gates: Gates) -> None:
    tensors = several(gates, 3)
    snapshot = begin(gates, *tensors)
    writes = [gates.files.take("write") for _ in range(2)]
    with gates.mover.changed:
        gates.mover.snapshots.abandon(snapshot)
        gates.mover.snapshots.abandon(snapshot)
    for write in writes:
        write.open()
    assert gates.files.idle() and not any(tensor.snapshot_pending for tensor in tensors)
    again = begin(gates, *tensors)
    store_next(gates)
    assert again.state is SnapshotState.COMPLETE
    with gates.mover.changed:
        gates.mover.snapshots.abandon(again)
    assert again.state is SnapshotState.RELEASED and gates.mover.ssd.used_frames == 3
    with pytest.raises(TransitionError):
        again.release()


# ---- going on from one ----------------------------------------------------------------------------------------------


def test_a_tensor_goes_on_from_a_commits_copy_and_leaves_it_as_it_is(gates: Gates) -> None:
    tensor = gates.dirty(5)
    snapshot = begin(gates, tensor)
    store_next(gates)
    [stored] = snapshot.copies.values()
    change(gates, tensor, 6)
    gates.mover.start_store(tensor)
    store_next(gates)
    gates.mover.resume(tensor, stored)
    assert tensor.state is R.STORED and gates.mover.ssd.used_frames == 1
    gates.mover.start_load(tensor, FrameId(1))
    gates.files.take("read").open()
    assert gates.holds(tensor, 5)
    change(gates, tensor, 8)
    gates.mover.start_store(tensor)
    store_next(gates)
    assert content(gates, snapshot) == {"t": 5} and gates.mover.ssd.used_frames == 2


def test_a_tensor_that_a_commit_has_not_reads_as_zeros(gates: Gates) -> None:
    tensor = gates.dirty(5)
    gates.mover.start_store(tensor)
    store_next(gates)
    gates.mover.resume(tensor, None)
    assert tensor.state is R.ABSENT and gates.mover.ssd.used_frames == 0
    gates.mover.start_load(tensor, FrameId(1))
    assert gates.holds(tensor, 0)


def test_what_is_held_does_not_go_on_from_a_commit(gates: Gates) -> None:
    tensor = gates.dirty(5)
    tensor.pins += 1
    with pytest.raises(AssertionError, match="held"):
        gates.mover.resume(tensor, None)
    tensor.pins -= 1
    assert tensor.state is R.DIRTY and gates.holds(tensor, 5)
