"""Where a commit has its parameters: which bytes of which paged tensors, and the names the model has for them.

`Checkpoints` writes it into the manifest, `offload export` reads it, so that weights are found without the model's
code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

import torch
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from torch import Tensor, nn

from optim.unit import Unit
from pagemem.errors import CommitError
from pagemem.folders.small_file import Count, Line, checked
from pagemem.tier import Tag

#: Keys of the manifest's state.
_UNITS, _NAMES = "units", "names"


def _dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError("it is no dtype of torch")
    return name


@dataclass(frozen=True, slots=True)
class StoredSlot:
    """One parameter's place: ``offset`` is its first element in the unit's layout."""

    name: Line
    shape: Annotated[tuple[Count, ...], Field(max_length=64)]
    offset: Count

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One past the last element in the unit's layout."""
        return self.offset + self.numel


@dataclass(frozen=True, slots=True)
class StoredSlice:
    """Elements [begin, end) of a unit's layout, and the key of the stored tensor with their fp32 master, if they have
    one."""

    begin: Count
    end: Count
    master: Line | None

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class StoredUnit:
    """A unit as a commit has it. ``parameters`` is the key of the stored tensor with its values, in ``dtype``."""

    parameters: Line
    dtype: Annotated[Line, AfterValidator(_dtype)]
    slots: tuple[StoredSlot, ...]
    slices: tuple[StoredSlice, ...]

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of its values."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def has_masters(self) -> bool:
        """Whether every element has an fp32 master."""
        return all(part.master is not None for part in self.slices)


@dataclass(frozen=True, slots=True)
class StoredLayout:
    """All units, and for each name in ``model.state_dict()``, in its order, the name under which the commit has the
    tensor.

    The two names differ where several names are of one tensor (tied weights, shared modules): the first of them is
    kept.
    """

    units: tuple[StoredUnit, ...]
    names: dict[str, str]

    def describe(self) -> dict[str, Any]:
        """For the manifest's state."""
        return {_UNITS: [asdict(unit) for unit in self.units], _NAMES: self.names}

    @classmethod
    def read(cls, state: dict[str, Any]) -> StoredLayout:
        """From a manifest's state.

        Raises:
            CommitError: it has none that can be read.
        """
        try:
            return checked(_LAYOUT, {name: state[name] for name in (_UNITS, _NAMES)})
        except (KeyError, ValueError) as error:
            raise CommitError(
                f"the commit does not say where its parameters lie ({type(error).__name__}: {error})"
            ) from error


_LAYOUT: Final = TypeAdapter(StoredLayout)


def layout_of(units: Iterable[Unit], model: nn.Module) -> StoredLayout:
    """The layout of a model whose parameters are in ``units``."""
    return StoredLayout(
        tuple(
            StoredUnit(
                f"{Tag.PARAM.value}: {unit.parameters.name}",
                str(unit.dtype).removeprefix("torch."),
                tuple(StoredSlot(slot.name, tuple(slot.shape), slot.offset) for slot in unit.slots),
                tuple(
                    StoredSlice(
                        part.begin, part.end, None if part.master is None else f"{Tag.MASTER.value}: {part.master.name}"
                    )
                    for part in unit.slices
                ),
            )
            for unit in units
        ),
        names_of(model),
    )


def names_of(model: nn.Module) -> dict[str, str]:
    """Every parameter and persistent buffer by name, in the order of ``model.state_dict()``, and the first name of the
    same tensor."""
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
            if tensor is not None:
                yield f"{prefix}.{key}" if prefix else key, tensor
