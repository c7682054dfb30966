"""Snapshots made while training goes on: who waits for which store and for no other, and what a failed store costs.

Stores end when the test says so. "Training" changes tensors as ops do: made writable, touched, written.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from fake_page_files import TIMEOUT_S
from gated_mover import Gates, opened

from pagemem.errors import DiskFullError, StorageError, TransitionError
from pagemem.frames.page import FrameId
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.residency.snapshot import STORES_AT_A_TIME, Snapshot, SnapshotState

R = Residency


@pytest.fixture
def gates() -> Iterator[Gates]:
    """A mover with room for six tensors."""
    with opened(6) as made:
        yield made


def begin(gates: Gates, *tensors: PagedTensor) -> Snapshot:
    with gates.mover.changed:
        return gates.mover.snapshots.begin(tensors)


def change(gates: Gates, tensor: PagedTensor, value: int) -> None:
    """What an op of the training thread does."""
    with gates.mover.changed:
        gates.mover.make_writable(tensor)
        gates.fill(tensor, value)


def changing(gates: Gates, tensor: PagedTensor, value: int) -> Future[None]:
    return gates.training.submit(change, gates, tensor, value)


def content(gates: Gates, snapshot: Snapshot) -> dict[str, int]:
    """What the page files hold now for each tensor of a snapshot, of which each must be of one value."""
    found = {}
    for tensor, stored in snapshot.copies.items():
        held = b"".join(
            gates.files.content[extent.frame, extent.offset_bytes] for extent in stored.placement.extents(65536)
        )
        assert held == held[:1] * len(held), "a copy is torn"
        found[gates.mover.tensors[tensor].name] = held[0]
    return found


def store_next(gates: Gates) -> None:
    gates.files.take("write").open()


def several(gates: Gates, count: int) -> list[PagedTensor]:
    return [gates.dirty(10 + i, frame=i, name=f"t{i}") for i in range(count)]


# ---- what is in it --------------------------------------------------------------------------------------------------


def test_what_is_stored_already_costs_nothing(gates: Gates) -> None:
    stored, absent = gates.stored(7), gates.mover.create("absent", gates.dirty(1, frame=5).tag, 4096)
    snapshot = begin(gates, stored, absent)
    assert snapshot.state is SnapshotState.COMPLETE and gates.files.idle()
    assert content(gates, snapshot) == {"t": 7}


def test_a_clean_tensor_that_was_never_stored_reads_as_zeros_and_is_left_out(gates: Gates) -> None:
    zeros = gates.mover.create("zeros", gates.stored(7).tag, 4096)
    gates.mover.start_load(zeros, FrameId(0))
    snapshot = begin(gates, zeros)
    assert snapshot.state is SnapshotState.COMPLETE and not snapshot.copies


def test_dirty_tensors_are_stored_a_few_at_a_time_those_used_longest_ago_first(gates: Gates) -> None:
    tensors = several(gates, 5)
    for order, tensor in enumerate(reversed(tensors)):
        tensor.last_use = order
    snapshot = begin(gates, *tensors)
    held = [gates.files.take("write") for _ in range(STORES_AT_A_TIME)]
    assert gates.files.idle(), "no more than a few at a time"
    assert [t.name for t in tensors if t.state is R.STORING] == ["t3", "t4"]
    for _ in tensors:
        assert snapshot.state is SnapshotState.OPEN
        held.pop(0).open()
        if not gates.files.idle():
            held.append(gates.files.take("write"))
    assert snapshot.state is SnapshotState.COMPLETE
    assert content(gates, snapshot) == {f"t{i}": 10 + i for i in range(5)}
    assert not any(tensor.snapshot_pending for tensor in tensors)


def test_a_store_under_way_already_counts(gates: Gates) -> None:
    tensor = gates.dirty(5)
    gates.mover.start_store(tensor)
    snapshot = begin(gates, tensor)
    store_next(gates)
    assert snapshot.state is SnapshotState.COMPLETE and content(gates, snapshot) == {"t": 5} and gates.files.idle()


def test_a_store_under_way_of_content_changed_since_does_not_count(gates: Gates) -> None:
    tensor = gates.dirty(5)
    gates.mover.start_store(tensor)
    gates.fill(tensor, 6)
    snapshot = begin(gates, tensor)
    store_next(gates)
    assert snapshot.state is SnapshotState.OPEN
    store_next(gates)
    assert snapshot.state is SnapshotState.COMPLETE and content(gates, snapshot) == {"t": 6}


def test_what_it_has_stays_what_it_was_however_often_the_tensor_is_stored_again(gates: Gates) -> None:
    tensor = gates.dirty(1)
    gates.mover.start_store(tensor)
    store_next(gates)
    snapshots = []
    for value in range(2, 5):
        snapshots.append(begin(gates, tensor))
        for again in (value + 50, value):
            change(gates, tensor, again)
            gates.mover.start_store(tensor)
            store_next(gates)
        gates.mover.drop(tensor)
        gates.mover.start_load(tensor, FrameId(value))
        gates.files.take("read").open()
        assert gates.holds(tensor, value)
    assert [content(gates, snapshot) for snapshot in snapshots] == [{"t": value} for value in range(1, 4)]
    assert gates.mover.ssd.used_frames == 4, "one copy for each of them, and the current one"
    for snapshot in snapshots:
        snapshot.release()
    assert gates.mover.ssd.used_frames == 1


# ---- who waits ------------------------------------------------------------------------------------------------------


def test_a_change_of_an_owed_tensor_waits_exactly_until_it_is_stored(gates: Gates) -> None:
    tensors = several(gates, 2)
    snapshot = begin(gates, *tensors)
    changed = changing(gates, tensors[1], 99)
    first, second = gates.files.take("write"), gates.files.take("write")
    first.open()
    assert not changed.done() and gates.holds(tensors[1], 11), "the other tensor's store is not enough"
    second.open()
    changed.result(timeout=TIMEOUT_S)
    assert snapshot.state is SnapshotState.COMPLETE
    assert content(gates, snapshot) == {"t0": 10, "t1": 11} and gates.holds(tensors[1], 99)


def test_a_change_of_what_waits_in_the_queue_has_it_stored_at_once(gates: Gates) -> None:
    tensors = several(gates, 4)
    snapshot = begin(gates, *tensors)
    others = [gates.files.take("write") for _ in range(STORES_AT_A_TIME)]
    changed = changing(gates, tensors[3], 99)
    gates.files.take("write").open()
    changed.result(timeout=TIMEOUT_S)
    assert not any(other.ended for other in others) and snapshot.state is SnapshotState.OPEN
    for other in others:
        other.open()
    store_next(gates)
    assert snapshot.state is SnapshotState.COMPLETE
    assert content(gates, snapshot) == {f"t{i}": 10 + i for i in range(4)}


def test_nothing_else_waits(gates: Gates) -> None:
    snapshot_done, tensors = gates.stored(7, name="paid"), several(gates, 2)
    fresh = gates.dirty(8, frame=5, name="fresh")
    snapshot = begin(gates, *tensors, snapshot_done)
    held = [gates.files.take("write") for _ in tensors]
    gates.mover.start_load(snapshot_done, FrameId(4))
    gates.files.take("read").open()
    change(gates, snapshot_done, 70)
    change(gates, fresh, 80)
    assert gates.holds(tensors[0], 10), "reading is free, too"
    for write in held:
        write.open()
    assert content(gates, snapshot) == {"t0": 10, "t1": 11, "paid": 7}


def test_a_change_that_does_not_wait_is_refused(gates: Gates) -> None:
    tensor = gates.dirty(5)
    snapshot = begin(gates, tensor)
    for _ in range(2):
        with pytest.raises(AssertionError, match="t is changed while a snapshot waits for its content"):
            gates.mover.touch(tensor)
    store_next(gates)
    gates.mover.touch(tensor)
    assert snapshot.state is SnapshotState.COMPLETE


def test_one_snapshot_at_a_time_and_not_inside_an_op(gates: Gates) -> None:
    tensor = gates.dirty(5)
    tensor.pins += 1
    with pytest.raises(AssertionError, match="inside an op"):
        begin(gates, tensor)
    tensor.pins -= 1
    begin(gates, tensor)
    with pytest.raises(AssertionError, match="being made already"):
        begin(gates, tensor)
    store_next(gates)
    assert begin(gates, tensor).state is SnapshotState.COMPLETE


def test_a_view_that_was_written_to_before_is_stored_though_the_tensor_looks_clean(gates: Gates) -> None:
    tensor = gates.dirty(5)
    gates.mover.start_store(tensor)
    store_next(gates)
    view = gates.lease(tensor)
    tensor.may_be_aliased = True
    view.fill_(6)
    snapshot = begin(gates, tensor)
    store_next(gates)
    assert snapshot.state is SnapshotState.COMPLETE and content(gates, snapshot) == {"t": 6}
    view.fill_(7)
    del view
    gates.mover.collect_leases()
    assert (tensor.state, tensor.may_be_aliased) == (R.DIRTY, False) and content(gates, snapshot) == {"t": 6}


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
        gates.mover.check()
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
        gates.mover.check()


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
        gates.mover.check()


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
