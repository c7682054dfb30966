"""Snapshots made while training goes on: who waits for which store and for no other, and what a failed store costs.

Stores end when the test says so. "Training" changes tensors as ops do: made writable, touched, written.
"""

from __future__ import annotations

import pytest
from fake_page_files import TIMEOUT_S
from gated_mover import Gates
from snapshot_steps import R, begin, change, changing, content, several, store_next

from pagemem.frames.page import FrameId
from pagemem.knobs import STORES_AT_A_TIME
from pagemem.residency.snapshot import SnapshotState

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
