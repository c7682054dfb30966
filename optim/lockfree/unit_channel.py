"""Hand-off between the training thread and the updater: gradients one way, new parameter versions the other.

Each unit has one `UnitChannel`. The training thread puts a `GradientBatch` in, the update thread takes it; whoever has
taken a batch out owns it alone. A batch that was not taken when the next step's gradients are there is taken back, they
are added to it, and it is put in again, so that a unit never has more than one waiting. Putting and taking are single
operations on a deque, which Python makes atomic: no lock is held while either side works on what it owns.

The update thread writes new parameters over the gradients they came from and publishes them as a `Version`, complete,
by assigning one attribute. Step numbers (`optim.lockfree.unit_clock`) tell each side what the other has seen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from optim.lockfree.unit_clock import UnitClock
from optim.unit import Hyper, Slot, Unit

_DROPPED: Final = torch.empty(0)


@dataclass(slots=True, eq=False)
class GradientSum:
    """Gradients of one parameter, added up over one or more steps, and later the parameter's new values in their place.

    Attributes:
        flat: (numel,), in the parameter's dtype; owned by whoever owns the batch. Without elements once it is dropped.
        hypers: hyper-parameters of each step in the sum, oldest first.
        coefficient: factor of the sum that is still to be applied (clipping, loss scale), or None.
        lookahead_steps: how many steps ahead each gradient asks the next parameters to be, summed over these.
    """

    slot: Slot
    flat: Tensor
    hypers: list[Hyper]
    coefficient: Tensor | None = None
    lookahead_steps: int = 0
    _held: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._held = [self.flat.numel() * self.flat.dtype.itemsize]

    def release(self) -> int:
        """The bytes this stands for, to whoever asks first; 0 to others. Both threads may ask: popping is atomic."""
        try:
            return self._held.pop()
        except IndexError:
            return 0

    def drop(self) -> int:
        """Let go of values that are in the parameters in use now; returns the bytes as `release` does. Training
        thread; an updater that took ``flat`` before has it as it was."""
        self.flat = _DROPPED
        return self.release()

    @property
    def is_dropped(self) -> bool:
        """Whether the values are in the parameters in use, and only there. Training thread."""
        return self.flat is _DROPPED

    @property
    def n_steps(self) -> int:
        """Steps in the sum."""
        return len(self.hypers)

    @property
    def mean_lookahead_steps(self) -> float:
        """How many steps ahead of their update the next parameters are to be."""
        return self.lookahead_steps / len(self.hypers)

    def add(self, later: GradientSum) -> None:
        """Add a later step's gradient; that one's memory is free afterwards."""
        if self.flat.dtype is torch.float16 and self.coefficient is not None and later.coefficient is not None:
            self._add_scaled(later, later.coefficient)
        else:
            for part in (self, later):
                if part.coefficient is not None:
                    part.flat.mul_(part.coefficient)
                    part.coefficient = None
            self.flat.add_(later.flat)
        self.hypers += later.hypers
        self.lookahead_steps += later.lookahead_steps

    def _add_scaled(self, later: GradientSum, coefficient: Tensor) -> None:
        """fp16 would lose small gradients scaled back, and could overflow with the sum: half of both, still scaled."""
        assert self.coefficient is not None
        larger = torch.maximum(self.coefficient, coefficient)
        self.flat.mul_(self.coefficient / larger / 2)
        self.flat.add_(later.flat.mul_(coefficient / larger / 2))
        self.coefficient = larger * 2


@dataclass(slots=True, eq=False)
class GradientBatch:
    """A unit's gradients of steps ``first`` to ``last`` by its clock."""

    first: int
    last: int
    sums: dict[Slot, GradientSum]

    def add(self, later: GradientBatch) -> int:
        """Add the gradients of the steps after; returns the bytes that are free afterwards.

        Raises:
            AssertionError: they are not of the step after.
        """
        if later.first != self.last + 1:
            raise AssertionError(
                f"steps {later.first}..{later.last} cannot be added to steps {self.first}..{self.last}"
            )
        freed_bytes = 0
        for slot, addend in later.sums.items():
            kept = self.sums.get(slot)
            if kept is None:
                self.sums[slot] = addend
            else:
                kept.add(addend)
                freed_bytes += addend.release()
        self.last = later.last
        return freed_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """A unit's parameters with the updates up to step ``last``: new values of all that changed since step ``since``."""

    last: int
    since: int
    values: dict[Slot, GradientSum]


@dataclass(slots=True, eq=False)
class UnitChannel:
    """One unit's hand-off. Each method says whose it is.

    Attributes:
        version: the newest published one; assigned by the updater alone.
        missed: steps that the parameters in use miss in the step under way; the training thread's.
        may_miss: whether they may miss any.
        freed_bytes: bytes of versions that a newer one replaced before they were adopted; the training thread collects.
    """

    unit: Unit
    clock: UnitClock = field(default_factory=UnitClock)
    version: Version | None = None
    missed: int = 0
    may_miss: bool = False
    freed_bytes: deque[int] = field(default_factory=deque)
    _waiting: deque[GradientBatch] = field(default_factory=deque)

    # ---- the training thread's side ----------------------------------------------------------------------------

    def put(self, sums: dict[Slot, GradientSum]) -> int:
        """Hand one step's gradients over; returns the bytes that adding them to waiting ones has freed. Training
        thread."""
        step = self.clock.produced + 1
        batch = GradientBatch(step, step, sums)
        freed_bytes = 0
        waiting = self._take()
        if waiting is not None:
            freed_bytes = waiting.add(batch)
            batch = waiting
        self.clock.produce()
        self._waiting.append(batch)
        return freed_bytes

    def unadopted(self) -> Version | None:
        """The newest version, unless its values are in use already. Training thread."""
        version = self.version
        return version if version is not None and version.last > self.clock.adopted else None

    def lookahead_steps(self, hyper: Hyper) -> int:
        """How far ahead the parameters after this step's gradient are to be: as far as it was behind, and a step, where
        it may be behind. Training thread.

        That step is what Nesterov's momentum looks ahead; it also makes up for a step that is missed now and then.
        """
        return self.missed + (self.may_miss and not hyper.get("nesterov", False))

    # ---- the updater's side ------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether gradients wait (they may be taken back for a moment). Updater."""
        return bool(self._waiting)

    def take(self) -> GradientBatch | None:
        """Take the waiting gradients, or None when there are none or the training thread is adding to them. Updater."""
        return self._take()

    def newest_values(self) -> dict[Slot, Tensor]:
        """Values (numel,) newer than those in use, by parameter; what is not among them is in the unit's pages.
        Updater.

        The pages cannot change under the updater: only adopting a version of its own changes them, and there is none
        that is newer than what this returns.
        """
        version = self.version
        if version is None:
            return {}
        # The values first, then the clock: what is adopted and dropped in between is still whole in our hands.
        values = {slot: total.flat for slot, total in version.values.items()}
        if self.clock.adopted >= version.last:
            return {}
        return {slot: flat for slot, flat in values.items() if flat is not _DROPPED}

    def publish(self, batch: GradientBatch) -> None:
        """Make a batch, whose gradients have been turned into new values, the newest version. Updater."""
        before = self.version
        values = dict(batch.sums)
        since = self.clock.adopted
        if before is not None and since < before.last:
            # Not adopted as far as we can know: what it has and we have not stays part of the newest version.
            values = {**before.values, **values}
            self.freed_bytes.append(sum(old.release() for slot, old in before.values.items() if slot in batch.sums))
        self.clock.apply(batch.first, batch.last)
        self.version = Version(batch.last, since, values)

    def _take(self) -> GradientBatch | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None
