"""Exact updates: the same bits as plain PyTorch, made as early as that allows.

A unit is updated when its last gradient of the step has arrived, which the steps before foretell (`eager`), or,
with clipping or ``start="step"``, after the optimizer step and before the unit is next used (`pending`). What that
means for those who look at gradients is in `optim.gradient_holder`. Everything runs on the training thread: on a
machine whose cores are all computing, a second thread for updates takes cores from the matrix products (see
docs/exact_updates.md). Units that are at home on a device are updated there, by kernels that the device gets in order
with those that compute.

Per unit and step:   waiting --gradients--> updated --optimizer step--> waiting           (eager)
                     waiting --gradients, optimizer step--> pending --use--> waiting      (otherwise)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar, Literal

import torch

from optim.clip import check_finite, gradient_norm, total_norm
from optim.exact.gradient_store import GradientStore
from optim.gradient_holder import GradientHolder
from optim.loss_scale import Scaling
from optim.rules import Batch, UpdateRule
from optim.states import StateAccess, state_view
from optim.unit import Grad, Hyper, Pending, Piece, Slice, Slot, Unit, UnitIndex, complete, pieces_of
from pagemem.telemetry.events import Event, EventKind, EventSink
from scheduler.execution.driver import Driver
from scheduler.planning.trace import Access, AccessMode, OpKind

Start = Literal["auto", "step"]


def is_eager(scaling: Scaling, start: Start) -> bool:
    """Whether units are updated during the backward pass, as soon as their gradients are complete."""
    return start == "auto" and not scaling.needs_norm


class ExactUpdater(GradientHolder):
    """Takes gradients and applies updates to the units of one model. Training thread only.

    Args:
        driver: gives host pages and keeps the trace; units that are at home on a device have a driver of their own.
        index: the model's units.
        rule: what an update does.
        hypers: current hyper-parameters of all groups, asked for whenever an update is decided on.
        store: keeps gradients.
        scaling: clipping and loss scaling.
        start: "auto" updates a unit as soon as its gradients are complete, "step" after the optimizer step.
        updated: told of each unit whose parameters were updated.
    """

    #: Gradients of parameters that are not optimized are kept in pages, too.
    keeps_unoptimized: ClassVar[bool] = True

    def __init__(
        self,
        driver: Driver,
        index: UnitIndex,
        rule: UpdateRule,
        hypers: Callable[[], Sequence[Hyper]],
        store: GradientStore,
        sink: EventSink,
        *,
        scaling: Scaling,
        start: Start,
        updated: Callable[[Unit], None] = lambda unit: None,
    ) -> None:
        super().__init__(driver, index, hypers)
        self._rule = rule
        self._store = store
        self._updated = updated
        self._states = StateAccess(driver, rule.state_names)
        self._sink = sink
        self._scaling = scaling
        self._eager = is_eager(scaling, start)
        self._every_slot = index.slots(optimized=False)
        self._torn: Unit | None = None
        self.staleness = self.dropped_gradients = self.state_frames = 0
        self.dropped_steps = 0

    # ---- gradients ---------------------------------------------------------------------------------------------

    def gradient(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        """Take one gradient from autograd; updates the unit when it was the last one it waited for.

        Raises:
            StaleGradientError: the gradient that it is to be added to has been used up; it is lost, nothing else is.
        """
        self.before_use(unit)
        if not self._arrives(unit, slot, gradient):
            return
        final = slot.final or (self._foretold and slot.arrivals == slot.expected)

        def note_norm(flat: torch.Tensor) -> None:
            slot.norm = gradient_norm(flat) if final and self._scaling.needs_norm else None

        if not (final and self.uses_as_it_is(unit, slot) and self._store.keep(unit, slot, gradient)):
            self._store.add(unit, slot, gradient, note_norm)
        slot.become(Grad.HELD)
        self._complete(unit)

    def _complete(self, unit: Unit) -> None:
        if self._eager and complete(unit, foretold=self._foretold) and not self._viewed(unit):
            hypers = self._hypers()
            self._used_hypers = self._used_hypers or hypers
            used = [slot for slot in unit.slots if slot.group >= 0 and slot.grad is Grad.HELD]
            self._run(unit, Pending(hypers, None), spent=used)
            unit.updated = unit.ended = True

    def _viewed(self, unit: Unit) -> bool:
        """Whether somebody has a view of what an update would change: the backward pass may ask for it again."""
        if unit.device is not None and unit.home is None:
            return False  # Compute has a copy, which is not changed.
        return (unit.home or self._driver).viewed(unit.compute)

    def uses_as_it_is(self, unit: Unit, slot: Slot) -> bool:
        """Whether a gradient that comes now is to be the parameter's only one of the step, and used as autograd made
        it."""
        alone = slot.final or (self._foretold and slot.expected == 1)
        return self._eager and alone and slot.group >= 0 and not unit.touched and not slot.has_bytes

    def _forget(self, unit: Unit, slots: Sequence[Slot]) -> None:
        # What only a first step leaves to be cleared is not part of the plan of later ones.
        once = self._eager and not unit.touched and not any(slot.arrivals for slot in slots)
        with self._driver.untraced() if once else nullcontext():
            self._store.forget(unit, slots)

    def _settled(self, unit: Unit) -> None:
        self.before_use(unit)

    def _make_zeros(self, unit: Unit, slot: Slot) -> None:
        self._store.add(unit, slot, torch.zeros(slot.shape, dtype=slot.dtype), lambda flat: None)
        slot.become(Grad.HELD)

    @contextmanager
    def _bytes(self, unit: Unit, slot: Slot) -> Iterator[torch.Tensor]:
        if slot.direct is not None:
            yield slot.direct
            return
        with self._store.used(unit, slot) as flat:
            yield flat

    # ---- the optimizer step ------------------------------------------------------------------------------------

    def step(self) -> None:
        """End the step: decide on the updates not yet made. They run now, or before their unit is next used.

        With loss scaling, a step whose gradients are not finite is dropped whole. Gradients stay what they are,
        clipped, until they are cleared, but for those that updates have used up already.

        Raises:
            RuntimeError: hyper-parameters changed after updates of this step had used them, or gradients that were used
                up have not been cleared.
            NonFiniteError: without loss scaling, the gradients' norm is not finite; no parameter was changed and the
                gradients are dropped.
        """
        self._check_whole()
        hypers = self._check_hypers()
        self._check_cleared()
        for unit in self._index.units:
            if unit.pending is not None and any(slot.grad is not Grad.NONE for slot in unit.slots):
                self.before_use(unit)  # What was not cleared is used again.
        for unit, slot in self._slots:
            if slot.grad is Grad.ZEROS:
                self._make_zeros(unit, slot)
        waiting = [
            u for u in self._index.units if any(s.group >= 0 and s.grad in (Grad.HELD, Grad.OWN) for s in u.slots)
        ]
        coefficient = self._coefficient() if self._scaling.needs_norm else None
        dropped = self._scaling.needs_norm and waiting and coefficient is None
        self.dropped_steps += bool(dropped)
        pending = Pending(hypers, coefficient)
        for unit in waiting if not dropped else ():
            if any(slot.own is not None for slot in unit.slots) or self._viewed(unit):
                self._run(
                    unit, pending, spent=()
                )  # now, while the user's tensors are what they are, and for views to show it
            elif self._eager and not unit.touched:
                # Whether gradients are looked at after the step, the first one shows.
                self._run(
                    unit,
                    pending,
                    spent=[slot for slot in unit.slots if slot.group >= 0 and slot.has_bytes] if self._foretold else (),
                )
            else:
                unit.pending = pending
        repeatable = self._foretold
        self._end_arrivals()
        self._driver.end_step(repeatable=repeatable)

    def abandon(self) -> None:
        """As `GradientHolder.abandon`.

        Raises:
            RuntimeError: an update was cut off half-way.
        """
        self._check_whole()
        super().abandon()

    def _coefficient(self) -> torch.Tensor | None:
        """What this step's gradients are multiplied by; None when there are none, or they overflowed under loss
        scaling."""
        others = self.other_gradients()
        norms = [(order, torch.linalg.vector_norm(other)) for order, other in others]
        for unit, slot in self._every_slot:
            norm = self._norm(unit, slot)
            if norm is not None:
                norms.append((slot.order, norm))
        if not norms:
            return None
        total = total_norm([norm for _, norm in sorted(norms, key=lambda pair: pair[0])])
        self.grad_norm = self._scaling.unscaled(total)
        if self._scaling.loss_scale is None:
            try:
                check_finite(total)
            except BaseException:
                self.clear()
                raise
        coefficient = self._scaling.coefficient(total)
        if coefficient is not None:
            for _, other in others:
                other.mul_(coefficient.to(other.device))
            for unit, slot in self._every_slot:
                if slot.group < 0 and slot.grad in (Grad.HELD, Grad.OWN):
                    self._scale(unit, [slot], coefficient)
        return coefficient

    def _norm(self, unit: Unit, slot: Slot) -> torch.Tensor | None:
        """Of a gradient as it is now; None: there is none."""
        if slot.grad is Grad.ZEROS:
            return torch.zeros(())
        if slot.own is not None:
            return gradient_norm(slot.own.reshape(-1))
        if slot.grad is Grad.HELD and slot.norm is None:
            with self._bytes(unit, slot) as flat:
                slot.norm = gradient_norm(flat)
        return slot.norm if slot.grad is Grad.HELD else None

    def _scale(self, unit: Unit, slots: Sequence[Slot], coefficient: torch.Tensor) -> None:
        """Multiply gradients in place."""
        for slot in slots:
            if slot.own is not None:
                slot.own.mul_(coefficient.to(slot.own.device))
                continue
            with self._bytes(unit, slot) as flat:
                flat.mul_(coefficient.to(flat.device))
            slot.norm = None

    # ---- updates -----------------------------------------------------------------------------------------------

    def before_use(self, unit: Unit) -> None:
        """Make the update that the last optimizer step decided on, if there is one."""
        if unit.pending is not None:
            self._check_whole()
            cleared = [slot for slot in unit.slots if slot.has_bytes and slot.grad in (Grad.NONE, Grad.ZEROS)]
            self._run(unit, unit.pending, spent=cleared)

    def _check_whole(self) -> None:
        """Raise where an update was cut off (Ctrl-C, a disk that failed) so that part of its unit has it and part has
        not."""
        if self._torn is not None:
            raise RuntimeError(
                f"the update of {self._torn.name} was cut off half-way by an error before; go on from the last commit"
            )

    def settle(self, unit: Unit) -> None:
        """Before a use outside the step: as before any other."""
        self.before_use(unit)

    def drain(self) -> None:
        """Make every update that was decided on."""
        for unit in self._index.units:
            self.before_use(unit)

    @contextmanager
    def consistent(self, *, whole: bool) -> Iterator[None]:
        """Between two steps: inside the block every update of the steps made is in parameters and states."""
        self._check_whole()
        self._check_between_steps()
        self.drain()
        yield

    def close(self) -> None:
        """Give the gradients' memory back. Idempotent."""
        self._store.close()

    @property
    def direct_bytes(self) -> int:
        """Bytes of gradients outside the host arena now."""
        return self._store.direct_bytes

    @property
    def peak_direct_bytes(self) -> int:
        """Most of them at any time."""
        return self._store.peak_direct_bytes

    def _run(self, unit: Unit, pending: Pending, *, spent: Sequence[Slot]) -> None:
        """Update a unit with the gradients of which there are bytes; those of ``spent`` are given up with it."""
        self._states.follow_edits(unit)
        used = [slot for slot in unit.slots if slot.group >= 0 and slot.has_bytes]
        if pending.coefficient is not None and len(spent) < len(used):
            # Whoever looks at them later, or has more added to them, is to find them clipped.
            self._scale(unit, used, pending.coefficient)
            pending = Pending(pending.hypers, None)
        parts = [(number, part, pieces_of(unit, part)) for number, part in enumerate(unit.slices)]
        parts = [entry for entry in parts if entry[2]]
        for number, part, pieces in parts:
            last = part is parts[-1][1]
            sums = self._paged_sums(unit, spent if last else ())
            accesses = [Access(unit.parameters.id, AccessMode.MODIFY)]
            accesses += [Access(t.id, AccessMode.MODIFY) for t in (part.states, part.master) if t is not None]
            here = unit.home is None or unit.sums_at_home
            accesses += sums if here else []
            with (
                (unit.home or self._driver).op(
                    (OpKind.UPDATE, (unit.index, number)), f"update of {unit.name}", accesses
                ),
                nullcontext() if here or not sums else self._brought_up(unit, number, sums),
            ):
                started_s = time.perf_counter()
                self._torn = unit
                self._apply(unit, part, pieces, pending, last=last)
                spent_s = time.perf_counter() - started_s
            self._sink.emit(Event(EventKind.UPDATE, unit.name, part.numel * unit.dtype.itemsize, started_s, spent_s))
        for slot in used:
            slot.steps += 1
            slot.norm = None
        unit.version += 1
        unit.pending = self._torn = None
        self._store.forget(unit, spent, consumed=True)
        for slot in spent:
            if slot.grad is Grad.HELD:
                slot.become(Grad.SPENT)
        self._updated(unit)

    def _paged_sums(self, unit: Unit, spent: Sequence[Slot]) -> list[Access]:
        """What an update needs of the unit's paged gradients, of which those of ``spent`` are of no use after it."""
        paged = [slot for slot in unit.slots if slot.paged]
        if unit.gradients is None or not any(slot.group >= 0 for slot in paged):
            return []
        ends = not unit.sums_at_home and all(slot in spent for slot in paged)
        return [Access(unit.gradients.id, AccessMode.CONSUME if ends else AccessMode.READ)]

    def _brought_up(self, unit: Unit, number: int, sums: Sequence[Access]) -> AbstractContextManager[None]:
        """Have paged gradients in host memory for an update on a device."""
        return self._driver.op((OpKind.GRADIENT, (unit.index, number, "up")), f"gradients of {unit.name}", sums)

    def _apply(self, unit: Unit, part: Slice, pieces: Sequence[Piece], pending: Pending, *, last: bool) -> None:
        mover = (unit.home or self._driver).mover
        for group, hyper in enumerate(pending.hypers):
            chosen = [piece for piece in pieces if piece.slot.group == group]
            if not chosen:
                continue
            batch = Batch([], [], [[] for _ in self._rule.state_names], [])
            narrow = []
            for piece in chosen:
                assert unit.parameters.frame is not None
                parameter = mover.arena.view(
                    unit.parameters.frame, piece.begin * unit.dtype.itemsize, unit.dtype, piece.numel
                )
                gradient = self._gradient(unit, piece).to(parameter.device)
                if part.master is not None:
                    master = state_view(mover, part, part.master, 0, piece.begin, piece.numel)
                    narrow.append((parameter, master))
                    parameter, gradient = master, gradient.float()
                if pending.coefficient is not None:
                    # Sums that later slices need, too, may be on their way to the page files: what they hold must not
                    # change.
                    kept = piece.slot.direct is None and not (last or unit.sums_at_home)
                    gradient = gradient * pending.coefficient if kept else gradient.mul_(pending.coefficient)
                batch.params.append(parameter)
                batch.grads.append(gradient)
                batch.steps.append(piece.slot.steps)
                for number, states in enumerate(batch.states):
                    assert part.states is not None
                    states.append(state_view(mover, part, part.states, number, piece.begin, piece.numel))
            self._rule.apply(hyper, batch)
            for parameter, master in narrow:
                parameter.copy_(master)

    def _gradient(self, unit: Unit, piece: Piece) -> torch.Tensor:
        slot, begin = piece.slot, piece.begin - piece.slot.offset
        flat = slot.own.reshape(-1) if slot.own is not None else slot.direct
        if flat is None:
            flat = self._store.view(unit, slot)
        return flat[begin : begin + piece.numel]
