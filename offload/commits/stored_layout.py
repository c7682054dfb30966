"""Where a commit has its parameters: which bytes of which paged tensors, and the names the model has for them.

`Checkpoints` writes it into the manifest, `offload export` reads it, so that weights are found without the model's
code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from offload.cutting.cut_parameter import CutParameter
from offload.parameters.inner_tensors import is_wrapper
from optim.unit import Slot, Unit
from pagemem.folders.small_file import Count, Line, Record
from pagemem.tier import Tag


def _dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError("it is no dtype of torch")
    return name


class StoredSlot(Record):
    """One parameter's place: ``offset`` is its first element in the unit's layout. A slice of a cut parameter is its
    rows from ``first_row`` on; ``of`` is that one's name."""

    name: Line
    shape: Annotated[tuple[Count, ...], Field(max_length=64)]
    offset: Count
    of: Line | None = None
    first_row: Count = 0

    @property
    def whole(self) -> str:
        """The name that the model has for it, or for what it is a slice of."""
        return self.of or self.name

    @property
    def first(self) -> int:
        """Place of its first element in the parameter of that name."""
        return self.first_row * math.prod(self.shape[1:])

    @property
    def end(self) -> int:
        """One past the last element in the unit's layout."""
        return self.offset + math.prod(self.shape)


class StoredSlice(Record):
    """Elements [begin, end) of a unit's layout, and the keys of the stored tensors with their fp32 master and their
    optimizer states, if they have any: fp32, one state after the other; where there is no such tensor, all are zeros.
    Older commits do not name states."""

    begin: Count
    end: Count
    master: Line | None
    states: Line | None = None


class StoredUnit(Record):
    """A unit as a commit has it. ``parameters`` is the key of the stored tensor with its values, in ``dtype``; where
    ranks share the unit, ``own`` is the range of elements that this one updates, and ``cut`` says that the values are
    of that range only."""

    parameters: Line
    dtype: Annotated[Line, AfterValidator(_dtype)]
    slots: tuple[StoredSlot, ...]
    slices: tuple[StoredSlice, ...]
    own: tuple[Count, Count] | None = None
    cut: bool = False

    @property
    def values(self) -> tuple[int, int]:
        """First element and one past the last of which there are values."""
        end = self.slots[-1].end if self.slots else 0
        return (self.own[0], min(self.own[1], end)) if self.own is not None and self.cut else (0, end)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of its values."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def stored_units(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """Units for the manifest's state, as `StoredUnit` has them."""
    return [
        {
            "parameters": f"{Tag.PARAM.value}: {unit.parameters.name}",
            "dtype": str(unit.dtype).removeprefix("torch."),
            "slots": [_stored_slot(slot) for slot in unit.slots],
            "slices": [
                {
                    "begin": part.begin,
                    "end": part.end,
                    "master": None if part.master is None else f"{Tag.MASTER.value}: {part.master.name}",
                    "states": None if part.states is None else f"{Tag.MOMENT.value}: {part.states.name}",
                }
                for part in unit.slices
            ],
            "own": None if unit.sharing is None else list(unit.sharing.own),
            "cut": unit.sharing is not None and unit.sharing.cuts_parameters,
        }
        for unit in units
    ]


def _stored_slot(slot: Slot) -> dict[str, Any]:
    stored: dict[str, Any] = {"name": slot.name, "shape": list(slot.shape), "offset": slot.offset}
    if slot.whole is not None:
        before = [other.shape[0] for _, other in slot.whole.places]
        place = next(place for place, (_, other) in enumerate(slot.whole.places) if other is slot)
        stored |= {"of": slot.name.rpartition("[")[0], "first_row": sum(before[:place])}
    return stored


def names_of(model: nn.Module) -> dict[str, str]:
    """Every parameter and persistent buffer by name, in the order of ``model.state_dict()``, and the name under which
    the commit has it: the first one of the same tensor (tied weights, shared modules)."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _named_tensors(model)}


def unlike_state_dict(model: nn.Module) -> str | None:
    """What ``model.state_dict()`` has otherwise than its parameters and persistent buffers, in words; None: nothing."""
    ours, shown = dict(_named_tensors(model)), model.state_dict(keep_vars=True)
    for name, value in shown.items():
        if value is not ours.get(name):
            return f"{name} is made by a hook, by get_extra_state() or by another method of the model"
    hidden = next((name for name in ours if name not in shown), None)
    return None if hidden is None else f"{hidden} is left out by a hook or another method of the model"


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept: dict[str, Tensor | None] = dict(module._parameters)
        kept.update(
            (key, buffer) for key, buffer in module._buffers.items() if key not in module._non_persistent_buffers_set
        )
        for key, tensor in kept.items():
            if tensor is not None and (not is_wrapper(tensor) or isinstance(tensor, CutParameter)):
                yield f"{prefix}.{key}" if prefix else key, tensor
