"""Which units are bound between uses: those that the plan never moves, while nothing unusual happens to them.

They are bound at the end of a step. Whoever looks at one of their parameters in a way that has to be noticed has its
unit looked at again, use by use, until the step's end; commits, changes of the plan and the like let go of all. A unit
of which somebody has an alias keeps its pages until the alias is gone.

    LOOSE --(end of a step)--> BARE --(an early update, a look)--> ASKED --(end of the step)--> BARE
    BARE, ASKED --(let go)--> LOOSE, or ASKED as long as there is an alias
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from offload.binding.bound_parameter import BoundParameter
from offload.parameters.binder import Binder
from offload.parameters.paged_parameter import PagedParameter, Place
from offload.parameters.tensor_functions import SET_DATA, no_torch_function
from optim.exact.bound_unit import BoundUnit
from optim.exact.updater import ExactUpdater
from optim.unit import Unit
from pagemem.frames.page import TensorId
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag

#: Without this count of references nobody could tell that autograd has saved a parameter.
_CAN_COUNT: Final = hasattr(Tensor, "_use_count")


class Bindings:
    """The bound units of one engine. Training thread only; autograd's in its place.

    Attributes:
        saves_plainly: whether autograd may save parameters as they are: every unit is bound, and so much of memory is
            free that none has to be let go of.
    """

    def __init__(self, binder: Binder) -> None:
        self._binder = binder
        self._units: dict[Unit, list[PagedParameter]] = {}
        self._all_units: list[Unit] = []
        self._updater: ExactUpdater | None = None
        self.saves_plainly = False

    def follow(self, model: nn.Module, units: Iterable[Unit], updater: ExactUpdater) -> None:
        """Bind units of ``units`` from now on, those whose parameters are each in the model once."""
        if not _CAN_COUNT:
            return
        self._updater = updater
        updater.bound.confirm = self._binder.confirm_structure
        found: dict[Unit, dict[Any, list[PagedParameter]]] = {}
        for parameter in model.parameters():
            if type(parameter) is PagedParameter:
                place = parameter._place
                found.setdefault(place.unit, {}).setdefault(place.slot, []).append(parameter)
        self._all_units = list(units)
        for unit in self._all_units:
            of_slot = found.get(unit, {})
            if all(len(of_slot.get(slot, ())) == 1 and slot.numel for slot in unit.slots) and unit.device is None:
                self._units[unit] = [of_slot[slot][0] for slot in unit.slots]
        self._binder.driver.follower.rest.let_go = self.let_go

    # ---- binding -----------------------------------------------------------------------------------------------

    def step_ended(self) -> None:
        """Between two steps: bind what stays where it is, and have nobody ask for it any more."""
        driver, updater = self._binder.driver, self._updater
        if not self._units or updater is None or driver.watcher is not None:
            return
        with self._binder.mover.changed:
            residents = driver.follower.resident_tensors()
        with no_torch_function():
            for unit, parameters in self._units.items() if residents else ():
                if unit.bound is None and unit.parameters.id in residents:
                    updater.settle(unit)  # what would be made before the next use, of which nobody is going to tell
                    if self._may_bind(unit, parameters, updater):
                        unit.bound = self._bind(unit, parameters)
                if isinstance(unit.bound, BoundUnit) and not unit.bound.is_bare:
                    self._make_bare(unit, unit.bound, residents, updater)
            self.saves_plainly = bool(residents) and self._is_roomy() and all(map(_is_bare, self._all_units))

    @staticmethod
    def _may_bind(unit: Unit, parameters: list[PagedParameter], updater: ExactUpdater) -> bool:
        loose = all(type(one) is PagedParameter and not one._place.bound for one in parameters)
        return loose and _stays(unit.parameters) and updater.may_bind(unit)

    def _bind(self, unit: Unit, parameters: list[PagedParameter]) -> BoundUnit:
        mover, size = self._binder.mover, unit.dtype.itemsize
        leases = [mover.lease(unit.parameters, slot.offset * size, unit.dtype, slot.numel) for slot in unit.slots]
        for parameter, lease, slot in zip(parameters, leases, unit.slots, strict=True):
            SET_DATA(parameter, lease.view(slot.shape))
            parameter._place.bound += 1
        return BoundUnit(parameters, leases, BoundParameter, PagedParameter)

    def _make_bare(self, unit: Unit, bound: BoundUnit, residents: frozenset[TensorId], updater: ExactUpdater) -> None:
        if not updater.may_bind(unit) or not _stays(unit.parameters):
            return
        self._note_writes(unit, bound)
        bound.note_uses()
        if unit.trained:
            self._binder.mover.touch(unit.parameters)
            states = [tensor for part in unit.slices for tensor in (part.states, part.master) if tensor is not None]
            if all(tensor.id in residents and _stays(tensor) for tensor in states):
                self._admit(unit, bound, updater)
        bound.make_bare()

    def _admit(self, unit: Unit, bound: BoundUnit, updater: ExactUpdater) -> None:
        """Have updates of the unit ask nobody for its pages, where the updater does that."""
        if unit in updater.bound:
            return
        trained = [slot.group >= 0 for slot in unit.slots]
        wanting = [parameter.requires_grad for parameter in bound.parameters]
        places = [parameter._place for parameter in self._units[unit]]
        watched = [(p, place) for p, place, wants in zip(bound.parameters, places, wanting, strict=True) if wants]
        if any(wants and not has for wants, has in zip(wanting, trained, strict=True)):
            return
        if not all(place.gradient.may_divert(parameter) for parameter, place in watched):
            return  # Users have hooks of their own.
        hooks = updater.admit(unit, bound)
        if hooks is None:
            return
        for parameter, place in watched:
            place.gradient.divert(parameter, hooks[unit.slots.index(place.slot)])

        def undo() -> None:
            with no_torch_function():
                for parameter, place in watched:
                    place.gradient.end_diversion(parameter)

        updater.bound.installed(unit, undo)

    def _is_roomy(self) -> bool:
        """Whether everything fits into memory beside what gradients of one unit may take there."""
        mover = self._binder.mover
        frames = sum(tensor.n_frames for tensor in mover.tensors.values() if tensor.tag is not Tag.GRAD)
        return frames + max(unit.parameters.n_frames for unit in self._all_units) <= mover.arena.n_frames

    # ---- looking and letting go ----------------------------------------------------------------------------------

    def look_at(self, parameter: PagedParameter) -> None:
        """Until the step's end, every use of a parameter's unit is looked at."""
        unit = parameter._place.unit
        with no_torch_function():
            if isinstance(unit.bound, BoundUnit):
                unit.bound.make_asked()
                self._note_writes(unit, unit.bound)
            parameter.__class__ = PagedParameter

    def _note_writes(self, unit: Unit, bound: BoundUnit) -> None:
        for number in bound.written():
            place: Place = self._units[unit][number]._place
            self._binder.edits.changed(place)
        bound.note_versions()

    def notice(self, unit: Unit) -> None:
        """Count what was written to the parameters of a unit that nobody asks for."""
        if isinstance(unit.bound, BoundUnit):
            self._note_writes(unit, unit.bound)

    def let_go(self, *, for_good: bool = False) -> None:
        """Bind no unit between uses, until a step's end; but for those of which somebody has an alias.

        Args:
            for_good: also of these; what autograd has saved of them cannot be used any more.
        """
        self.saves_plainly = False
        with no_torch_function(), self._binder.mover.changed:
            for unit, parameters in self._units.items():
                bound = unit.bound
                if not isinstance(bound, BoundUnit):
                    continue
                if self._updater is not None and not for_good:
                    self._updater.bound.leave(unit)
                bound.make_asked()
                self._note_writes(unit, bound)
                if bound.aliased:
                    for parameter in parameters:
                        self._binder.edits.exposed(parameter, counted=True, in_pass=True)
                    if not for_good:
                        continue
                    increment_version(parameters)
                self._unbind(unit, parameters)
            self._binder.mover.collect_leases()

    @staticmethod
    def _unbind(unit: Unit, parameters: list[PagedParameter]) -> None:
        unit.bound = None
        for parameter in parameters:
            place = parameter._place
            place.bound -= 1
            if not place.bound:
                SET_DATA(parameter, place.placeholder)

    def view(self, unit: Unit, offset_bytes: int, dtype: torch.dtype, numel: int) -> Tensor | None:
        """A flat view of a bound unit's memory; None: it is not bound."""
        if not isinstance(unit.bound, BoundUnit):
            return None
        size = unit.dtype.itemsize
        for slot, lease in zip(unit.slots, unit.bound.leases, strict=True):
            if slot.offset * size <= offset_bytes < slot.end * size:
                begin = offset_bytes - slot.offset * size
                return lease.view(torch.uint8)[begin : begin + numel * dtype.itemsize].view(dtype)
        return None

    def disown(self) -> None:
        """In a forked child: every use is looked at, and refused."""
        with no_torch_function():
            for unit in self._units:
                if unit.bound is not None:
                    unit.bound.make_asked()


def _is_bare(unit: Unit) -> bool:
    return unit.bound is not None and unit.bound.is_bare


def _stays(tensor: PagedTensor) -> bool:
    """Whether a tensor is in memory, and nobody waits for what it holds or moves it."""
    return tensor.readable and not tensor.moving and not tensor.snapshot_pending
