"""What the planner must know of the memory: frames of each tier, their size, and how fast each lane is. Pure data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pagemem.tier import Tier
from scheduler.planning.task import Lane


@dataclass(frozen=True, slots=True)
class Machine:
    """The budgets of a plan, and its lanes.

    Attributes:
        page_bytes: of a frame, in every tier.
        n_frames: of each tier that has frames.
        bytes_per_s: of each lane that moves bytes; one that is not named takes no time.
    """

    page_bytes: int
    n_frames: Mapping[Tier, int]
    bytes_per_s: Mapping[Lane, float]

    def seconds(self, lane: Lane, n_bytes: int) -> float:
        """That a lane takes to move so many bytes.

        Raises:
            ValueError: its bandwidth is not above 0.
        """
        bytes_per_s = self.bytes_per_s.get(lane, math.inf)
        if bytes_per_s <= 0:
            raise ValueError(f"bandwidths must be above 0, not {bytes_per_s} bytes/s of {lane.value}")
        return n_bytes / bytes_per_s


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
