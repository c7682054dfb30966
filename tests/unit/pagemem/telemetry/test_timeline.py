"""Timelines and intervals: pure arithmetic, against models that look at every instant."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemem.telemetry.intervals import Interval, clipped, shares, total_s, tracks, union, without
from pagemem.telemetry.timeline import HeldChange, Timeline
from pagemem.tier import Tag, Tier

END_S = 32
TAGS = [Tag.PARAM, Tag.GRAD, Tag.MOMENT]
HELD = st.dictionaries(st.tuples(st.sampled_from(Tier), st.sampled_from(TAGS)), st.integers(0, 1000))
#: When, where, and which part (in 1000ths) of what is held is given up, or how much is added.
STEPS = st.lists(
    st.tuples(st.integers(0, END_S), st.sampled_from(Tier), st.sampled_from(TAGS), st.booleans(), st.integers(0, 1000)),
    max_size=40,
)
INTERVALS = st.lists(
    st.tuples(st.integers(0, END_S), st.integers(0, END_S)).map(lambda pair: (min(pair), max(pair))), max_size=12
)


def changes_of(
    held: dict[tuple[Tier, Tag], int], steps: Sequence[tuple[int, Tier, Tag, bool, int]]
) -> list[HeldChange]:
    """Changes that never take more than there is, in the order of their times."""
    now, made = dict(held), []
    for at, tier, tag, more, amount in sorted(steps, key=lambda step: step[0]):
        n_bytes = amount if more else -(now.get((tier, tag), 0) * amount // 1000)
        now[tier, tag] = now.get((tier, tag), 0) + n_bytes
        made.append((float(at), tier, tag, n_bytes))
    return made


@given(HELD, STEPS)
def test_samples_are_what_was_held_and_peaks_are_their_maxima(
    held: dict[tuple[Tier, Tag], int], steps: list[tuple[int, Tier, Tag, bool, int]]
) -> None:
    changes = changes_of(held, steps)
    timeline = Timeline(0.0, float(END_S), held, changes)
    for tier in Tier:
        samples = timeline.samples(tier)
        assert len(samples) == 1 + sum(changed is tier for _, changed, _, _ in changes)
        for sample in samples:
            assert sample.total_bytes == sum(sample.by_tag.values())
            assert all(n_bytes > 0 for n_bytes in sample.by_tag.values())
        last = {tag: held.get((tier, tag), 0) + sum(c[3] for c in changes if c[1:3] == (tier, tag)) for tag in TAGS}
        assert samples[-1].by_tag == {tag: n_bytes for tag, n_bytes in last.items() if n_bytes}
        peak = timeline.peak(tier)
        assert peak.total_bytes == max(sample.total_bytes for sample in samples)
        assert peak == next(sample for sample in samples if sample.total_bytes == peak.total_bytes)
        for tag, n_bytes in timeline.tag_peaks(tier).items():
            assert n_bytes == max(sample.by_tag.get(tag, 0) for sample in samples)
        assert set(timeline.tag_peaks(tier)) == {tag for sample in samples for tag in sample.by_tag}
        assert (tier in timeline.tiers) == (peak.total_bytes > 0)
        assert timeline.mean_bytes(tier) == pytest.approx(
            sum(_at(timeline, tier, second) for second in range(END_S)) / END_S
        )


def _at(timeline: Timeline, tier: Tier, second: int) -> int:
    return [sample for sample in timeline.samples(tier) if sample.time_s <= second][-1].total_bytes


@given(HELD, STEPS, st.integers(1, 50))
def test_no_peak_is_lost_in_buckets(
    held: dict[tuple[Tier, Tag], int], steps: list[tuple[int, Tier, Tag, bool, int]], n: int
) -> None:
    timeline = Timeline(0.0, float(END_S), held, changes_of(held, steps))
    for tier in Tier:
        buckets = timeline.buckets(tier, n)
        assert len(buckets) == n
        assert max(sum(bucket.values()) for bucket in buckets) == timeline.peak(tier).total_bytes
        known = [sample.by_tag for sample in timeline.samples(tier)]
        assert all(bucket in known for bucket in buckets)


def test_a_bucket_without_a_change_goes_on_with_what_is_held() -> None:
    made = Timeline(0.0, 4.0, {}, [(0.5, Tier.HOST, Tag.GRAD, 7), (3.5, Tier.HOST, Tag.GRAD, -3)])
    assert [bucket.get(Tag.GRAD, 0) for bucket in made.buckets(Tier.HOST, 4)] == [7, 7, 7, 7]
    assert [bucket.get(Tag.GRAD, 0) for bucket in made.buckets(Tier.HOST, 8)] == [0, 7, 7, 7, 7, 7, 7, 4]
    assert made.mean_bytes(Tier.HOST) == (3 * 7 + 0.5 * 4) / 4


def test_what_cannot_have_happened_is_refused() -> None:
    with pytest.raises(AssertionError, match="host: gradient would hold -1 bytes at 1.0 s"):
        Timeline(0.0, 2.0, {(Tier.HOST, Tag.GRAD): 3}, [(1.0, Tier.HOST, Tag.GRAD, -4)])


def test_a_timeline_without_length_has_a_mean_and_buckets() -> None:
    made = Timeline(1.0, 1.0, {(Tier.SSD, Tag.PARAM): 5}, [(1.0, Tier.SSD, Tag.PARAM, 1)])
    assert (
        made.mean_bytes(Tier.SSD) == 6
        and [dict(bucket) for bucket in made.buckets(Tier.SSD, 2)] == [{Tag.PARAM: 6}] * 2
    )


# ---- intervals ------------------------------------------------------------------------------------------------------


def seconds_of(intervals: Sequence[Interval]) -> set[int]:
    """Every whole second that one of them covers."""
    return {second for begin, end in intervals for second in range(int(begin), int(end))}


@given(INTERVALS, INTERVALS)
def test_intervals_against_single_seconds(intervals: list[Interval], others: list[Interval]) -> None:
    for result, expected in (
        (union(intervals), seconds_of(intervals)),
        (without(intervals, others), seconds_of(intervals) - seconds_of(others)),
        (clipped(intervals, 5, 20), seconds_of(intervals) & set(range(5, 20))),
    ):
        assert seconds_of(result) == expected
    for disjoint in (union(intervals), without(intervals, others)):
        assert all(begin < end for begin, end in disjoint)
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(disjoint))
    assert total_s(intervals) == len(seconds_of(intervals))


@given(INTERVALS, st.sampled_from([1, 2, 8, 32, 64]))
def test_shares_add_up_to_the_time_covered(intervals: list[Interval], n: int) -> None:
    found = shares(intervals, 0.0, float(END_S), n)
    assert len(found) == n and all(0 <= share <= 1 for share in found)
    assert sum(found) * END_S / n == pytest.approx(total_s(intervals))


def test_shares_of_no_time_are_refused() -> None:
    with pytest.raises(ValueError, match="there must be some of both"):
        shares([], 1.0, 1.0, 4)
    with pytest.raises(ValueError, match="0 buckets"):
        shares([], 1.0, 2.0, 0)


@given(INTERVALS)
def test_on_one_track_nothing_overlaps_and_tracks_are_as_few_as_that_takes(intervals: list[Interval]) -> None:
    found = tracks(intervals)
    for track in set(found):
        own = sorted(interval for interval, its in zip(intervals, found, strict=True) if its == track)
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(own))
    deepest = max((sum(begin <= second < end for begin, end in intervals) for second in range(END_S)), default=0)
    empty = sum(begin == end for begin, end in intervals)
    assert deepest <= len(set(found)) <= deepest + empty
