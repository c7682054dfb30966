"""Where the parameters of a unit lie, and how its layout is cut into slices of optimizer states. Pure arithmetic; see
`optim.unit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from optim.sharing import Sharing
from optim.unit import Slice
from pagemem.units import ceil_div, round_up

SLOT_ALIGN_NUMEL: Final = 64
SLICE_ALIGN_NUMEL: Final = 1024


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """Where the parameters of a unit lie, before it has any pages."""

    slots: tuple[tuple[str, torch.Size, int], ...]
    numel: int


def lay_out(parameters: Sequence[tuple[str, torch.Size]]) -> UnitLayout:
    """Lay parameters one after another; returns (name, shape, first element) of each and the elements in all."""
    placed: list[tuple[str, torch.Size, int]] = []
    numel = 0
    for name, shape in parameters:
        placed.append((name, shape, numel))
        numel += round_up(max(1, shape.numel()), SLOT_ALIGN_NUMEL)  # An empty parameter has a place, too.
    return UnitLayout(tuple(placed), numel)


def largest_slice(numel: int, slice_numel: int) -> int:
    """Elements of the largest slice that `cut` makes: of the first one."""
    count = max(1, round(numel / slice_numel))
    return min(round_up(ceil_div(numel, count), SLICE_ALIGN_NUMEL), numel)


def cut(numel: int, slice_numel: int) -> list[Slice]:
    """Cut a layout of ``numel`` elements into slices of about equal size, near ``slice_numel`` elements each."""
    step = largest_slice(numel, slice_numel)
    return [Slice(begin, min(begin + step, numel)) for begin in range(0, numel, step)]


def cut_shared(sharing: Sharing, slice_numel: int) -> list[Slice]:
    """Slices of the range that a rank updates: as many, with as much room, on every rank."""
    begin, end = sharing.own
    return [
        Slice(min(begin + part.begin, end), min(begin + part.end, end), room_numel=part.numel)
        for part in cut(sharing.room_numel, slice_numel)
    ]
