"""Tensors that ``state_dict()`` has given out: copies, where plain PyTorch gives the parameters' own memory.

So what is written to one of them would reach the model there, and does not here. That is noticed by torch's count of
writes, also when the tensor is gone by then: ``model.state_dict()[name].copy_(value)``.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Given:
    """A copy: a tensor without memory that shares its count of writes, and the count when it was given out."""

    name: str
    copy: weakref.ref[Tensor]
    counter: Tensor
    version: int


@dataclass(slots=True)
class StateCopies:
    """The copies that may have been written to since the last `check`. Training thread only."""

    _given: list[_Given] = field(default_factory=list)

    def give(self, name: str, copy: Tensor) -> Tensor:
        """Note a copy of the parameter of a name; returns it."""
        if not copy.is_inference():  # Those cannot be written to, and have no count.
            with torch._C.DisableTorchFunctionSubclass():
                counter = copy.detach()
                counter.data = copy.new_empty(0)
            self._given.append(_Given(name, weakref.ref(copy), counter, counter._version))
        return copy

    def forget(self) -> None:
        """The model is given all its values anew, perhaps out of these copies."""
        self._given.clear()

    def check(self) -> None:
        """Forget the copies that nobody has any more.

        Raises:
            RuntimeError: one was written to, which has not changed the model; it is forgotten.
        """
        given, self._given = self._given, []
        self._given = [one for one in given if one.counter._version == one.version and one.copy() is not None]
        for one in given:
            if one.counter._version != one.version:
                raise RuntimeError(
                    f"{one.name}: a tensor of state_dict() was written to, which changes the parameter in plain "
                    "PyTorch, but is a copy here, so the model has its old values; write to the parameter under "
                    "torch.no_grad(), call load_state_dict(), or change a clone"
                )
