"""How lock-free mode divides the RAM budget, and the least that it needs.

Where parameters stay and there is memory beside that, as many units as possible are updated on time, as in exact mode:
their states lie among the schedule's frames, and only the gradients of the others are on their way.

All follows from the sizes of units alone, so that those who ask before there is a model decide as the updater does.

Gradients on their way | the updater's scratch | arena, of which the schedule has the lower frames, for parameters, and
the updater the upper ones, for optimizer states. Where the schedule's frames hold all parameters, they stay in them for
good, and fp32 parameters are their own masters. Otherwise parameters are streamed by plan, and the updater keeps fp32
masters among the states, so that it never waits for what the schedule has in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from optim.lockfree.batch_update import scratch_bytes
from pagemem.errors import BudgetError
from pagemem.units import ceil_div, format_bytes
from scheduler.planning.update_round import least_frames


@dataclass(frozen=True, slots=True)
class UnitSize:
    """What a unit takes.

    Attributes:
        dtype: that it computes in.
        numel: elements of its layout.
        gradient_bytes: of the gradients of all its optimized parameters.
        slice_numels: elements of its slices; none of a unit that is not trained.
    """

    dtype: torch.dtype
    numel: int
    gradient_bytes: int
    slice_numels: Sequence[int]


@dataclass(frozen=True, slots=True)
class Division:
    """How lock-free mode divides the budget.

    Attributes:
        gradient_bytes: for gradients on their way and new parameters on theirs.
        parameter_frames: of the schedule. state_frames: of the updater.
        resident: whether all parameters stay in memory for good.
        on_time: places of the units that are updated on time. direct_bytes: for one of their gradients.
    """

    gradient_bytes: int
    parameter_frames: int
    state_frames: int
    resident: bool
    on_time: frozenset[int] = frozenset()
    direct_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Layout:
    """One of the two ways to use the arena: what it needs of it."""

    resident: bool
    parameter_frames: int
    ring_frames: int
    slice_frames: Sequence[int]

    @property
    def frames(self) -> int:
        return self.parameter_frames + self.ring_frames


class LockFreeBudget:
    """The division of budgets among the units of one model, at one page size.

    Args:
        units: all of the model, of which some are trained.
        n_states: states that the optimizer keeps for each element.
        n_threads: of the updater.
        may_be_on_time: whether units are updated on time where their states fit.

    Attributes:
        gradient_bytes: of the gradients of the whole model. scratch_bytes: what updates need outside of the arena.
    """

    def __init__(
        self,
        units: Iterable[UnitSize],
        n_states: int,
        page_bytes: int,
        n_threads: int,
        *,
        may_be_on_time: bool = True,
    ) -> None:
        units = self._units = list(units)
        self._n_states = n_states
        self._may_be_on_time = may_be_on_time
        self._page_bytes = page_bytes
        gradients = [unit.gradient_bytes for unit in units if unit.slice_numels]
        self.gradient_bytes, self._largest_gradient_bytes = sum(gradients), max(gradients, default=0)
        self._frames = [ceil_div(unit.numel * unit.dtype.itemsize, page_bytes) for unit in units]
        self.scratch_bytes = scratch_bytes((numel for unit in units for numel in unit.slice_numels), n_threads)
        self._layouts = [self._layout(units, n_states, resident=False)]
        if all(unit.dtype is torch.float32 for unit in units if unit.slice_numels):
            self._layouts.insert(0, self._layout(units, n_states, resident=True))

    def _layout(self, units: Sequence[UnitSize], n_states: int, *, resident: bool) -> _Layout:
        sizes = []
        for unit in units:
            for numel in unit.slice_numels:
                states = ceil_div(4 * n_states * numel, self._page_bytes)
                sizes.append(states + (0 if resident else ceil_div(4 * numel, self._page_bytes)))
        largest = max(self._frames)
        # What is looked at on demand has room, too.
        least = (
            sum(self._frames) + max(sizes, default=0) if resident else max(2 * largest, largest + max(sizes, default=0))
        )
        return _Layout(resident, least, least_frames(sizes), sizes)

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that can be divided."""
        frames = min(layout.frames for layout in self._layouts)
        return self.gradient_bytes + self.scratch_bytes + frames * self._page_bytes

    def divide(self, ram_bytes: int, *, eager: bool) -> Division:
        """Divide a budget.

        Args:
            eager: whether updates begin in the backward pass, so that gradients of a step are there once.

        Raises:
            BudgetError: it is too small; names the smallest that works with these pages and slices.
        """
        # With less than one unit more than all gradients, one that arrives while its unit is being updated has to wait.
        # What is handed over at the optimizer step only can be there twice: in the step under way, and on its way from
        # the one before.
        total_bytes, largest_bytes = self.gradient_bytes, self._largest_gradient_bytes
        wanted_bytes = (1 if eager else 2) * total_bytes
        limits = dict.fromkeys(
            (wanted_bytes + 2 * largest_bytes, wanted_bytes + largest_bytes, total_bytes + largest_bytes, total_bytes)
        )
        for layout in self._layouts:
            for gradient_bytes in limits:
                n_frames = max(0, ram_bytes - gradient_bytes - self.scratch_bytes) // self._page_bytes
                if n_frames >= layout.frames:
                    partly = self._partly_on_time(layout, ram_bytes, eager=eager) if layout.resident else None
                    return partly or self._divided(layout, gradient_bytes, n_frames)
        smallest_bytes = self.smallest_bytes
        said = shortfall(ram_bytes, total_bytes, smallest_bytes)
        raise BudgetError(f"{said}; {remedy(smallest_bytes)}", smallest_bytes)

    def _partly_on_time(self, layout: _Layout, ram_bytes: int, *, eager: bool) -> Division | None:
        """The division with the fewest bytes late; None where no unit can be on time."""
        if not self._may_be_on_time:
            return None
        places = [place for place, unit in enumerate(self._units) if unit.slice_numels]
        # The first units of the model are needed first in the next step. But two gradients more than those of all late
        # units are kept room for, so it can be better that none of the largest is among them.
        by_size = sorted(places, key=lambda place: self._units[place].gradient_bytes < self._largest_gradient_bytes)
        found = [self._in_order(layout, ram_bytes, order, eager=eager) for order in (places, by_size)]
        return min((one for one in found if one is not None), key=lambda one: one.gradient_bytes, default=None)

    def _in_order(self, layout: _Layout, ram_bytes: int, order: Sequence[int], *, eager: bool) -> Division | None:
        """As many units as fit are on time, one after the other."""
        late, on_time, found = set(order), set[int](), None
        for place in order:
            division = self._with_on_time(layout, ram_bytes, late - {place}, on_time | {place}, eager=eager)
            if division is not None:
                late, on_time, found = late - {place}, on_time | {place}, division
        return found

    def _with_on_time(
        self, layout: _Layout, ram_bytes: int, late: set[int], on_time: set[int], *, eager: bool
    ) -> Division | None:
        """The division in which some units are late and others on time; None where the budget does not hold it."""
        gradients = [self._units[place].gradient_bytes for place in late]
        gradient_bytes = (1 if eager else 2) * sum(gradients) + 2 * max(gradients, default=0)
        direct_bytes = max(self._units[place].gradient_bytes for place in on_time) if eager else 0
        state_frames = sum(self._state_frames(place) for place in on_time)
        if not eager:  # their gradients wait for the norm in pages
            state_frames += sum(ceil_div(self._units[place].gradient_bytes, self._page_bytes) + 1 for place in on_time)
        numels = [numel for place in late for numel in self._units[place].slice_numels]
        slices = [ceil_div(4 * self._n_states * numel, self._page_bytes) for numel in numels]
        n_frames = max(0, ram_bytes - gradient_bytes - direct_bytes - self.scratch_bytes) // self._page_bytes
        left_frames = n_frames - layout.parameter_frames - state_frames
        if left_frames < least_frames(slices):
            return None
        window_frames = min(sum(slices), left_frames)
        return Division(gradient_bytes, n_frames - window_frames, window_frames, True, frozenset(on_time), direct_bytes)

    def _state_frames(self, place: int) -> int:
        return sum(ceil_div(4 * self._n_states * numel, self._page_bytes) for numel in self._units[place].slice_numels)

    def _divided(self, layout: _Layout, gradient_bytes: int, n_frames: int) -> Division:
        state_frames = n_frames - layout.parameter_frames
        if not layout.resident:
            state_frames = max(layout.ring_frames, n_frames - sum(self._frames) - max(layout.slice_frames, default=0))
        state_frames = min(sum(layout.slice_frames), state_frames)
        return Division(gradient_bytes, n_frames - state_frames, state_frames, layout.resident)


def shortfall(ram_bytes: int, gradient_bytes: int, smallest_bytes: int) -> str:
    """How a budget falls short of lock-free mode's need."""
    return (
        f"memory.ram is {ram_bytes} bytes ({format_bytes(ram_bytes)}), but lock-free updates keep the gradients of the "
        f"whole model in RAM ({format_bytes(gradient_bytes)}) and need {smallest_bytes} bytes "
        f"({format_bytes(smallest_bytes)}) in all"
    )


def remedy(smallest_bytes: int) -> str:
    """What to change then."""
    return f'set memory.ram to at least {smallest_bytes}, or update.mode to "exact"'
