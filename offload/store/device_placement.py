"""Which units are to be device-resident: all of their parameters, masters and states stay in the device's pages and are
updated there.

Nothing of such a unit is copied in a step: not its parameters up, twice where they do not stay from forward to
backward, nor its gradients down, nor its states between RAM and SSD, and the CPU makes no update of it. With AdamW in
fp32 that saves 28 to 36 bytes a parameter and step for 12 bytes of pages. Pages that only keep a parameter from its
forward to its backward save no more than they are. So what is spare on the device goes to resident units first. Pure
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload import knobs
from optim.unit import Unit


@dataclass(frozen=True, slots=True)
class Candidate:
    """A unit's pages.

    Attributes:
        parameter_frames: of its parameters. resident_frames: of everything that would stay, them included; None: it is
            not updated, and only streamed.
    """

    parameter_frames: int
    resident_frames: int | None

    @classmethod
    def of(cls, unit: Unit, *, sums: bool) -> Candidate:
        """A unit that has its states; ``sums``: with room for sums of its gradients."""
        states = [tensor for part in unit.slices for tensor in (part.states, part.master) if tensor is not None]
        resident_frames = (2 if sums else 1) * unit.parameters.n_frames + sum(tensor.n_frames for tensor in states)
        return cls(unit.parameters.n_frames, resident_frames if unit.trained else None)


def choose_resident(units: Sequence[Candidate], n_frames: int) -> list[int]:
    """Indices of the units that have room to stay in ``n_frames`` device frames, in order.

    The first ones come first: in the backward pass they are the last to be updated, and the next forward pass begins
    with them, so that copies of them are the ones that nothing hides. Those that are streamed keep room for
    `knobs.WORKING_UNITS` times the largest of them, or for all of them.
    """
    chosen: list[int] = []
    taken_frames = 0
    largest_first = sorted(range(len(units)), key=lambda index: -units[index].parameter_frames)
    rest_frames = sum(unit.parameter_frames for unit in units)
    gone: set[int] = set()
    for index, unit in enumerate(units):
        if unit.resident_frames is None:
            continue
        others = (units[other].parameter_frames for other in largest_first if other != index and other not in gone)
        largest_frames = next(others, 0)
        working_frames = min(rest_frames - unit.parameter_frames, knobs.WORKING_UNITS * largest_frames)
        if taken_frames + unit.resident_frames + working_frames <= n_frames:
            chosen.append(index)
            gone.add(index)
            taken_frames += unit.resident_frames
            rest_frames -= unit.parameter_frames
    return chosen
