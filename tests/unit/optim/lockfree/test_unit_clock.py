"""A unit's clock: its legal moves, and that every other one is refused and changes nothing."""

from __future__ import annotations

import pytest

from optim.lockfree.unit_clock import UnitClock
from pagemem.errors import TransitionError


def test_a_step_goes_through_production_application_and_adoption() -> None:
    clock = UnitClock()
    assert [clock.produce(), clock.produce(), clock.produce()] == [1, 2, 3]
    assert clock.staleness == 3
    clock.apply(1, 1)
    clock.apply(2, 3)
    assert clock.staleness == 3
    clock.adopt(1)
    assert clock.staleness == 2
    clock.adopt(3)
    assert (clock.produced, clock.applied, clock.adopted, clock.staleness) == (3, 3, 3, 0)


@pytest.mark.parametrize(
    ("first", "last"),
    [(1, 1), (2, 3), (4, 4), (3, 2), (3, 5)],
    ids=["a second time", "overlapping", "leaving one out", "backwards", "more than produced"],
)
def test_a_gradient_lost_or_doubled_is_refused(first: int, last: int) -> None:
    clock = UnitClock(produced=4, applied=2, adopted=1)
    with pytest.raises(TransitionError, match=rf"steps {first}\.\.{last} after step 2, with 4 produced"):
        clock.apply(first, last)
    assert clock == UnitClock(4, 2, 1)


@pytest.mark.parametrize("last", [0, 1, 3], ids=["older", "in use already", "not applied"])
def test_adopting_what_is_old_or_not_there_is_refused(last: int) -> None:
    clock = UnitClock(produced=4, applied=2, adopted=1)
    with pytest.raises(TransitionError, match=rf"adopting step {last} after step 1, with 2 applied"):
        clock.adopt(last)
    assert clock == UnitClock(4, 2, 1)
