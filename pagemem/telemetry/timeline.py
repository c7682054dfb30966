"""Bytes held per tier and tag over a stretch of time, and their peaks. Pure data: no clock, thread or engine.

A timeline is made of what was held at its beginning and of every change since. Invariants
    1. No sample is negative, in any tag.
    2. A sample's total is the sum over its tags.
    3. A tier's peak is the greatest total of its samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pagemem.tier import Tag, Tier


@dataclass(frozen=True, slots=True)
class HeldChange:
    """So many bytes more (or less) are held from ``time_s`` on."""

    time_s: float
    tier: Tier
    tag: Tag
    more_bytes: int


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
        ValueError: the end comes before the beginning, or a change lies outside.
        AssertionError: a tag would hold less than nothing: the changes are not all, or not in order.
    """

    def __init__(
        self, begin_s: float, end_s: float, held: Mapping[tuple[Tier, Tag], int], changes: Iterable[HeldChange]
    ) -> None:
        if end_s < begin_s:
            raise ValueError(f"a timeline cannot end at {end_s} s, before it begins at {begin_s} s")
        self.begin_s = begin_s
        self.end_s = end_s
        self._samples: dict[Tier, list[Sample]] = {}
        for tier in Tier:
            at_first = {tag: held[tier, tag] for tag in Tag if held.get((tier, tag))}
            if any(n_bytes < 0 for n_bytes in at_first.values()):
                raise AssertionError(f"{tier.value}: a timeline begins with less than nothing: {at_first}")
            self._samples[tier] = [Sample(begin_s, sum(at_first.values()), at_first)]
        for change in sorted(changes, key=lambda change: change.time_s):
            self._add(change)

    def _add(self, change: HeldChange) -> None:
        if not self.begin_s <= change.time_s <= self.end_s:
            raise ValueError(f"a change at {change.time_s} s lies outside of {self.begin_s} to {self.end_s} s")
        last = self._samples[change.tier][-1]
        n_bytes = last.by_tag.get(change.tag, 0) + change.more_bytes
        if n_bytes < 0:
            raise AssertionError(
                f"{change.tier.value}: {change.tag.value} would hold {n_bytes} bytes at {change.time_s} s"
            )
        by_tag = {**last.by_tag, change.tag: n_bytes}
        if not n_bytes:
            del by_tag[change.tag]
        self._samples[change.tier].append(Sample(change.time_s, last.total_bytes + change.more_bytes, by_tag))

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
        picture.

        Raises:
            ValueError: there is no bucket.
        """
        if n_buckets < 1:
            raise ValueError(f"n_buckets is {n_buckets}; it must be positive")
        width_s = (self.end_s - self.begin_s) / n_buckets
        found: list[Sample | None] = [None] * n_buckets
        for sample in self._samples[tier]:
            bucket = min(int((sample.time_s - self.begin_s) / width_s), n_buckets - 1) if width_s else 0
            known = found[bucket]
            if known is None or sample.total_bytes > known.total_bytes:
                found[bucket] = sample
        return self._filled(tier, found, width_s)

    def _filled(self, tier: Tier, greatest: Sequence[Sample | None], width_s: float) -> list[Mapping[Tag, int]]:
        """With what was held when each bucket began, where that is more."""
        samples, place = self._samples[tier], 0
        filled: list[Mapping[Tag, int]] = []
        for bucket, own in enumerate(greatest):
            while place + 1 < len(samples) and samples[place + 1].time_s <= self.begin_s + bucket * width_s:
                place += 1
            before = samples[place]
            filled.append((own if own is not None and own.total_bytes >= before.total_bytes else before).by_tag)
        return filled
