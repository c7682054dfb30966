"""What the planner must know of the memory: frames of each tier, their size, and how fast each lane is. Pure data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from pagemem.tier import Tier
from scheduler.planning.task import Lane

#: Lanes that compute on the processor.
_CORES: Final = frozenset({Lane.COMPUTE, Lane.UPDATE})


@dataclass(frozen=True, slots=True)
class SharedRate:
    """What some lanes move together in a second at most, as reads and writes under ``ssd.limit_mb_per_s``."""

    lanes: frozenset[Lane]
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """The budgets of a plan, and its lanes.

    Attributes:
        page_bytes: of a frame, in every tier.
        n_frames: of each tier that has frames.
        bytes_per_s: of each lane that moves bytes; one that is not named takes no time.
        shared: limits on lanes together; no lane is in two of them.
        together: speed of compute and of updates while both work on the same cores, over that of each alone.
    """

    page_bytes: int
    n_frames: Mapping[Tier, int]
    bytes_per_s: Mapping[Lane, float]
    shared: tuple[SharedRate, ...] = ()
    together: float = 1.0

    def rate(self, lane: Lane) -> float:
        """Bytes a second of a lane while it works alone.

        Raises:
            ValueError: its bandwidth is not above 0.
        """
        bytes_per_s = self.bytes_per_s.get(lane, math.inf)
        for limit in self.shared:
            if lane in limit.lanes:
                bytes_per_s = min(bytes_per_s, limit.bytes_per_s)
        if bytes_per_s <= 0:
            raise ValueError(f"bandwidths must be above 0, not {bytes_per_s} bytes/s of {lane.value}")
        return bytes_per_s

    def seconds(self, lane: Lane, n_bytes: int) -> float:
        """That a lane takes to move so many bytes while it works alone.

        Raises:
            ValueError: its bandwidth is not above 0.
        """
        return n_bytes / self.rate(lane)

    @property
    def slows(self) -> bool:
        """Whether lanes slow each other down."""
        return bool(self.shared) or self.together < 1

    def slowed(self, working: Iterable[Lane]) -> dict[Lane, float]:
        """Of lanes that work at a time those that slow each other down: their rates over what each has alone. A shared
        rate is divided equally, and what one lane cannot use is the others'."""
        found: dict[Lane, float] = {}
        at_work = set(working)
        if self.together < 1 and at_work >= _CORES:
            found = dict.fromkeys(_CORES, self.together)
        for limit in self.shared:
            left_bytes_per_s, sharing = limit.bytes_per_s, sorted(at_work & limit.lanes, key=self.rate)
            for number, lane in enumerate(sharing):
                given = min(self.rate(lane), left_bytes_per_s / (len(sharing) - number))
                left_bytes_per_s -= given
                if given < self.rate(lane):
                    found[lane] = given / self.rate(lane)
        return found


@dataclass(frozen=True, slots=True)
class TierSpec:
    """A machine of one tier above page files: frames, their size, and the page files' bandwidths (bytes/s)."""

    n_frames: int
    page_bytes: int
    read_bytes_per_s: float
    write_bytes_per_s: float

    @property
    def machine(self) -> Machine:
        """The same as a `Machine`."""
        speeds = {Lane.SSD_READ: self.read_bytes_per_s, Lane.SSD_WRITE: self.write_bytes_per_s}
        return Machine(self.page_bytes, {Tier.HOST: self.n_frames}, speeds)


def machine_of(tiers: Machine | TierSpec) -> Machine:
    """A machine, however it was said."""
    return tiers if isinstance(tiers, Machine) else tiers.machine
