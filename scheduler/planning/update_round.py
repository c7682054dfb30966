"""What the updater of lock-free mode does over and over, beside the steps: a second cyclic sequence of ops. Pure data.

One op of a *round* is the update of one slice of optimizer states. The updater's thread performs them one after
another; their tensors lie in frames of host memory that are the round's alone, above those of the step. Which unit is
next is known at run time only: the one furthest behind, and of several the one that comes first in the round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from scheduler.planning.trace import Trace

#: Where not all slices fit, in one's frames a slice is read, in one's one is updated, and in one's one is written.
WINDOWS: Final = 3


def least_frames(sizes: Sequence[int]) -> int:
    """Frames with which slices of these numbers of frames can stream: all of them, where they are few."""
    return min(sum(sizes), WINDOWS * max(sizes, default=0))


@dataclass(frozen=True, slots=True)
class RoundUnit:
    """A unit that is updated beside the steps.

    Attributes:
        name: for people.
        parameters: what the step's ops use of it.
        ops: of the round, one a slice.
        first_use: op of the step before which its parameters must be young enough. handed_over: op of the step after
            which its gradient is there.
    """

    name: str
    parameters: TensorId
    ops: range
    first_use: int = 0
    handed_over: int = 0


@dataclass(frozen=True, slots=True)
class UpdateRound:
    """The updater's ops, its memory, and what it has to do with the steps.

    Attributes:
        trace: the ops, in lane UPDATE, in the order in which gradients arrive.
        n_bytes: of their tensors.
        first_frame, n_frames: the part of host memory that is the round's.
        units: in the order of their ops.
        max_staleness: steps that parameters in use may miss.
    """

    trace: Trace
    n_bytes: Mapping[TensorId, int]
    first_frame: FrameId
    n_frames: int
    units: tuple[RoundUnit, ...]
    max_staleness: int = 0


def furthest_behind(behind: Iterable[tuple[int, int]], after: int, n_units: int) -> int | None:
    """The unit to be served next.

    Args:
        behind: units with work, and the steps that each is behind.
        after: the unit served last. n_units: of the round.

    Returns:
        Of those furthest behind the one that comes first after it in the round; None: there is none.
    """
    ranked = ((-steps, (unit - after - 1) % n_units, unit) for unit, steps in behind)
    return min(ranked, default=(0, 0, None))[2]
