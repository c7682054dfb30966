"""UnitChannel, parcels and versions, each side in turn: what is merged, carried over, and given back exactly once."""

from __future__ import annotations

import pytest
import torch
from one_unit import mark, sums, unit_of

from optim.lockfree.unit_channel import GradientBatch, GradientSum, UnitChannel
from optim.unit import Slot
from pagemem.errors import TransitionError

N = 16


def steps_of(total: GradientSum) -> list[float]:
    return [hyper["lr"] for hyper in total.hypers]


def box(n_slots: int = 2) -> tuple[UnitChannel, list[Slot]]:
    unit = unit_of(*[N] * n_slots)
    return UnitChannel(unit), unit.slots


def serve(mailbox: UnitChannel) -> GradientBatch:
    """What the updater does, with values that are the gradients themselves."""
    parcel = mailbox.take()
    assert parcel is not None
    mailbox.publish(parcel)
    return parcel


def test_bytes_are_released_once() -> None:
    (slot,) = box(1)[1]
    total = GradientSum(slot, torch.zeros(N, dtype=torch.bfloat16), [{}])
    assert [total.release(), total.release(), total.release()] == [2 * N, 0, 0]


def test_a_parcel_is_taken_once() -> None:
    mailbox, (a, b) = box()
    assert mailbox.take() is None and not mailbox.has_work
    assert mailbox.put(sums([a, b], 1)) == 0
    assert mailbox.has_work
    parcel = mailbox.take()
    assert parcel is not None and (parcel.first, parcel.last, list(parcel.sums)) == (1, 1, [a, b])
    assert mailbox.take() is None and not mailbox.has_work
    assert mailbox.clock.produced == 1


def test_what_was_not_taken_is_taken_back_and_added_to() -> None:
    mailbox, (a, b) = box()
    assert mailbox.put(sums([a, b], 1)) == 0
    added = sums([a], 2)
    assert mailbox.put(added) == 4 * N
    assert added[a].release() == 0, "the addend's bytes were given back already"
    assert mailbox.put(sums([a, b], 3)) == 8 * N
    parcel = mailbox.take()
    assert parcel is not None and (parcel.first, parcel.last) == (1, 3)
    assert torch.equal(parcel.sums[a].flat, mark(N, 1, 2, 3)) and steps_of(parcel.sums[a]) == [1, 2, 3]
    assert torch.equal(parcel.sums[b].flat, mark(N, 1, 3)) and steps_of(parcel.sums[b]) == [1, 3]
    assert [parcel.sums[slot].release() for slot in (a, b)] == [4 * N, 4 * N]
    assert mailbox.take() is None


def test_a_parameter_that_is_new_in_a_later_step_joins_the_waiting_ones() -> None:
    mailbox, (a, b) = box()
    mailbox.put(sums([a], 1))
    assert mailbox.put(sums([b], 2)) == 0
    parcel = mailbox.take()
    assert parcel is not None and {slot.name: steps_of(total) for slot, total in parcel.sums.items()} == {
        "0.a": [1],
        "0.b": [2],
    }


def test_what_was_taken_is_not_added_to() -> None:
    mailbox, (a, _) = box()
    mailbox.put(sums([a], 1))
    taken = mailbox.take()
    assert mailbox.put(sums([a], 2)) == 0
    assert taken is not None and torch.equal(taken.sums[a].flat, mark(N, 1))
    following = mailbox.take()
    assert following is not None and (following.first, following.last) == (2, 2)


def test_each_step_keeps_its_own_clipping_factor() -> None:
    (slot,) = box(1)[1]
    kept = GradientSum(slot, torch.full((N,), 4.0), [{"lr": 1}], torch.tensor(0.5))
    kept.add(GradientSum(slot, torch.full((N,), 8.0), [{"lr": 2}], torch.tensor(0.125)))
    kept.add(GradientSum(slot, torch.full((N,), 1.0), [{"lr": 3}], torch.tensor(1.0)))
    assert kept.coefficient is None and kept.n_steps == 3
    assert torch.equal(kept.flat, torch.full((N,), 4.0))


def test_parcels_that_do_not_follow_each_other_cannot_be_added() -> None:
    (slot,) = box(1)[1]
    with pytest.raises(AssertionError, match=r"steps 4\.\.4 cannot be added to steps 1\.\.2"):
        GradientBatch(1, 2, sums([slot], 1)).add(GradientBatch(4, 4, sums([slot], 4)))


