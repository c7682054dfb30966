"""Budgets of bytes: what is held adds up by tag, what does not fit changes nothing, and everything ends at zero."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from pagemem.budget import Budget, Reservation
from pagemem.errors import BudgetError, TransitionError
from pagemem.tier import Tag, Tier
from pagemem.units import MiB


def budget(limit_bytes: int = 100) -> Budget:
    return Budget(Tier.HOST, limit_bytes)


def take(of: Budget, n_bytes: int, tag: Tag = Tag.PARAM, holder: str = "someone") -> Reservation:
    return of.reserve(tag, n_bytes, holder)


def figures(of: Budget) -> tuple[int, int, dict[Tag, int]]:
    return of.used_bytes, of.peak_bytes, of.by_tag()


# ---- reserving and releasing ----------------------------------------------------------------------------------------


def test_reservations_add_up_by_tag() -> None:
    host = budget()
    take(host, 20, Tag.PARAM)
    take(host, 30, Tag.GRAD)
    take(host, 5, Tag.PARAM)
    take(host, 0, Tag.TEMPORARY)
    assert figures(host) == (55, 55, {Tag.PARAM: 25, Tag.GRAD: 30})


def test_a_budget_can_be_filled_to_the_last_byte() -> None:
    host = budget()
    reservation = take(host, 100)
    with pytest.raises(BudgetError):
        host.reserve(Tag.PARAM, 1, "one more")
    assert (reservation.n_bytes, host.used_bytes) == (100, 100)


def test_released_bytes_can_be_held_again_and_the_peak_stays() -> None:
    host = budget()
    first = take(host, 80)
    first.release()
    assert figures(host) == (0, 80, {})
    assert first.n_bytes == 0 and first.released
    take(host, 100)
    assert host.peak_bytes == 100


# ---- resizing -------------------------------------------------------------------------------------------------------


def test_resizing_grows_and_shrinks_and_the_peak_remembers() -> None:
    host = budget()
    reservation = take(host, 10, Tag.GRAD)
    for n_bytes in (40, 15, 100, 0, 7):
        assert reservation.resize(n_bytes)
        assert (reservation.n_bytes, host.used_bytes) == (n_bytes, n_bytes)
    assert figures(host) == (7, 100, {Tag.GRAD: 7})


def test_resizing_counts_only_what_is_added() -> None:
    host = budget()
    reservation = take(host, 90)
    assert reservation.resize(100)
    assert host.used_bytes == 100


# ---- shortages ------------------------------------------------------------------------------------------------------


def test_a_refused_reservation_changes_nothing_and_names_the_holders_most_first() -> None:
    host = budget()
    take(host, 20, Tag.GRAD)
    take(host, 50, Tag.MOMENT)
    take(host, 0, Tag.TEMPORARY)
    before = figures(host)
    with pytest.raises(BudgetError, match="held by moment 50 B, gradient 20 B;") as error:
        host.reserve(Tag.ACTIVATION, 31, "layer 3")
    assert error.value.smallest_bytes == 101
    assert figures(host) == before
    assert take(host, 30, Tag.ACTIVATION).n_bytes == 30


def test_a_refused_resize_leaves_the_size_as_it_was() -> None:
    host = budget()
    take(host, 60, Tag.PARAM)
    reservation = take(host, 30, Tag.STAGING)
    before = figures(host)
    assert not reservation.resize(41)
    assert reservation.n_bytes == 30 and not reservation.released
    assert figures(host) == before
    assert reservation.resize(40)


def test_the_sentence_says_what_is_held_by_whom_and_what_to_change() -> None:
    host = budget(10 * MiB)
    take(host, 8 * MiB, Tag.MOMENT)
    with pytest.raises(BudgetError) as error:
        host.reserve(Tag.PARAM, 3 * MiB, "embedding")
    assert str(error.value) == (
        "host: 3.0 MiB more do not fit, 8.0 MiB of 10.0 MiB are held by moment 8.0 MiB; raise the budget by 1.0 MiB"
    )
    with pytest.raises(BudgetError, match="held by nobody"):
        budget(0).reserve(Tag.PARAM, 1, "all")


# ---- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [Reservation.release, lambda r: r.resize(1)], ids=["release", "resize"])
def test_a_reservation_ends_only_once(use: Callable[[Reservation], object]) -> None:
    host = budget()
    reservation = take(host, 10, holder="staging buffer")
    reservation.release()
    with pytest.raises(TransitionError, match="staging buffer.*released"):
        use(reservation)
    assert (reservation.n_bytes, host.used_bytes) == (0, 0)


def test_closing_with_bytes_held_names_every_holder() -> None:
    host = budget()
    first, second = take(host, 10, Tag.PARAM, "weights"), take(host, 20, Tag.GRAD, "gradients in flight")
    with pytest.raises(
        AssertionError, match=r"^host: .*: gradients in flight \(gradient, 20 bytes\), weights \(parameter, 10 bytes\)$"
    ):
        host.close()
    first.release()
    with pytest.raises(AssertionError, match=r": gradients in flight \(gradient, 20 bytes\)$"):
        host.close()
    second.release()
    host.close()
    host.close()


def test_a_reservation_of_no_bytes_must_end_too() -> None:
    host = budget()
    reservation = take(host, 0, holder="nothing yet")
    with pytest.raises(AssertionError, match="nothing yet"):
        host.close()
    reservation.release()
    host.close()


def test_sizes_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="ssd: a budget cannot be negative: -1"):
        Budget(Tier.SSD, -1)
    host = budget()
    with pytest.raises(ValueError, match="'a': a size cannot be negative: -5"):
        host.reserve(Tag.PARAM, -5, "a")
    reservation = take(host, 5)
    with pytest.raises(ValueError, match="cannot be negative"):
        reservation.resize(-1)
    assert (reservation.n_bytes, host.used_bytes) == (5, 5)
    reservation.release()
    host.close()


# ---- threads --------------------------------------------------------------------------------------------------------


def test_many_threads_at_once_never_hold_more_than_the_budget_and_end_at_zero() -> None:
    host = budget(7)
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(tag: Tag) -> None:
        try:
            start.wait(timeout=30)
            for turn in range(300):
                with suppress(BudgetError):
                    reservation = host.reserve(tag, 1 + turn % 3, f"{tag.value} {turn}")
                    reservation.resize(turn % 5)
                    reservation.release()
                assert 0 <= host.used_bytes <= 7 and host.peak_bytes <= 7
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(tag,)) for tag in (Tag.PARAM, Tag.GRAD, Tag.MOMENT, Tag.STAGING)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (host.used_bytes, host.by_tag()) == (0, {})
    host.close()
