"""Spans of a staging buffer, taken and dropped in any order: never two of one byte, and always the first that is long
enough."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pagemem.devices.staging import ALIGN_BYTES, StagingBuffer

N_BYTES = 4096


@given(st.lists(st.one_of(st.integers(1, N_BYTES), st.integers(-8, 0)), max_size=60))
def test_spans_never_overlap_and_are_the_first_that_fit(moves: list[int]) -> None:
    """A positive number takes so many bytes, another one drops a span."""
    buffer = StagingBuffer(N_BYTES, None)
    whole = buffer.take(N_BYTES)
    assert whole is not None
    begin = whole.data_ptr()
    del whole
    held: list[tuple[int, torch.Tensor, int]] = []
    for number, move in enumerate(moves):
        if move <= 0:
            if held:
                del held[-move % len(held)]
            continue
        taken = sorted((start, start + span.numel()) for start, span, _ in held)
        fits = [
            start
            for start in (0, *(-(-end // ALIGN_BYTES) * ALIGN_BYTES for _, end in taken))
            if start + move <= N_BYTES
        ]
        fits = [start for start in fits if all(end <= start or start + move <= other for other, end in taken)]
        span = buffer.take(move)
        assert (span is None) is (not fits)
        if span is not None:
            assert span.data_ptr() - begin == min(fits) and span.numel() == move
            span.fill_(number % 251)
            held.append((min(fits), span, number % 251))
        assert all(bool((values == mine).all()) for _, values, mine in held), "somebody else wrote there"
        del span
    held.clear()
    values = buffer.take(N_BYTES)
    assert values is not None, "all of it is free again"
    del values
    buffer.close()
