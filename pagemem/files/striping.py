"""Which path and which place of its page file each frame has, when one tier is spread over several files.

Pure arithmetic: a repeating pattern from smooth weighted round robin, so that any stretch of frames loads the paths in
proportion to their weights and each file is filled without gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

#: Longest pattern: weights are met to about one part in this many.
MAX_PERIOD: Final = 64


class Striping:
    """Maps a tier's frame to (path, frame of that path's file), one to one and without gaps.

    Args:
        weights: one positive number a path, e.g. bandwidths; only their ratios matter.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not 1 <= len(weights) <= MAX_PERIOD:
            raise ValueError(f"1 to {MAX_PERIOD} paths are supported, not {len(weights)}")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be positive and finite: {list(weights)}")
        self.n_paths = len(weights)
        self.shares = _integer_shares(weights)
        self.pattern = _smooth_round_robin(self.shares)
        self._paths: IntArray = np.array(self.pattern, dtype=np.int64)
        self._shares: IntArray = np.array(self.shares, dtype=np.int64)
        # How many slots of the pattern before this one go to the same path.
        ranks = [self.pattern[:slot].count(path) for slot, path in enumerate(self.pattern)]
        self._ranks: IntArray = np.array(ranks, dtype=np.int64)

    def locate(self, frames: IntArray) -> tuple[IntArray, IntArray]:
        """Path and file frame of each frame; arrays of the same shape."""
        periods, slots = np.divmod(frames, len(self.pattern))
        paths = self._paths[slots]
        return paths, periods * self._shares[paths] + self._ranks[slots]

    def file_frames(self, n_frames: int) -> list[int]:
        """How many frames each path's file holds when the tier holds ``n_frames``."""
        periods, rest = divmod(n_frames, len(self.pattern))
        return [periods * share + self.pattern[:rest].count(path) for path, share in enumerate(self.shares)]


def _integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Slots a path in the shortest pattern that meets the weights best, at least one each."""
    total = sum(weights)

    def rounded(period: int) -> tuple[int, ...]:
        return tuple(max(1, round(weight / total * period)) for weight in weights)

    def worst_error(shares: tuple[int, ...]) -> float:
        # Rounded, so that float noise does not make a longer pattern win against an exact shorter one.
        n_slots = sum(shares)
        return round(max(abs(share / n_slots - w / total) / (w / total) for share, w in zip(shares, weights)), 9)

    return min((rounded(period) for period in range(len(weights), MAX_PERIOD + 1)), key=worst_error)


def _smooth_round_robin(shares: Sequence[int]) -> tuple[int, ...]:
    """Path of each slot of one period: each path gains its share a slot, the richest is served and pays the total."""
    credit = [0] * len(shares)
    pattern: list[int] = []
    for _ in range(sum(shares)):
        credit = [have + share for have, share in zip(credit, shares)]
        chosen = max(range(len(shares)), key=credit.__getitem__)
        credit[chosen] -= sum(shares)
        pattern.append(chosen)
    return tuple(pattern)
