"""Budgets of bytes: what is held adds up by tag, what does not fit changes nothing, and everything ends at zero."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pagemem.budget import Budget, BudgetShortage, Reservation
from pagemem.errors import TransitionError
from pagemem.tier import Tag, Tier
from pagemem.units import MiB


def budget(limit_bytes: int = 100) -> Budget:
    return Budget(Tier.HOST, limit_bytes)


def held(found: Reservation | BudgetShortage) -> Reservation:
    assert isinstance(found, Reservation), found.describe()
    return found


def refused(found: Reservation | BudgetShortage) -> BudgetShortage:
    assert isinstance(found, BudgetShortage)
    return found


def take(of: Budget, n_bytes: int, tag: Tag = Tag.PARAM, holder: str = "someone") -> Reservation:
    return held(of.reserve(tag, n_bytes, holder))


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
    assert not host.reserve(Tag.PARAM, 1, "one more")
    assert (reservation.n_bytes, host.used_bytes) == (100, 100)


def test_released_bytes_can_be_held_again_and_the_peak_stays() -> None:
    host = budget()
    first = take(host, 80)
    first.release()
    assert figures(host) == (0, 80, {})
    assert first.n_bytes == 0 and first.released
    take(host, 100)
    assert host.peak_bytes == 100


def test_a_reservation_is_true_and_a_shortage_false() -> None:
    host = budget()
    assert host.reserve(Tag.PARAM, 0, "nothing yet")
    assert not host.reserve(Tag.PARAM, 101, "too much")


# ---- resizing -------------------------------------------------------------------------------------------------------


def test_resizing_grows_and_shrinks_and_the_peak_remembers() -> None:
    host = budget()
    reservation = take(host, 10, Tag.GRAD)
    for n_bytes in (40, 15, 100, 0, 7):
        assert reservation.resize(n_bytes) is reservation
        assert (reservation.n_bytes, host.used_bytes) == (n_bytes, n_bytes)
    assert figures(host) == (7, 100, {Tag.GRAD: 7})


def test_resizing_counts_only_what_is_added() -> None:
    host = budget()
    reservation = take(host, 90)
    held(reservation.resize(100))
    assert host.used_bytes == 100


# ---- shortages ------------------------------------------------------------------------------------------------------


def test_a_refused_reservation_changes_nothing_and_names_the_holders_most_first() -> None:
    host = budget()
    take(host, 20, Tag.GRAD)
    take(host, 50, Tag.MOMENT)
    take(host, 0, Tag.TEMPORARY)
    before = figures(host)
    shortage = refused(host.reserve(Tag.ACTIVATION, 31, "layer 3"))
    assert shortage == BudgetShortage(Tier.HOST, 31, 70, 100, ((Tag.MOMENT, 50), (Tag.GRAD, 20)))
    assert figures(host) == before
    assert take(host, 30, Tag.ACTIVATION).n_bytes == 30


def test_a_refused_resize_leaves_the_size_as_it_was() -> None:
    host = budget()
    take(host, 60, Tag.PARAM)
    reservation = take(host, 30, Tag.STAGING)
    before = figures(host)
    shortage = refused(reservation.resize(41))
    assert (shortage.asked_bytes, shortage.used_bytes) == (11, 90)
    assert reservation.n_bytes == 30 and not reservation.released
    assert figures(host) == before
    held(reservation.resize(40))


def test_the_sentence_says_what_is_held_by_whom_and_what_to_change() -> None:
    host = budget(10 * MiB)
    take(host, 8 * MiB, Tag.MOMENT)
    sentence = refused(host.reserve(Tag.PARAM, 3 * MiB, "embedding")).describe()
    assert sentence == (
        "host: 3.0 MiB more do not fit, 8.0 MiB of 10.0 MiB are held by moment 8.0 MiB; raise the budget by 1.0 MiB"
    )
    assert "held by nobody" in refused(budget(0).reserve(Tag.PARAM, 1, "all")).describe()


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
                reservation = host.reserve(tag, 1 + turn % 3, f"{tag.value} {turn}")
                if isinstance(reservation, Reservation):
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
