"""Which units are device-resident: as many as fit beside those that are streamed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload.knobs import WORKING_UNITS
from offload.store.device_placement import Candidate, choose_resident

UNITS = st.lists(
    st.builds(
        lambda frames, trained: Candidate(frames, 3 * frames if trained else None), st.integers(1, 9), st.booleans()
    ),
    max_size=12,
)


def room_for_the_rest(units: list[Candidate], chosen: list[int]) -> int:
    """Frames that those without a home need."""
    rest = [unit.parameter_frames for index, unit in enumerate(units) if index not in chosen]
    return min(sum(rest), WORKING_UNITS * max(rest, default=0))


def test_everything_is_at_home_where_it_fits() -> None:
    units = [Candidate(2, 6), Candidate(1, 3), Candidate(4, 12)]
    assert choose_resident(units, 21) == [0, 1, 2]
    assert choose_resident(units, 20) == [0, 1], "the last one comes and goes, in four frames"


def test_the_first_units_come_first_and_one_that_is_too_large_is_passed_over() -> None:
    units = [Candidate(10, 30), *[Candidate(1, 3)] * 4]
    assert choose_resident(units, 22) == [1, 2, 3, 4]
    assert choose_resident(units, 21) == [1, 2, 3]


def test_there_is_none_without_room_for_those_that_come_and_go() -> None:
    units = [Candidate(1, 3)] * 10
    assert choose_resident(units, WORKING_UNITS + 2) == []
    assert choose_resident(units, WORKING_UNITS + 3) == [0]


def test_what_is_not_updated_only_comes_and_goes() -> None:
    assert choose_resident([Candidate(2, None), Candidate(2, 6)], 100) == [1]
    assert choose_resident([], 100) == []


@given(UNITS, st.integers(0, 200))
def test_homes_and_the_rest_fit(units: list[Candidate], n_frames: int) -> None:
    chosen = choose_resident(units, n_frames)
    assert chosen == sorted(set(chosen)) and all(units[index].resident_frames is not None for index in chosen)
    taken = sum(units[index].resident_frames or 0 for index in chosen)
    assert not chosen or taken + room_for_the_rest(units, chosen) <= n_frames


@given(UNITS, st.integers(0, 200))
def test_the_last_trained_unit_without_a_home_would_not_have_fitted(units: list[Candidate], n_frames: int) -> None:
    chosen = choose_resident(units, n_frames)
    trained = [index for index, unit in enumerate(units) if unit.resident_frames is not None]
    if trained and trained[-1] not in chosen:
        further = [*chosen, trained[-1]]
        assert (
            sum(units[index].resident_frames or 0 for index in further) + room_for_the_rest(units, further) > n_frames
        )
