"""Which parameters a budget has cut into slices: those of groups that do not fit, as few and as little as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from offload.cutting.cuttable import fewest_slices
from offload.parameters.grouping import Group
from offload.parameters.inner_tensors import owner_of, slice_name
from optim.layout import SLOT_ALIGN_NUMEL
from pagemem.units import round_up

#: Whether a unit of so many elements of a dtype fits.
Fits = Callable[[int, torch.dtype], bool]


def cuts_of(group: Group, blocks: Mapping[int, int], fits: Fits) -> dict[int, tuple[int, ...]]:
    """Which parameters of a group are cut, by ``id``, and the rows of their slices; the largest first, until the rest
    fits together.

    Args:
        blocks: parameters that can be cut, by ``id``: of how many rows slices are a multiple.
    """
    dtype = group[0][1].dtype
    rest = sum(round_up(max(1, parameter.numel()), SLOT_ALIGN_NUMEL) for _, parameter in group)
    found: dict[int, tuple[int, ...]] = {}
    candidates = [parameter for _, parameter in group if id(parameter) in blocks]
    for parameter in sorted(candidates, key=lambda parameter: -parameter.numel()):
        if fits(rest, dtype):
            break
        row_numel = parameter.numel() // parameter.shape[0]
        rows = fewest_slices(
            parameter.shape[0],
            blocks[id(parameter)],
            lambda n_rows, numel=row_numel: fits(n_rows * numel, dtype),  # type: ignore[misc]
        )
        if len(rows) > 1:
            found[id(parameter)] = rows
            rest -= round_up(parameter.numel(), SLOT_ALIGN_NUMEL)
    return found


def split(
    group: Group,
    cuts: Mapping[int, Sequence[int]],
    slices_of: Callable[[nn.Parameter, Sequence[int]], Iterable[nn.Parameter]],
) -> list[Group]:
    """The groups that a group becomes: each slice is one of its own, and what is not cut stays together.

    Args:
        slices_of: makes slices of so many rows each.
    """
    found: list[Group] = []
    rest: Group = []
    for name, parameter in group:
        if id(parameter) not in cuts:
            if not rest:
                found.append(rest)
            rest.append((name, parameter))
            continue
        begin = 0
        for part in slices_of(parameter, cuts[id(parameter)]):
            found.append([(name + slice_name(begin, begin + part.shape[0]), part)])
            begin += part.shape[0]
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Standin:
    """What is asked of a parameter by those who want to know units before there are any."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool
    _slice_of: nn.Parameter

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize


def standins(parameter: nn.Parameter, rows: Sequence[int]) -> list[nn.Parameter]:
    """Slices that are not made."""
    made: list[Any] = [
        _Standin(torch.Size((n, *parameter.shape[1:])), parameter.dtype, parameter.requires_grad, owner_of(parameter))
        for n in rows
    ]
    return cast("list[nn.Parameter]", made)
