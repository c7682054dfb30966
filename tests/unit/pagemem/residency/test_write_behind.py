"""Storing behind ops on demand: what is begun, in which order, and when nothing is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gated_mover import PAGE_BYTES, Gates, opened

from pagemem.errors import DiskFullError, StorageError
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.residency.write_behind import WriteBehind
from pagemem.tier import Tag

FRAMES = 8


@pytest.fixture
def gates() -> Iterator[Gates]:
    """Eight frames, of which two are kept clean."""
    with opened(FRAMES) as made:
        yield made


def filled(gates: Gates, n_tensors: int = FRAMES) -> list[PagedTensor]:
    """Dirty tensors of a page each, used in this order."""
    tensors = [gates.dirty(number + 1, number, f"t{number}") for number in range(n_tensors)]
    for number, tensor in enumerate(tensors):
        gates.mover.tenants.used(tensor, number + 1)
    return tensors


def more(gates: Gates, tag: Tag = Tag.PARAM) -> None:
    """One tensor more than there is room for, which nobody has used yet."""
    gates.mover.create("more", tag, PAGE_BYTES)


def storing(tensors: list[PagedTensor]) -> list[int]:
    return [number for number, tensor in enumerate(tensors) if tensor.state is Residency.STORING]


def end(gates: Gates, n_writes: int) -> None:
    for _ in range(n_writes):
        gates.files.take("write").open()


def test_what_was_used_longest_ago_is_stored_and_stays_where_it_is(gates: Gates) -> None:
    tensors, behind = filled(gates), WriteBehind(gates.mover)
    more(gates)
    gates.mover.tenants.used(tensors[0], 9)
    behind.changed(tensors[:1])
    assert storing(tensors) == [1, 2]
    end(gates, 2)
    assert [tensor.state for tensor in tensors[1:3]] == [Residency.CLEAN] * 2
    assert gates.holds(tensors[1], 2) and gates.holds(tensors[2], 3)
    behind.changed(tensors[:1])
    assert not storing(tensors), "as much as is wanted is clean"
    gates.mover.tenants.used(tensors[1], 10)
    behind.changed(tensors[:1])
    assert storing(tensors) == [3]
    end(gates, 1)


def test_free_frames_count_as_clean_ones(gates: Gates) -> None:
    tensors, behind = filled(gates, FRAMES - 1), WriteBehind(gates.mover)
    more(gates)
    more(gates)
    behind.changed(tensors[:1])
    assert storing(tensors) == [0]
    end(gates, 1)


@pytest.mark.parametrize("tag", [None, Tag.GRAD])
def test_where_all_fits_nothing_is_stored(gates: Gates, tag: Tag | None) -> None:
    """Gradients do not last from step to step."""
    tensors = filled(gates)
    if tag is not None:
        more(gates, tag)
    WriteBehind(gates.mover).changed(tensors[:1])
    assert not storing(tensors)


def test_tenants_are_looked_at_once_enough_was_changed() -> None:
    with opened(32) as gates:
        tensors, behind = filled(gates, 32), WriteBehind(gates.mover)
        more(gates)
        behind.changed(tensors[:1])
        assert not storing(tensors)
        behind.changed(tensors[:1])
        assert storing(tensors) == [*range(8)]
        end(gates, 8)


def test_what_is_held_or_expires_is_left_alone(gates: Gates) -> None:
    tensors, behind = filled(gates), WriteBehind(gates.mover)
    more(gates)
    view = gates.lease(tensors[0])
    view_of_one = gates.lease(tensors[1])
    gates.mover.discard_soon(tensors[1])
    behind.changed(tensors[:1])
    assert storing(tensors) == [2, 3]
    end(gates, 2)
    del view, view_of_one
    gates.mover.collect_leases()


def test_after_a_failed_copy_nothing_is_begun_until_it_was_raised(gates: Gates) -> None:
    tensors, behind = filled(gates), WriteBehind(gates.mover)
    more(gates)
    behind.changed(tensors[:1])
    gates.files.take("write").fail(StorageError("the disk failed"))
    end(gates, 1)
    behind.changed(tensors[:1])
    assert not storing(tensors)
    with pytest.raises(StorageError, match="the disk failed"):
        gates.mover.monitor.check()
    behind.changed(tensors[:1])
    assert storing(tensors) == [0]
    end(gates, 1)
    assert gates.holds(tensors[0], 1)


def test_a_full_disk_is_left_to_who_needs_the_frames(gates: Gates, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, behind = filled(gates), WriteBehind(gates.mover)
    more(gates)

    def full(n_frames: int) -> None:
        raise DiskFullError("no room")

    monkeypatch.setattr(gates.files, "grow", full)
    behind.changed(tensors[:1])
    assert {tensor.state for tensor in tensors} == {Residency.DIRTY}
    with pytest.raises(DiskFullError, match="no room"):
        gates.mover.start_store(tensors[0])
