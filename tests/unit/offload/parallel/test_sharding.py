"""Ranges of a unit for each rank: they cover it, are even, and are cut where kernels allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.parallel.sharding import BLOCK_NUMEL, cut_ranges, cut_units

SIZES = st.integers(0, 40 * BLOCK_NUMEL)
RANKS = st.integers(1, 9)


@given(SIZES, RANKS, st.integers(0, 20))
def test_ranges_cover_a_unit_in_rank_order_and_differ_by_a_block_at_most(numel: int, n_ranks: int, first: int) -> None:
    ranges = cut_ranges(numel, n_ranks, first)
    assert len(ranges) == n_ranks
    at = 0
    for start, end in ranges:
        assert start == at <= end
        assert start % BLOCK_NUMEL == 0 or start == numel
        at = end
    assert at == numel
    blocks = [-(-(end - start) // BLOCK_NUMEL) for start, end in ranges]
    assert max(blocks) - min(blocks) <= 1


@given(st.lists(SIZES, max_size=12), RANKS)
def test_totals_of_a_model_are_even(numels: list[int], n_ranks: int) -> None:
    units = list(cut_units(numels, n_ranks))
    blocks = [
        sum(-(-(end - start) // BLOCK_NUMEL) for start, end in (u[rank] for u in units)) for rank in range(n_ranks)
    ]
    assert max(blocks) - min(blocks) <= 1


def test_the_larger_parts_begin_with_the_first_owner() -> None:
    assert cut_ranges(5 * BLOCK_NUMEL, 3, first=2) == ((0, 2048), (2048, 3072), (3072, 5120))
    assert cut_ranges(100, 3) == ((0, 100), (100, 100), (100, 100))


@pytest.mark.parametrize(("numel", "n_ranks"), [(10, 0), (-1, 2)])
def test_impossible_numbers_are_refused(numel: int, n_ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{numel} elements for {n_ranks} ranks"):
        cut_ranges(numel, n_ranks)
