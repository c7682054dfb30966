"""Which parameters share a unit: a module's own of one dtype always do, small neighbours up to one page.

Asked by the page store, which makes the units, and by those who want to know them before there is a store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

#: Parameters with their names, which are never split over units.
Group = list[tuple[str, nn.Parameter]]


def own_groups(name: str, module: nn.Module, known: Callable[[nn.Parameter], bool]) -> list[Group]:
    """A module's own parameters that belong into pages, by dtype, in order. Of integers and truth values, none does.

    Args:
        name: the module's, to begin its parameters' names with.
        known: whether a parameter is in a unit already, or waits for one.
    """
    groups: dict[torch.dtype, Group] = {}
    for key, parameter in module.named_parameters(recurse=False):
        if not known(parameter) and not is_lazy(parameter) and parameter.is_floating_point():
            groups.setdefault(parameter.dtype, []).append((f"{name}.{key}" if name else key, parameter))
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
    """Parameters of small modules, waiting for others to make a unit with.

    Args:
        page_bytes: how large units of several modules become.
    """

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._waiting: Group = []
        self._ids: set[int] = set()
        self._n_bytes = 0

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._ids

    def take(self, group: Group) -> list[Group]:
        """Let a group wait; returns the units that are complete with it, in order."""
        n_bytes = sum(parameter.numel() * parameter.element_size() for _, parameter in group)
        complete = []
        if self._waiting and (
            self._n_bytes + n_bytes > self._page_bytes or self._waiting[0][1].dtype != group[0][1].dtype
        ):
            complete += self.flush()
        self._waiting += group
        self._ids.update(id(parameter) for _, parameter in group)
        self._n_bytes += n_bytes
        if self._n_bytes >= self._page_bytes:
            complete += self.flush()
        return complete

    def flush(self) -> list[Group]:
        """The units of what waits: one, unless some were given another dtype meanwhile; nothing waits any more."""
        waiting: dict[torch.dtype, Group] = {}
        for name, parameter in self._waiting:
            waiting.setdefault(parameter.dtype, []).append((name, parameter))
        self._waiting, self._ids, self._n_bytes = [], set(), 0
        return list(waiting.values())


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
