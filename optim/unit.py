"""Units: what is always needed together, and how parameters, gradients and optimizer states lie inside their pages.

A unit's parameters are laid one after another in one flat paged tensor, each beginning at a multiple of
`SLOT_ALIGN_NUMEL` elements; its gradients, when they are paged, in a second one of the same layout. Optimizer states
(and the fp32 master of 16-bit parameters) are cut into slices of whole element ranges of that layout, each a paged
tensor of its own, so that an update streams through a unit of any size with two or three slices in host memory.

Slices begin at multiples of `SLICE_ALIGN_NUMEL` elements: a fused kernel called on the slices of a parameter rounds
exactly as one call on the whole, because only a tensor's last elements miss its vector width.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Final, Protocol

import torch

from optim.sharing import Sharing
from pagemem.process.gone import Gone
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.state_machine import StateMachine

#: Hyper-parameters of one parameter group as they were at one moment.
Hyper = Mapping[str, Any]


class Grad(enum.Enum):
    """What ``parameter.grad`` is in plain PyTorch, and what there is of it here.

    NONE: it is None. HELD: the sum of what arrived, in bytes of ours. OWN: the tensor that the user assigned to it.
    ZEROS: zeros, of which there are no bytes. SPENT: not None, but its bytes were used up by the update that was made
    of it.
    """

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    NONE = "none"
    HELD = "held"
    OWN = "own"
    ZEROS = "zeros"
    SPENT = "spent"


_G = Grad
GRADIENTS: Final = StateMachine(
    "gradient of",
    {
        _G.NONE: {_G.HELD, _G.OWN},
        _G.HELD: {_G.HELD, _G.NONE, _G.OWN, _G.ZEROS, _G.SPENT},
        _G.OWN: {_G.OWN, _G.NONE},
        _G.ZEROS: {_G.ZEROS, _G.HELD, _G.NONE, _G.OWN},
        _G.SPENT: {_G.NONE, _G.OWN, _G.ZEROS},
    },
)


@dataclass(slots=True, eq=False)
class Slot:
    """One parameter's place in its unit, and what is known of its gradient in the step under way.

    Attributes:
        offset: first element in the unit's layout.
        order: place among the model's parameters; norms are combined in this order.
        group: index of the optimizer's parameter group, -1 for a parameter that is not optimized.
        steps: updates made so far.
        lookahead: how far lock-free mode has the parameter ahead of its last update (`optim.rules.Lookahead`).
        arrivals: gradients that autograd delivered in this step; ``expected`` is how many a step with as many backward
            passes as any step before had would deliver; None: not known. ``share``: of these passes, the most that have
            delivered one.
        final: it was said that no gradient comes any more in this step.
        grad: what ``parameter.grad`` is in plain PyTorch. Bytes of an update that is still to be made may be there
            beside it.
        direct: the step's only gradient, flat, held as autograd made it; ``paged`` says that the sum is in pages.
        own: the tensor that the user assigned to ``parameter.grad``, shaped like the parameter.
        generation: how often ``parameter.grad`` has become another tensor.
        norm: 2-norm of the final gradient, once known.
        edited: values may have been put into the parameter, which its fp32 master, if it has one, does not have.
        whole: the parameter that this is a slice of, if it is cut.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int
    order: int = -1
    group: int = -1
    steps: int = 0
    lookahead: tuple[float, ...] = ()
    arrivals: int = 0
    expected: int | None = None
    share: float = 0.0
    final: bool = False
    grad: Grad = Grad.NONE
    direct: torch.Tensor | None = None
    paged: bool = False
    own: torch.Tensor | None = None
    generation: int = 0
    norm: torch.Tensor | None = None
    edited: bool = False
    whole: Whole | None = None

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return self.shape.numel()

    @property
    def end(self) -> int:
        """One past the last element in the unit's layout."""
        return self.offset + self.numel

    @property
    def whole_name(self) -> str:
        """The name of the parameter, or of what it is a slice of."""
        return self.name if self.whole is None else self.name.rpartition("[")[0]

    @property
    def first(self) -> int:
        """Place of its first element in that parameter."""
        if self.whole is None:
            return 0
        before = list(takewhile(lambda slot: slot is not self, (slot for _, slot in self.whole.places)))
        return sum(slot.numel for slot in before)

    @property
    def has_bytes(self) -> bool:
        """Whether there are bytes of a gradient, for an update or to look at."""
        return self.paged or self.direct is not None or self.own is not None

    def become(self, grad: Grad) -> None:
        """Apply one legal move.

        Raises:
            TransitionError: the table has no such move; the state is unchanged.
        """
        self.grad = GRADIENTS.move(self.grad, grad, self.name)

    def forget_gradient(self) -> None:
        """The gradient's bytes are used up or thrown away."""
        self.direct, self.paged, self.norm = None, False, None


