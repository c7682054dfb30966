"""Bytes held per tier and tag over a stretch of time, and their peaks. Pure data: no clock, thread or engine.

A timeline is made of what was held at its beginning and of every change since. Invariants
    1. No sample is negative, in any tag.
    2. A sample's total is the sum over its tags.
    3. A tier's peak is the greatest total of its samples.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pagemem.tier import Tag, Tier

#: So many bytes more (or less) are held of a tier under a tag, from a time in seconds on.
HeldChange = tuple[float, Tier, Tag, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """What a tier held from ``time_s`` on; tags that hold nothing are left out."""

    time_s: float
    total_bytes: int
    by_tag: Mapping[Tag, int]


class Timeline:
    """What was held when.

    Args:
        begin_s, end_s: the stretch of time.
        held: bytes at its beginning.
        changes: since then, in the order in which each tag of each tier changed; sorted by time here.

    Raises:
        AssertionError: a tag would hold less than nothing: the changes are not all, or not in order.
    """

    def __init__(
        self, begin_s: float, end_s: float, held: Mapping[tuple[Tier, Tag], int], changes: Iterable[HeldChange]
    ) -> None:
        self.begin_s = begin_s
        self.end_s = end_s
        self._samples: dict[Tier, list[Sample]] = {}
        for tier in Tier:
            at_first = {tag: held[tier, tag] for tag in Tag if held.get((tier, tag))}
            self._samples[tier] = [Sample(begin_s, sum(at_first.values()), at_first)]
        for time_s, tier, tag, more_bytes in sorted(changes, key=lambda change: change[0]):
            last = self._samples[tier][-1]
            n_bytes = last.by_tag.get(tag, 0) + more_bytes
            if n_bytes < 0:
                raise AssertionError(f"{tier.value}: {tag.value} would hold {n_bytes} bytes at {time_s} s")
            by_tag = {**last.by_tag, tag: n_bytes}
            if not n_bytes:
                del by_tag[tag]
            self._samples[tier].append(Sample(time_s, last.total_bytes + more_bytes, by_tag))

    @property
    def tiers(self) -> list[Tier]:
        """Those that ever held anything."""
        return [tier for tier, samples in self._samples.items() if any(sample.total_bytes for sample in samples)]

    def samples(self, tier: Tier) -> Sequence[Sample]:
        """Every state of a tier, in order of time; the first is that of the beginning."""
        return self._samples[tier]

    def peak(self, tier: Tier) -> Sample:
        """The first sample with the greatest total."""
        return max(self._samples[tier], key=lambda sample: sample.total_bytes)

    def tag_peaks(self, tier: Tier) -> dict[Tag, int]:
        """The most that each tag held; tags that never held anything are left out."""
        found: dict[Tag, int] = {}
        for sample in self._samples[tier]:
            for tag, n_bytes in sample.by_tag.items():
                found[tag] = max(found.get(tag, 0), n_bytes)
        return found

    def mean_bytes(self, tier: Tier) -> float:
        """Mean over time of the total; of a timeline without length, what it holds at its end."""
        samples = self._samples[tier]
        length_s = self.end_s - self.begin_s
        if length_s == 0:
            return float(samples[-1].total_bytes)
        ends_s = [*(sample.time_s for sample in samples[1:]), self.end_s]
        return (
            sum(sample.total_bytes * (end_s - sample.time_s) for sample, end_s in zip(samples, ends_s, strict=True))
            / length_s
        )

    def buckets(self, tier: Tier, n_buckets: int) -> list[Mapping[Tag, int]]:
        """For each of ``n_buckets`` equal parts of the time, the tags of its greatest total: no peak is lost in a
        picture."""
        samples, width_s = self._samples[tier], (self.end_s - self.begin_s) / n_buckets
        times_s = [sample.time_s for sample in samples]
        begins_s = [self.begin_s + bucket * width_s for bucket in range(n_buckets)]
        starts = [*(bisect_left(times_s, begin_s) for begin_s in begins_s), len(samples)]
        found: list[Mapping[Tag, int]] = []
        for begin_s, (start, end) in zip(begins_s, pairwise(starts), strict=True):
            before = samples[bisect_right(times_s, begin_s) - 1]
            found.append(max([*samples[start:end], before], key=lambda sample: sample.total_bytes).by_tag)
        return found
