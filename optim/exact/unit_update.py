"""The update of one unit in its pages: slice by slice, each slice an op of the step.

Device-resident units are updated on the device, by kernels that run in order with those that compute. Others may be
updated by a worker, beside compute (`scheduler.tiers.update_lane`): what it needs is taken down when the op begins, and
what is known of the unit from then on is what it will be once the update is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from optim.exact.gradient_store import Changed, GradientStore
from optim.rules import Batch, UpdateRule
from optim.states import StateAccess, state_view
from optim.unit import Grad, Hyper, Pending, Piece, Slice, Slot, Unit, pieces_of
from pagemem.telemetry.events import Event, EventKind, EventSink
from scheduler.execution.driver import Driver
from scheduler.planning.task import TaskKind
from scheduler.planning.trace import Access, AccessMode, OpKind


@dataclass(frozen=True, slots=True)
class SliceUpdate:
    """The update of one slice, as it is decided on: what the training thread may change later is taken down.

    Attributes:
        groups: of each parameter group its hyper-parameters, and its pieces, each with its flat gradient (None: it is
            in the unit's paged sums) and the updates made so far.
        coefficient: what gradients are multiplied by. last: whether it is the unit's last slice.
    """

    unit: Unit
    part: Slice
    groups: list[tuple[Hyper, list[tuple[Piece, torch.Tensor | None, int]]]]
    coefficient: torch.Tensor | None
    last: bool

    @classmethod
    def of(cls, unit: Unit, part: Slice, pieces: Sequence[Piece], pending: Pending, *, last: bool) -> SliceUpdate:
        """Of the gradients that there are now."""
        groups = []
        for group, hyper in enumerate(pending.hypers):
            chosen = [(piece, _flat(piece.slot), piece.slot.steps) for piece in pieces if piece.slot.group == group]
            if chosen:
                groups.append((hyper, chosen))
        return cls(unit, part, groups, pending.coefficient, last)


def _flat(slot: Slot) -> torch.Tensor | None:
    """A parameter's gradient that is not in pages."""
    return slot.own.reshape(-1) if slot.own is not None else slot.direct


class UnitUpdate:
    """Updates units with the gradients in a store.

    Args:
        driver: gives pages.
        rule: what an update does.
        updated: told of each unit whose parameters were updated.
        changed: told of tensors in host memory that an op has changed, once it is over.
    """

    def __init__(
        self,
        driver: Driver,
        rule: UpdateRule,
        store: GradientStore,
        sink: EventSink,
        updated: Callable[[Unit], None],
        changed: Changed,
    ) -> None:
        self._driver = driver
        self._rule = rule
        self._store = store
        self._sink = sink
        self._updated = updated
        self._changed = changed
        self._states = StateAccess(driver, rule.state_names)
        self._torn: Unit | None = None
        self._cut_off: Unit | None = None  # by the worker

    def check_whole(self) -> None:
        """Raise where an update was cut off (Ctrl-C, a disk that failed), so that part of its unit has it and part has
        not."""
        torn = self._torn or self._cut_off
        if torn is not None:
            raise RuntimeError(
                f"the update of {torn.name} was cut off half-way by an error before; go on from the last commit"
            )

    @contextmanager
    def whole(self, unit: Unit) -> Iterator[None]:
        """In the block a unit is updated, perhaps with others; what cuts it off leaves the unit torn."""
        self._torn = unit
        yield
        self._torn = None

    def run(self, unit: Unit, pending: Pending, *, spent: Sequence[Slot], beside: bool = True) -> None:
        """Update a unit with the gradients of which there are bytes; those of ``spent`` are used up by it.

        Args:
            beside: whether a worker may make it, if there is one: not so where somebody sees what it changes.
        """
        if unit.bound is not None:
            for number in unit.bound.written():
                unit.slots[number].edited = True
        self._states.follow_edits(unit)
        used = [slot for slot in unit.slots if slot.group >= 0 and slot.has_bytes]
        if pending.coefficient is not None and len(spent) < len(used):
            # Whoever looks at them later, or has more added to them, is to find them clipped.
            self._store.scale(unit, used, pending.coefficient)
            pending = Pending(pending.hypers, None)
        parts = [(number, part, pieces_of(unit, part)) for number, part in enumerate(unit.slices)]
        # Every rank makes the ops of all slices, whatever it has of them.
        parts = [entry for entry in parts if entry[2] or unit.sharing is not None]
        for number, part, pieces in parts:
            last = part is parts[-1][1]
            work = SliceUpdate.of(unit, part, pieces, pending, last=last)
            self._run_slice(number, work, spent, beside=beside)
        for slot in used:
            slot.steps += 1
            slot.norm = None
        unit.version += 1
        if unit.bound is not None:
            unit.bound.count_update()
        unit.pending = self._torn = None
        self._store.forget(unit, spent, consumed=True)
        if unit.sharing is not None and not unit.sharing.cuts_parameters and len(unit.sharing.layout.ranges) > 1:
            self._fill(unit)
        for slot in spent:
            if slot.grad is Grad.HELD:
                slot.become(Grad.SPENT)
        self._updated(unit)

    def _fill(self, unit: Unit) -> None:
        """Have the parts come that other ranks have updated."""
        assert unit.sharing is not None
        access = Access(unit.parameters.id, AccessMode.MODIFY, via=TaskKind.FILL)
        with self._driver.op((OpKind.UPDATE, (unit.index, "fill")), unit.name, [access]):
            self._driver.memories.fill(unit.parameters, unit.sharing.layout)

    def _run_slice(self, number: int, one: SliceUpdate, spent: Sequence[Slot], *, beside: bool) -> None:
        unit, part = one.unit, one.part
        accesses = [Access(unit.parameters.id, AccessMode.MODIFY)]
        accesses += [Access(t.id, AccessMode.MODIFY) for t in (part.states, part.master) if t is not None]
        accesses += self._paged_sums(unit, spent if one.last else ())
        key, name = (OpKind.UPDATE, (unit.index, number)), f"update of {unit.name}"

        def begun() -> None:
            self._torn = unit

        self._driver.updates.perform(key, name, accesses, partial(self._make, one), begun, beside=beside)
        if not unit.device_resident:
            changed = (unit.parameters if one.last else None, part.states, part.master)
            self._driver.updates.when_made(partial(self._changed, [t for t in changed if t is not None]))

    def _make(self, one: SliceUpdate) -> None:
        """Update a slice whose pages are held. Training thread, or the worker."""
        started_s = time.perf_counter()
        try:
            self._apply(one)
        except BaseException:
            self._cut_off = one.unit
            raise
        spent_s, n_bytes = time.perf_counter() - started_s, one.part.numel * one.unit.dtype.itemsize
        self._sink.emit(Event(EventKind.UPDATE, one.unit.name, n_bytes, started_s, spent_s))

    def _paged_sums(self, unit: Unit, spent: Sequence[Slot]) -> list[Access]:
        """What an update needs of the unit's paged gradients, of which those of ``spent`` are of no use after it."""
        if unit.sharing is not None:
            assert unit.sharing.sums is not None
            return [Access(unit.sharing.sums.id, AccessMode.CONSUME if spent else AccessMode.READ)]
        paged = [slot for slot in unit.slots if slot.paged]
        if unit.gradients is None or not any(slot.group >= 0 for slot in paged):
            return []
        ends = not unit.sums_resident and all(slot in spent for slot in paged)
        return [Access(unit.gradients.id, AccessMode.CONSUME if ends else AccessMode.READ)]

    def _apply(self, one: SliceUpdate) -> None:
        unit, part = one.unit, one.part
        mover = self._driver.mover_of(unit.parameters)
        for hyper, chosen in one.groups:
            batch = Batch([], [], [[] for _ in self._rule.state_names], [])
            narrow = []
            for piece, direct, steps in chosen:
                parameter = mover.tenants.view(unit.parameters, unit.dtype, piece.begin - unit.first, piece.numel)
                gradient = self._gradient(unit, piece, direct).to(parameter.device)
                if part.master is not None:
                    master = state_view(mover, part, part.master, 0, piece.begin, piece.numel)
                    narrow.append((parameter, master))
                    parameter, gradient = master, gradient.float()
                if one.coefficient is not None:
                    # Sums that later slices need, too, may be on their way to the page files: what they hold must not
                    # change.
                    kept = direct is None and not (one.last or unit.sums_resident)
                    gradient = gradient * one.coefficient if kept else gradient.mul_(one.coefficient)
                batch.params.append(parameter)
                batch.grads.append(gradient)
                batch.steps.append(steps)
                for number, states in enumerate(batch.states):
                    assert part.states is not None
                    states.append(state_view(mover, part, part.states, number, piece.begin, piece.numel))
            self._rule.apply(hyper, batch)
            for parameter, master in narrow:
                parameter.copy_(master)

    def _gradient(self, unit: Unit, piece: Piece, direct: torch.Tensor | None) -> torch.Tensor:
        if direct is None:
            return self._store.piece(unit, piece)
        begin = piece.begin - piece.slot.offset
        return direct[begin : begin + piece.numel]
