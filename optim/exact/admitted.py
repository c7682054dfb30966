"""A bound unit whose updates ask nobody for pages: its parameters, states and masters as an update takes them, and
which of its gradients have arrived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from optim.exact.bound_unit import BoundUnit
from optim.states import state_view
from optim.unit import Grad, Slice, Slot, Unit
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor

_TENSOR: Any = torch.Tensor
#: ``parameter.grad`` as autograd has it.
GET_GRAD: Final = _TENSOR.grad.__get__
SET_GRAD: Final = _TENSOR.grad.__set__
no_torch_function: Final = torch._C.DisableTorchFunctionSubclass


def bytes_of(slot: Slot) -> int:
    """Bytes of a parameter's gradient."""
    return slot.numel * slot.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BoundPiece:
    """Part of a parameter, with its states: elements [begin, end) of it, flat, or all of it in its shape (None)."""

    number: int
    slot: Slot
    parameter: torch.Tensor
    states: list[torch.Tensor]
    master: torch.Tensor | None
    part: tuple[int, int] | None


@dataclass(slots=True, eq=False)
class Admitted:
    """A unit that takes part.

    Attributes:
        awaited: whether each parameter gets a gradient in a step. arrived: whether it has since the last `zero_grad`.
        missing: how many are yet to come.
        n_bytes: of the gradients of a step.
        spent: whether the gradients have been used up, and `zero_grad` has not been called since.
        has_masters: whether updates are made in fp32 masters.
        pieces: by parameter group.
        leases: what keeps the states where they are. n_shares: views of each parameter's memory among the
            pieces.
    """

    unit: Unit
    bound: BoundUnit
    awaited: list[bool]
    n_bytes: int
    has_masters: bool
    pieces: dict[int, list[BoundPiece]]
    leases: list[torch.Tensor]
    n_shares: list[int]
    arrived: list[bool] = field(default_factory=list)
    missing: int = 0
    spent: bool = False

    @classmethod
    def of(cls, mover: Mover, unit: Unit, bound: BoundUnit, n_states: int) -> Admitted:
        """A unit whose gradients are None or used up; its pages count as changed from now on."""
        tensors = [tensor for part in unit.slices for tensor in (part.states, part.master) if tensor is not None]
        leases = [mover.lease(tensor, 0, torch.uint8, tensor.n_bytes) for tensor in tensors]
        pieces: dict[int, list[BoundPiece]] = {}
        with bound.sharing() as shares, no_torch_function(), torch.no_grad():
            for number, slot in enumerate(unit.slots):
                if slot.group >= 0:
                    pieces.setdefault(slot.group, []).extend(_pieces(mover, unit, bound, number, n_states))
        awaited = [slot.group >= 0 and slot.expected == 1 for slot in unit.slots]
        n_bytes = sum(bytes_of(slot) for slot, wanted in zip(unit.slots, awaited, strict=True) if wanted)
        has_masters = any(part.master is not None for part in unit.slices)
        one = cls(unit, bound, awaited, n_bytes, has_masters, pieces, leases, shares)
        one.restart()
        one._take_over_gradients()
        for tensor in (unit.parameters, *tensors):
            mover.touch(tensor)
        return one

    def _take_over_gradients(self) -> None:
        spent = [slot for slot in self.unit.slots if slot.grad is Grad.SPENT]
        for slot in spent:
            slot.become(Grad.NONE)
            slot.generation += 1
        if spent:
            self.arrived, self.missing, self.spent = list(self.awaited), 0, True

    def restart(self) -> None:
        """No gradient has arrived."""
        self.arrived = [False] * len(self.awaited)
        self.missing, self.spent = sum(self.awaited), False

    @property
    def was_edited(self) -> bool:
        """Whether values were put into parameters that their masters do not have."""
        if not self.has_masters:
            return False
        for number in self.bound.written():
            self.unit.slots[number].edited = True
        return any(slot.edited for slot in self.unit.slots)

    @property
    def has_graphs(self) -> bool:
        """Whether a gradient has a graph of its own."""
        gradients = map(GET_GRAD, self.bound.parameters)
        return any(gradient is not None and gradient.requires_grad for gradient in gradients)

    def take(self, number: int) -> torch.Tensor | None:
        """Take a parameter's gradient away from where autograd has put it."""
        with no_torch_function():
            gradient: torch.Tensor | None = GET_GRAD(self.bound.parameters[number])
            SET_GRAD(self.bound.parameters[number], None)
        return gradient

    def note_updated(self) -> None:
        """An update has used the gradients up."""
        for slot, awaited in zip(self.unit.slots, self.awaited, strict=True):
            slot.steps += awaited
            slot.edited = False
        for parameter in self.bound.parameters:
            SET_GRAD(parameter, None)
        self.spent = True
        self.unit.version += 1
        self.unit.updated = self.unit.ended = True
        self.bound.count_update()
        # Until the step's end, whoever uses the parameters would find values that plain PyTorch does not have yet.
        self.bound.make_asked()


def _pieces(mover: Mover, unit: Unit, bound: BoundUnit, number: int, n_states: int) -> Iterator[BoundPiece]:
    slot, parameter = unit.slots[number], bound.parameters[number].detach()
    for part in unit.slices:
        begin, end = max(slot.offset, part.begin), min(slot.end, part.end)
        if begin >= end:
            continue
        whole = end - begin == slot.numel
        cut = None if whole else (begin - slot.offset, end - slot.offset)
        mine = parameter if cut is None else parameter.view(-1)[cut[0] : cut[1]]
        states = [_view(mover, part, part.states, index, begin, mine) for index in range(n_states)]
        master = None if part.master is None else _view(mover, part, part.master, 0, begin, mine)
        yield BoundPiece(number, slot, mine, states, master, cut)


def _view(
    mover: Mover, part: Slice, tensor: PagedTensor | None, index: int, begin: int, like: torch.Tensor
) -> torch.Tensor:
    assert tensor is not None
    return state_view(mover, part, tensor, index, begin, like.numel()).view(like.shape)
