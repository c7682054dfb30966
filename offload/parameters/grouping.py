"""Which parameters share a unit: a module's own of one dtype that are all trained, or all frozen, always do, small
neighbours up to one page.

Asked by the page store, which makes the units, and by those who want to know them before there is a store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from offload.parameters.inner_tensors import is_pageable, is_slice, own_parameters

#: Parameters with their names, which are never split over units.
Group = list[tuple[str, nn.Parameter]]
#: Neighbours are of one dtype, and all trained or all frozen.
_Kind = tuple[torch.dtype, bool]


def own_groups(name: str, module: nn.Module, known: Callable[[nn.Parameter], bool]) -> list[Group]:
    """A module's own parameters that belong into pages, those of one dtype that are trained, or frozen, in order; each
    slice of one that is cut by itself. Of integers and truth values, only quantised ones do.

    Args:
        name: the module's, to begin its parameters' names with.
        known: whether a parameter is in a unit already, or waits for one.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    for key, parameter in own_parameters(module):
        if not known(parameter) and not is_lazy(parameter) and is_pageable(parameter):
            kind = (id(parameter),) if is_slice(parameter) else (parameter.dtype, parameter.requires_grad)
            groups.setdefault(kind, []).append((f"{name}.{key}" if name else key, parameter))
    return list(groups.values())


def groups_of(modules: Iterable[tuple[str, nn.Module]], seen: set[int]) -> list[Group]:
    """The groups of several modules, each parameter once.

    Args:
        seen: ``id`` of parameters that are left out; those found are added.
    """
    found: list[Group] = []
    for name, module in modules:
        groups = own_groups(name, module, lambda parameter: id(parameter) in seen)
        seen.update(id(parameter) for group in groups for _, parameter in group)
        found += groups
    return found


class Neighbours:
    """Parameters of small modules, waiting for others to make a unit with: trained ones for trained ones, and frozen
    ones for frozen ones, whose pages do not change and which have no states.

    Args:
        page_bytes: how large units of several modules become.
    """

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._waiting: dict[_Kind, Group] = {}
        self._ids: set[int] = set()

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._ids

    def take(self, group: Group) -> list[Group]:
        """Let a group wait; returns the units that are complete with it, in order."""
        if is_slice(group[0][1]):
            return [group]  # It waits for nobody: its parameter is to be in pages as a whole.
        kind = (group[0][1].dtype, group[0][1].requires_grad)
        waiting, complete = self._waiting.get(kind, []), []
        if waiting and _n_bytes(waiting) + _n_bytes(group) > self._page_bytes:
            complete += self._complete(kind)
        self._waiting.setdefault(kind, []).extend(group)
        self._ids.update(id(parameter) for _, parameter in group)
        if _n_bytes(self._waiting[kind]) >= self._page_bytes:
            complete += self._complete(kind)
        return complete

    def flush(self) -> list[Group]:
        """The units of what waits, the one that began first; nothing waits any more."""
        return [unit for kind in list(self._waiting) for unit in self._complete(kind)]

    def _complete(self, kind: _Kind) -> list[Group]:
        """One unit, unless some were given another dtype meanwhile."""
        by_dtype: dict[torch.dtype, Group] = {}
        for name, parameter in self._waiting.pop(kind):
            by_dtype.setdefault(parameter.dtype, []).append((name, parameter))
            self._ids.discard(id(parameter))
        return list(by_dtype.values())


def _n_bytes(group: Group) -> int:
    return sum(parameter.numel() * parameter.element_size() for _, parameter in group)


def units_of(groups: Iterable[Group], page_bytes: int) -> list[Group]:
    """The units that groups become, which come in this order."""
    neighbours = Neighbours(page_bytes)
    found: list[Group] = []
    for group in groups:
        found += neighbours.take(group)
    return found + neighbours.flush()


def common_name(names: Sequence[str]) -> str:
    """A short name for neighbours: the only one, their module, or the first and the last."""
    first, last = names[0], names[-1]
    if first == last:
        return first
    owner = first.rpartition(".")[0]
    return owner if owner and owner == last.rpartition(".")[0] else f"{first}..{last}"
