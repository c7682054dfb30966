"""Bound units: parameters that are views of their unit's pages between uses, too, as the plan never moves these.

Torch then computes with them as with ordinary parameters, and nobody of ours is asked. What somebody else has of their
memory is told by reference counts: of the storage, which views share, and of each parameter, which autograd saves as it
is. Writes are told by torch's count of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.autograd.graph import increment_version

#: A hook for `torch.Tensor.register_post_accumulate_grad_hook`.
Hook = Callable[[Any], None]

_no_torch_function: Final = torch._C.DisableTorchFunctionSubclass


class BoundUnit:
    """The parameters of one bound unit. Training thread, or autograd's in its place.

    Args:
        parameters: of every slot, in order.
        leases: the memory of each, flat, which its parameter is a view of already.
        bare: class of parameters that torch uses without asking; ``asked``: of those whose every use is looked at.

    Attributes:
        is_bare: whether the parameters are of class ``bare`` now.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], leases: Sequence[torch.Tensor], bare: type[nn.Parameter],
        asked: type[nn.Parameter],
    ) -> None:  # fmt: skip
        self.parameters: list[Any] = list(parameters)
        self.leases = list(leases)
        self.is_bare = False
        self._bare, self._asked = bare, asked
        self._storages: list[Any] = [lease.untyped_storage()._cdata for lease in leases]
        self._own_shares = self._shares()
        self.note_uses()
        self.note_versions()

    def _shares(self) -> list[int]:
        return [torch._C._storage_Use_Count(storage) for storage in self._storages]

    def note_uses(self) -> None:
        """Whether parameters require gradients may have changed."""
        # A graph's end node has a parameter that requires one, beside the parameter's own Python object.
        self._own_uses = [2 if parameter.requires_grad else 1 for parameter in self.parameters]

    @contextmanager
    def sharing(self) -> Iterator[list[int]]:
        """Views of the memory that are made in the block are nobody else's; yields how many of each parameter, once it
        has ended."""
        found: list[int] = []
        before = self._shares()
        yield found
        found += [now - then for now, then in zip(self._shares(), before, strict=True)]
        self._own_shares = [own + more for own, more in zip(self._own_shares, found, strict=True)]

    def end_sharing(self, n_shares: Sequence[int]) -> None:
        """So many of them are given up."""
        self._own_shares = [own - fewer for own, fewer in zip(self._own_shares, n_shares, strict=True)]

    @property
    def aliased(self) -> bool:
        """Whether somebody else has a view of the memory, or autograd has saved a parameter."""
        if any(map(operator.gt, self._shares(), self._own_shares)):
            return True
        with _no_torch_function():
            return any(p._use_count() > own for p, own in zip(self.parameters, self._own_uses, strict=True))

    def note_versions(self) -> None:
        """What was written until now is known."""
        with _no_torch_function():
            self._versions = [parameter._version for parameter in self.parameters]

    def written(self) -> list[int]:
        """Numbers of the parameters that were written to since `note_versions`."""
        with _no_torch_function():
            pairs = zip(self.parameters, self._versions, strict=True)
            return [number for number, (parameter, version) in enumerate(pairs) if parameter._version != version]

    def count_update(self) -> None:
        """The parameters have been updated, which torch's kernels of lists do not count: what autograd has saved of
        them must not be used."""
        with _no_torch_function():
            increment_version(self.parameters)
        self.note_versions()

    def make_bare(self) -> None:
        """Have torch use the parameters without asking."""
        for parameter in self.parameters:
            parameter.__class__ = self._bare
        self.is_bare = True

    def make_asked(self) -> None:
        """Have every use looked at."""
        self.is_bare = False
        for parameter in self.parameters:
            parameter.__class__ = self._asked