@dataclass(slots=True, eq=False)
class Slice:
    """Elements [begin, end) of a unit's layout with the paged tensors of their optimizer states and fp32 master.

    Attributes:
        room_numel: elements that the tensors have room for: as many on every rank; None: as many as there are.
    """

    begin: int
    end: int
    states: PagedTensor | None = None
    master: PagedTensor | None = None
    room_numel: int | None = None

    @property
    def numel(self) -> int:
        """Elements covered, gaps between parameters included."""
        return self.end - self.begin

    @property
    def state_bytes(self) -> int:
        """Of one fp32 state."""
        return (self.numel if self.room_numel is None else self.room_numel) * torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class Pending:
    """An update that the optimizer step decided on and that runs before the unit is next used."""

    hypers: Sequence[Hyper]
    coefficient: torch.Tensor | None


class Bound(Protocol):
    """The parameters of a unit that are views of its pages between uses, too: `optim.exact.bound_unit.BoundUnit`.

    Attributes:
        is_bare: whether torch uses them without asking anybody.
        aliased: whether somebody else has a view of their memory, or autograd has saved one of them.
    """

    is_bare: bool

    @property
    def aliased(self) -> bool:
        """See the class."""

    def written(self) -> list[int]:
        """Numbers of the parameters that were written to since `note_versions`."""

    def count_update(self) -> None:
        """They have been updated, which torch does not count as it does other writes."""

    def note_versions(self) -> None:
        """What was written until now is known."""

    def make_asked(self) -> None:
        """Have every use looked at."""


@dataclass(slots=True, eq=False)
class Unit:
    """Parameters that move together.

    Attributes:
        sharing: how ranks share it; None: there is one rank.
        device: the copy of ``parameters`` that compute uses, where it does not use them in host memory.
        device_resident: whether parameters, masters and states stay in pages of the device and are updated there; if
            not, updates are made in host memory.
        bound: its parameters, where they are bound between uses, too.
        views: weights saved by autograd that may still be asked for.
        version: updates and edits so far; a saved weight of another version must not be used.
        updated: whether the update of the step under way has been made, before the step's end.
        touched: whether whoever trains looks at gradients or changes them, so that updates wait for the optimizer step.
        ended: whether no use of it is expected in the step under way any more: its values may be those of the next one.
        forgotten: whether its pages were given back; nobody can use it any more.
    """

    index: int
    name: str
    dtype: torch.dtype
    parameters: PagedTensor
    slots: list[Slot]
    slices: list[Slice]
    gradients: PagedTensor | None = None
    sharing: Sharing | None = None
    device: PagedTensor | None = None
    device_resident: bool = False
    bound: Bound | None = None
    views: Gone[None] = field(default_factory=Gone)
    version: int = 0
    updated: bool = False
    ended: bool = False
    forgotten: bool = False
    touched: bool = False
    pending: Pending | None = None

    @property
    def live_views(self) -> int:
        """Saved weights that may still be asked for; while there are any, an update must wait."""
        self.views.take()
        return len(self.views)

    @property
    def compute(self) -> PagedTensor:
        """The parameters as compute uses them: gathered, on the device, or in host memory."""
        return (self.sharing and self.sharing.unsharded) or self.device or self.parameters

    @property
    def numel(self) -> int:
        """Elements of the layout."""
        return self.slices[-1].end if self.sharing is None else self.sharing.layout.numel

    @property
    def first(self) -> int:
        """The element of the layout that ``parameters`` begin with."""
        return 0 if self.sharing is None else self.sharing.first

    @property
    def kept_numel(self) -> int:
        """Elements that ``parameters`` have room for."""
        return self.sharing.room_numel if self.sharing is not None and self.sharing.cuts_parameters else self.numel

    @property
    def sums_resident(self) -> bool:
        """Whether paged gradients have pages on the device that are theirs for good."""
        return self.device_resident and self.gradients is not None and self.gradients.resident

    @property
    def trained(self) -> bool:
        """Whether the optimizer has some of its parameters."""
        return any(slot.group >= 0 for slot in self.slots)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all its optimized parameters."""
        return sum(slot.numel * slot.dtype.itemsize for slot in self.slots if slot.group >= 0)


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A parameter whose rows lie in several units, as slices, which are parameters of these.

    Attributes:
        places: unit and slot of each slice, in order.
    """

    places: tuple[tuple[Unit, Slot], ...]
    shape: torch.Size


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one parameter that lies in one slice: elements [begin, end) of the unit's layout."""

    slot: Slot
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Elements of the piece."""
        return self.end - self.begin


@dataclass(slots=True)
class UnitIndex:
    """All units of a model, and their slots in the model's parameter order."""

    units: list[Unit] = field(default_factory=list)

    def slots(self, *, optimized: bool = True) -> list[tuple[Unit, Slot]]:
        """Every optimized parameter with its unit, or every one, in the model's order."""
        found = [(unit, slot) for unit in self.units for slot in unit.slots if slot.group >= 0 or not optimized]
        return sorted(found, key=lambda pair: pair[1].order)


def pieces_of(unit: Unit, part: Slice) -> list[Piece]:
    """Parts of optimized parameters in a slice of which there is a gradient."""
    return [
        Piece(slot, max(slot.offset, part.begin), min(slot.end, part.end))
        for slot in unit.slots
        if slot.group >= 0 and slot.has_bytes and slot.offset < part.end and slot.end > part.begin
    ]