def test_publishing_and_adopting() -> None:
    mailbox, (a, b) = box()
    assert mailbox.unadopted() is None and mailbox.newest_values() == {}
    mailbox.put(sums([a, b], 1))
    parcel = serve(mailbox)
    version = mailbox.unadopted()
    assert version is not None and version is mailbox.version
    assert (version.last, version.since, version.values) == (1, 0, parcel.sums)
    assert mailbox.newest_values() == {slot: total.flat for slot, total in version.values.items()}
    mailbox.clock.adopt(1)
    assert mailbox.unadopted() is None
    assert mailbox.newest_values() == {}, "the pages have them now"
    assert not mailbox.freed_bytes


def test_publishing_steps_that_are_not_the_next_is_refused_and_publishes_nothing() -> None:
    mailbox, (a, _) = box()
    mailbox.put(sums([a], 1))
    parcel = serve(mailbox)
    with pytest.raises(TransitionError):
        mailbox.publish(parcel)
    assert mailbox.version is not None and mailbox.version.last == 1


def test_a_version_that_nobody_adopted_lives_on_in_the_next() -> None:
    mailbox, (a, b) = box()
    mailbox.put(sums([a, b], 1))
    first = serve(mailbox)
    mailbox.put(sums([a], 2))
    second = serve(mailbox)
    version = mailbox.unadopted()
    assert version is not None and (version.last, version.since) == (2, 0)
    assert version.values == {a: second.sums[a], b: first.sums[b]}
    assert sum(mailbox.freed_bytes) == 4 * N, "the first one's values of a are nobody's any more"
    assert first.sums[a].release() == 0
    assert [version.values[slot].release() for slot in (a, b)] == [4 * N, 4 * N]


def test_a_version_that_was_adopted_is_not_carried_over() -> None:
    mailbox, (a, b) = box()
    mailbox.put(sums([a, b], 1))
    serve(mailbox)
    mailbox.clock.adopt(1)
    mailbox.put(sums([a], 2))
    second = serve(mailbox)
    version = mailbox.unadopted()
    assert version is not None and (version.since, version.values) == (1, second.sums)
    assert sum(mailbox.freed_bytes) == 0


def test_whoever_releases_first_has_the_bytes() -> None:
    mailbox, (a, b) = box()
    mailbox.put(sums([a, b], 1))
    first = serve(mailbox)
    mailbox.put(sums([a, b], 2))
    adopted = mailbox.unadopted()
    assert adopted is not None
    # The training thread has copied the version in and has not said so yet; the updater replaces it meanwhile.
    serve(mailbox)
    mailbox.clock.adopt(adopted.last)
    by_training = sum(total.release() for total in adopted.values.values())
    assert by_training + sum(mailbox.freed_bytes) == 8 * N
    assert [total.release() for total in first.sums.values()] == [0, 0]
    newest = mailbox.unadopted()
    assert newest is not None and (newest.last, newest.since) == (2, 0)
    assert sum(total.release() for total in newest.values.values()) == 8 * N


def test_values_dropped_after_their_adoption_are_whole_for_an_updater_that_took_them_before() -> None:
    mailbox, (a, b) = box()
    mailbox.put(sums([a, b], 1))
    serve(mailbox)
    version = mailbox.version
    assert version is not None
    taken = mailbox.newest_values()
    mailbox.clock.adopt(1)
    assert sum(total.drop() for total in version.values.values()) == 2 * 4 * N
    assert version.values[a].is_dropped and version.values[a].drop() == 0
    assert taken[a].numel() == N and mailbox.newest_values() == {}


def test_values_dropped_while_the_next_version_takes_them_over_are_in_the_pages() -> None:
    mailbox, (a, b) = box()
    mailbox.put(sums([a, b], 1))
    first = serve(mailbox)
    mailbox.put(sums([a], 2))
    second = serve(mailbox)  # It did not know yet that step 1 is adopted.
    mailbox.clock.adopt(1)
    for total in first.sums.values():
        total.drop()
    assert mailbox.version is not None and mailbox.version.values == {a: second.sums[a], b: first.sums[b]}
    assert set(mailbox.newest_values()) == {a}
