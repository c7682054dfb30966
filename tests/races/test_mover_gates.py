"""Copies that take as long as the test wants: what others may do meanwhile, and what a failed copy leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress

import pytest
from cross_references import check_mover
from fake_page_files import TIMEOUT_S
from gated_mover import PAGE_BYTES, Gates, opened

from pagemem.errors import StorageError, TransitionError
from pagemem.frames.page import FrameId
from pagemem.residency.paged_tensor import Residency
from pagemem.telemetry.events import EventKind
from pagemem.tier import Tag

R = Residency


@pytest.fixture
def gates() -> Iterator[Gates]:
    """A mover for one test."""
    with opened() as made:
        yield made


# ---- a load under way -----------------------------------------------------------------------------------------------


def test_a_load_under_way_forbids_changes_stores_and_discards(gates: Gates) -> None:
    tensor = gates.stored(7)
    gates.mover.start_load(tensor, FrameId(1))
    read = gates.files.take("read")
    for use in (gates.mover.touch, gates.mover.start_store, gates.mover.discard, gates.mover.forget):
        with pytest.raises(TransitionError, match="^t: loading ->"):
            use(tensor)
        assert tensor.state is R.LOADING
    check_mover(gates.mover)
    assert not tensor.readable
    read.open()
    assert tensor.state is R.CLEAN and gates.holds(tensor, 7)


def test_a_load_under_way_forbids_a_drop() -> None:
    with opened() as gates:
        tensor = gates.stored(7)
        gates.mover.start_load(tensor, FrameId(1))
        read = gates.files.take("read")
        try:
            with pytest.raises(TransitionError):
                gates.mover.drop(tensor)
        finally:
            with suppress(TransitionError):
                read.fail(StorageError("ended"))


def test_a_dirty_tensor_is_not_dropped() -> None:
    with opened() as gates:
        tensor = gates.dirty(5)
        with pytest.raises(TransitionError):
            gates.mover.drop(tensor)


def test_frames_that_a_load_is_filling_are_taken(gates: Gates) -> None:
    tensor, other = gates.stored(7), gates.mover.create("other", Tag.GRAD, PAGE_BYTES)
    gates.mover.start_load(tensor, FrameId(1))
    with pytest.raises(AssertionError, match=r"^other: frames 1\.\.2 are taken"):
        gates.mover.start_load(other, FrameId(1))
    assert (other.state, other.frame) == (R.ABSENT, None)
    assert not gates.mover.tenants.droppable(tensor.id)
    window = gates.mover.tenants.choose(1, len)
    assert window is not None and window.first != 1
    gates.files.take("read").open()


def test_the_training_thread_waits_for_its_load_and_the_wait_is_recorded(gates: Gates) -> None:
    tensor = gates.stored(7)
    gates.mover.start_load(tensor, FrameId(0))
    waiting = gates.waits(lambda: tensor.readable, "t for layer 3")
    read = gates.files.take("read")
    assert not waiting.done()
    read.open()
    waiting.result(timeout=TIMEOUT_S)
    assert [event.name for event in gates.log.of(EventKind.WAIT)] in ([], ["t for layer 3"])
    assert [event.n_bytes for event in gates.log.of(EventKind.READ)] == [PAGE_BYTES]


def test_what_is_there_is_not_waited_for(gates: Gates) -> None:
    tensor = gates.dirty(1)
    gates.mover.monitor.wait_until(lambda: tensor.readable, "t")
    assert gates.log.of(EventKind.WAIT) == []


def test_a_load_that_fails_leaves_the_tensor_stored_and_its_frames_free(gates: Gates) -> None:
    tensor = gates.stored(7)
    gates.mover.start_load(tensor, FrameId(0))
    waiting = gates.waits(lambda: tensor.readable, "t")
    gates.files.take("read").fail(StorageError("the disk went away"))
    with pytest.raises(StorageError, match="the disk went away"):
        waiting.result(timeout=TIMEOUT_S)
    gates.mover.monitor.check()  # Told once.
    assert (tensor.state, tensor.frame, tensor.ssd_valid) == (R.STORED, None, True)
    assert gates.mover.host.used_frames == 0
    check_mover(gates.mover)
    gates.mover.start_load(tensor, FrameId(2))
    gates.files.take("read").open()
    assert gates.holds(tensor, 7), "the page file's copy was whole all the time"


def test_a_fresh_load_is_not_read(gates: Gates) -> None:
    tensor = gates.stored(7)
    gates.mover.start_load(tensor, FrameId(0), fresh=True)
    assert gates.files.idle() and tensor.state is R.CLEAN and not tensor.ssd_valid


# ---- a store under way ----------------------------------------------------------------------------------------------


def test_compute_reads_while_a_store_is_under_way_but_nobody_drops_it(gates: Gates) -> None:
    tensor = gates.dirty(5)
    gates.mover.start_store(tensor)
    write = gates.files.take("write")
    assert tensor.readable and gates.holds(tensor, 5)
    for use in (gates.mover.start_store, gates.mover.drop, gates.mover.discard):
        with pytest.raises(TransitionError, match="^t: storing ->"):
            use(tensor)
    assert tensor.state is R.STORING and gates.holds(tensor, 5)
    assert not gates.mover.tenants.droppable(tensor.id)
    write.open()
    assert (tensor.state, tensor.ssd_valid) == (R.CLEAN, True)
    gates.mover.drop(tensor)
    assert tensor.frame is None and tensor.ssd_valid


def test_a_pinned_tensor_is_stored_but_not_dropped(gates: Gates) -> None:
    tensor = gates.dirty(5)
    tensor.pins += 1
    gates.mover.start_store(tensor)
    gates.files.take("write").open()
    with pytest.raises(AssertionError, match=r"t is held \(1 pins, 0 leases\)"):
        gates.mover.drop(tensor)
    assert tensor.state is R.CLEAN and tensor.frame is not None
    tensor.pins -= 1
    gates.mover.drop(tensor)


def test_a_store_that_fails_keeps_the_tensor_dirty_and_whole(gates: Gates) -> None:
    tensor = gates.dirty(5)
    gates.mover.start_store(tensor)
    waiting = gates.waits(lambda: tensor.state is R.CLEAN, "t")
    gates.files.take("write").fail(StorageError("no space"))
    with pytest.raises(StorageError, match="no space"):
        waiting.result(timeout=TIMEOUT_S)
    gates.mover.monitor.check()  # Told once.
    assert (tensor.state, tensor.ssd_valid) == (R.DIRTY, False)
    assert gates.holds(tensor, 5)
    check_mover(gates.mover)
    gates.mover.start_store(tensor)
    gates.files.take("write").open()
    assert tensor.state is R.CLEAN


def test_a_second_store_that_fails_does_not_make_the_first_ones_copy_count(gates: Gates) -> None:
    tensor = gates.dirty(5)
    gates.mover.start_store(tensor)
    gates.files.take("write").open()
    gates.fill(tensor, 6)
    assert not tensor.ssd_valid
    gates.mover.start_store(tensor)
    gates.files.take("write").fail(StorageError("no space"))
    assert (tensor.state, tensor.ssd_valid) == (R.DIRTY, False) and gates.holds(tensor, 6)


def test_the_first_of_several_errors_is_the_one_that_is_raised(gates: Gates) -> None:
    tensors = [gates.dirty(i, frame=i, name=f"t{i}") for i in range(3)]
    for tensor in tensors:
        gates.mover.start_store(tensor)
    writes = [gates.files.take("write") for _ in tensors]
    writes[1].fail(StorageError("first"))
    writes[0].fail(StorageError("second"))
    writes[2].open()
    with pytest.raises(StorageError, match="first"):
        gates.mover.monitor.check()
    assert [tensor.state for tensor in tensors] == [R.DIRTY, R.DIRTY, R.CLEAN]


def test_two_stores_of_one_tensor_go_to_the_same_place_one_after_the_other(gates: Gates) -> None:
    tensor = gates.dirty(5)
    gates.mover.start_store(tensor)
    first = gates.files.take("write")
    with pytest.raises(TransitionError):
        gates.mover.start_store(tensor)
    assert gates.files.idle(), "a second store does not begin before the first has ended"
    first.open()
    gates.fill(tensor, 6)
    gates.mover.start_store(tensor)
    second = gates.files.take("write")
    assert list(second.route) == list(first.route)
    second.open()
    gates.mover.drop(tensor)
    gates.mover.start_load(tensor, FrameId(2))
    gates.files.take("read").open()
    assert gates.holds(tensor, 6)


def test_storing_all_waits_for_every_store_and_reports_a_failed_one(gates: Gates) -> None:
    tensors = [gates.dirty(i, frame=i, name=f"t{i}") for i in range(3)]
    storing = gates.training.submit(gates.mover.store_all)
    writes = [gates.files.take("write") for _ in tensors]
    writes[2].open()
    writes[0].fail(StorageError("no space"))
    assert not storing.done()
    writes[1].open()
    with pytest.raises(StorageError, match="no space"):
        storing.result(timeout=TIMEOUT_S)
    assert [tensor.state for tensor in tensors] == [R.DIRTY, R.CLEAN, R.CLEAN]


# ---- leases ---------------------------------------------------------------------------------------------------------


def test_frames_are_not_used_again_before_the_last_alias_is_gone(gates: Gates) -> None:
    tensor = gates.dirty(5)
    gates.mover.start_store(tensor)
    gates.files.take("write").open()
    view = gates.lease(tensor)
    aliases = [view[10:20], view.view(256, -1).t(), view.detach()]
    del view
    for left in (3, 2, 1):
        gc.collect()
        assert gates.mover.collect_leases() == [] and tensor.leases == 1, f"{left} aliases live"
        assert not gates.mover.tenants.droppable(tensor.id)
        with pytest.raises(AssertionError, match=r"t is held \(0 pins, 1 leases\)"):
            gates.mover.drop(tensor)
        assert bool((aliases[-1] == 5).all())
        aliases.pop()
    gc.collect()
    assert gates.mover.collect_leases() == [tensor] and tensor.leases == 0
    gates.mover.drop(tensor)


def test_every_lease_of_a_tensor_must_end(gates: Gates) -> None:
    tensor = gates.dirty(5)
    leases = [gates.lease(tensor) for _ in range(3)]
    for left in (2, 1):
        leases.pop()
        assert gates.mover.collect_leases() == [] and tensor.leases == left
    leases.pop()
    assert gates.mover.collect_leases() == [tensor]


def test_no_window_includes_a_tensor_that_is_seen(gates: Gates) -> None:
    tensors = [gates.dirty(i, frame=i, name=f"t{i}") for i in range(3)]
    view = gates.lease(tensors[1])
    assert gates.mover.tenants.choose(2, len) is None
    window = gates.mover.tenants.choose(1, len)
    assert window is not None and window.first in (0, 2)
    del view
    gates.mover.collect_leases()
    assert gates.mover.tenants.choose(2, len) is not None


# ---- coming to rest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["settle", "close"])
@pytest.mark.parametrize("failing", [False, True])
def test_coming_to_rest_waits_for_every_copy_also_a_failing_one(gates: Gates, rest: str, failing: bool) -> None:
    loading = gates.stored(7, name="loading")
    storing = gates.dirty(5, frame=1, name="storing")
    gates.mover.start_load(loading, FrameId(0))
    gates.mover.start_store(storing)
    read, write = gates.files.take("read"), gates.files.take("write")
    resting = gates.training.submit(getattr(gates.mover.monitor, rest))
    if failing:
        read.fail(StorageError("gone"))
    else:
        read.open()
    assert not resting.done()
    write.open()
    if failing and rest == "close":
        with pytest.raises(StorageError, match="gone"):
            resting.result(timeout=TIMEOUT_S)
    else:
        resting.result(timeout=TIMEOUT_S)
    assert (loading.state, storing.state) == (R.STORED if failing else R.CLEAN, R.CLEAN)


def test_listeners_hear_of_every_end_with_the_state_already_changed(gates: Gates) -> None:
    tensor = gates.dirty(5)
    seen: list[Residency] = []
    gates.mover.monitor.on_change(lambda: seen.append(tensor.state))
    gates.mover.start_store(tensor)
    gates.files.take("write").open()
    gates.mover.drop(tensor)
    gates.mover.start_load(tensor, FrameId(1))
    gates.files.take("read").fail(StorageError("gone"))
    assert seen == [R.CLEAN, R.STORED]
