"""Edits: what is written to the pages of bound parameters, by calls that say so and through views that were given out.

A call that changes a parameter raises the parameter's version, as torch keeps it. A view shares that version, so that
writes through it are noticed when the unit is next looked at. Some functions give memory out through which torch counts
no writes; then it is taken for written at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from offload.parameters.paged_parameter import PagedParameter, Place
from offload.parameters.tensor_functions import no_torch_function
from optim.unit import Slot, Unit
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor


@dataclass(slots=True)
class _Lent:
    """Parameters of a unit of which views are in use, each with its count of writes when the first was given out."""

    versions: dict[Slot, tuple[weakref.ref[PagedParameter], int]] = field(default_factory=dict)

    def __call__(self) -> bool:
        """Whether one was written to."""
        found = False
        for slot, (reference, version) in self.versions.items():
            parameter = reference()
            with no_torch_function():
                if parameter is None or parameter._version != version:
                    slot.edited = found = True
        return found


@dataclass(slots=True)
class _Shown:
    """The bytes of a gathered tensor as they were when memory of it was given out through which torch counts no
    writes."""

    mover: Mover
    tensor: PagedTensor
    digest: int

    @classmethod
    def of(cls, mover: Mover, tensor: PagedTensor) -> _Shown:
        """As they are now."""
        return cls(mover, tensor, cls._digest(mover, tensor))

    def __call__(self) -> bool:
        """Whether they have changed."""
        return self._digest(self.mover, self.tensor) != self.digest

    @staticmethod
    def _digest(mover: Mover, tensor: PagedTensor) -> int:
        with no_torch_function():
            return xxhash.xxh3_64_intdigest(mover.tenants.bytes_of(tensor).numpy().data)


class Edits:
    """Notices edits of one engine's parameters. Training thread only; autograd's in its place.

    Args:
        mover: owner of the arena in which parameters are bound.
    """

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._watched: dict[Unit, dict[Slot, Place]] = {}

    def follow(self, mover: Mover) -> None:
        """Parameters are bound in another mover's arena from now on."""
        self._mover = mover

    def exposes(self, result: Any) -> bool:
        """Whether a result lets its holder write to the pages without our notice."""
        values = result if isinstance(result, (list, tuple)) else (result,)
        return any(
            isinstance(value, Tensor)
            and not isinstance(value, PagedParameter)
            and not value.requires_grad
            and value.layout is torch.strided
            and not torch._C._functorch.is_functorch_wrapped_tensor(value)
            and self._mover.arena.locate(value) is not None
            for value in values
        )

    def check_whole(self, parameter: PagedParameter) -> None:
        """Raise RuntimeError when a call gave a bound parameter other memory or another shape (``t_``, ``set_``, ...);
        its values are as they were."""
        slot = parameter._place.slot
        if (
            parameter.shape != slot.shape
            or not parameter.is_contiguous()
            or (slot.numel and self._mover.arena.locate(parameter) is None)
        ):
            raise RuntimeError(
                f"{slot.name}: a paged parameter keeps its shape and its memory, so it cannot be transposed, resized "
                "or set in place; write values with parameter.copy_(values)"
            )

    def holds(self, parameter: PagedParameter, values: Tensor) -> bool:
        """Whether ``values`` are the parameter's own memory, as it is."""
        place = parameter._place
        if (
            isinstance(values, PagedParameter)
            or values.shape != place.slot.shape
            or values.dtype != place.slot.dtype
            or not values.is_contiguous()
        ):
            return False
        located, tensor = self._mover.arena.locate(values), place.unit.compute
        if located is None or tensor.frame is None:
            return False
        begin = (located[0] - tensor.frame) * self._mover.arena.page_bytes + located[1]
        return begin == place.slot.offset * place.slot.dtype.itemsize

    def changed(self, place: Place) -> None:
        """A bound parameter was written to.

        Raises:
            RuntimeError: ranks have parts of it; what was written is lost.
        """
        if self._mover.gathered.note_write(place.unit.compute):
            self._mover.gathered.refuse_writes()
        place.unit.version += 1
        place.slot.edited = True
        self._mover.touch(place.unit.compute)
        if place.unit.bound is not None:
            place.unit.bound.note_versions()

    def exposed(self, parameter: PagedParameter, *, counted: bool, in_pass: bool) -> None:
        """A view was given out that can be written to.

        Args:
            counted: whether torch counts that as writing to the parameter.
            in_pass: whether it is inside of a forward or backward pass: for kernels, which read.
        """
        place, tensor = parameter._place, parameter._place.unit.compute
        if tensor.id in self._mover.gathered and not counted:
            if not in_pass and tensor.written is None:
                tensor.written = _Shown.of(self._mover, tensor)
        elif counted and not (parameter.requires_grad and tensor.id not in self._mover.gathered):
            # Frozen weights are looked at through views, in each step by some modules, and hardly ever written to.
            lent = tensor.written if isinstance(tensor.written, _Lent) else _Lent()
            lent.versions.setdefault(place.slot, (weakref.ref(parameter), parameter._version))
            tensor.written = lent
        else:
            place.slot.edited = True
            tensor.may_be_aliased = True
            self._mover.touch(tensor)
        if counted:
            if place.seen is None or not place.unit.live_views:
                place.seen = weakref.ref(parameter), parameter._version
                self._watched.setdefault(place.unit, {})[place.slot] = place
        elif not in_pass and tensor.id not in self._mover.gathered:
            place.unit.version += 1  # Writes will go unnoticed.

    def notice(self, unit: Unit) -> None:
        """Count what was written to a unit's parameters through views: when one is saved, so that it is not held
        against it, and asked for again."""
        for place in self._watched.get(unit, {}).values():
            assert place.seen is not None
            reference, version = place.seen
            parameter = reference()
            if parameter is None:
                continue
            with no_torch_function():
                now = parameter._version
            if now != version:
                place.seen = reference, now
                unit.version += 1

    def before_writes(self, parameters: Iterable[PagedParameter]) -> None:
        """Have a commit that waits for the values of parameters get them, where a call may change them or give them
        out."""
        for parameter in parameters:
            tensor = parameter._place.unit.compute
            if tensor.snapshot_pending and not (parameter.requires_grad and torch.is_grad_enabled()):
                self._mover.make_writable(tensor)
