"""Exact updates: the same bits as plain PyTorch, made as early as that allows.

A unit is updated when its last gradient of the step has arrived, which the previous whole step foretells (`eager`), or,
with clipping or ``start="step"``, after the optimizer step and before the unit is next used (`pending`). Gradients that
come after their unit's update raise `StaleGradientError`. Everything runs on the training thread: on a machine whose
cores are all computing, a second thread for updates takes cores from the matrix products (see docs/exact_updates.md). Units
that are at home on a device are updated there, by kernels that the device gets in order with those that compute.

Per unit and step:   waiting --gradients--> updated --optimizer step--> waiting           (eager)
                     waiting --gradients, optimizer step--> pending --use--> waiting      (otherwise)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

from optim.accumulate import GradientStore
from optim.clip import check_finite, gradient_norm, total_norm
from optim.loss_scale import Scaling
from optim.rules import Batch, UpdateRule
from optim.states import StateAccess, state_view
from optim.unit import START_HINT, Hyper, Pending, Piece, Slice, Slot, Unit, UnitIndex, complete, forget_arrivals, pieces_of, stale_gradient
from pagemem.events import Event, EventKind, EventSink
from scheduler.driver import Driver
from scheduler.trace import Access, AccessMode, OpKind

Start = Literal["auto", "step"]

def is_eager(scaling: Scaling, start: Start) -> bool:
    """Whether units are updated during the backward pass, as soon as their gradients are complete."""
    return start == "auto" and not scaling.needs_norm


class ExactUpdater:
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
        self._driver = driver
        self._index = index
        self._rule = rule
        self._hypers = hypers
        self._store = store
        self._updated = updated
        self._states = StateAccess(driver, rule.state_names)
        self._sink = sink
        self._scaling = scaling
        self._eager = is_eager(scaling, start)
        self._lazy = not self._eager
        self._foretold = False
        self._used_hypers: Sequence[Hyper] | None = None
        self._slots = index.slots()
        self.staleness = self.dropped_gradients = self.state_frames = 0
        self.dropped_steps = 0

    # ---- gradients ---------------------------------------------------------------------------------------------

    def gradient(self, unit: Unit, slot: Slot, gradient: torch.Tensor) -> None:
        """Take one gradient from autograd; updates the unit when it was the last one it waited for.

        Raises:
            StaleGradientError: the unit's update of this step has been made; the gradient is lost, nothing else is.
        """
        self.before_use(unit)
        if unit.updated:
            raise stale_gradient(slot)
        slot.arrivals += 1
        final = self._foretold and slot.arrivals == slot.expected

        def note_norm(flat: torch.Tensor) -> None:
            slot.norm = gradient_norm(flat) if final and self._scaling.needs_norm else None

        if not (final and self._eager and slot.arrivals == 1 and self._store.keep(unit, slot, gradient)):
            self._store.add(unit, slot, gradient, note_norm)
        if self._eager and self._foretold and unit.live_views == 0 and complete(unit) and not self._viewed(unit):
            hypers = self._hypers()
            self._used_hypers = self._used_hypers or hypers
            self._run(unit, Pending(hypers, None))
            unit.updated = unit.ended = True

    def _viewed(self, unit: Unit) -> bool:
        """Whether somebody has a view of what an update would change: the backward pass may ask for it again."""
        if unit.device is not None and unit.home is None:
            return False  # Compute has a copy, which is not changed.
        return (unit.home or self._driver).viewed(unit.compute)

    def uses_as_it_is(self, slot: Slot) -> bool:
        """Whether a gradient that comes now is to be the parameter's only one of the step, and used as autograd made it."""
        return self._eager and self._foretold and slot.expected == 1

    def discard(self) -> None:
        """Throw the gradients of the step under way away.

        Raises:
            RuntimeError: some updates of the step have been made already; nothing was changed.
        """
        if any(unit.updated for unit in self._index.units):
            raise RuntimeError(f"zero_grad() without step(), but updates of this step have been made; to skip steps {START_HINT}")
        for unit in self._index.units:
            if unit.pending is None:
                self._store.forget(unit)
                forget_arrivals(unit)

    # ---- the optimizer step ------------------------------------------------------------------------------------

    def step(self) -> None:
        """End the step: decide on the updates not yet made. They run now, or before their unit is next used.

        With loss scaling, a step whose gradients are not finite is dropped whole.

        Raises:
            RuntimeError: hyper-parameters changed after updates of this step had used them.
            NonFiniteError: without loss scaling, the gradients' norm is not finite; no parameter was changed and the
                gradients are dropped.
        """
        hypers = self._hypers()
        if self._used_hypers is not None and list(self._used_hypers) != list(hypers):
            raise RuntimeError(
                "learning rate or another hyper-parameter changed between backward and step, but updates of this step "
                f"have already used the old values; change them before backward, or {START_HINT}"
            )
        waiting = [u for u in self._index.units if not u.updated and u.pending is None and any(s.arrivals for s in u.slots)]
        coefficient = self._coefficient() if self._scaling.needs_norm and waiting else None
        pending = Pending(hypers, coefficient)
        self.dropped_steps += bool(self._scaling.needs_norm and waiting and coefficient is None)
        for unit in waiting:
            if self._scaling.needs_norm and coefficient is None:
                self._store.forget(unit)
            elif self._lazy:
                unit.pending = pending
            else:
                self._run(unit, pending)
        self._end_step()

    def _end_step(self) -> None:
        repeatable = self._foretold
        for _, slot in self._slots:
            slot.expected = slot.arrivals
        for unit in self._index.units:
            unit.updated = unit.ended = False
            if unit.pending is None:
                forget_arrivals(unit)
        self._foretold = True
        self._used_hypers = None
        self._driver.end_step(repeatable=repeatable)

    def _coefficient(self) -> torch.Tensor | None:
        """What this step's gradients are multiplied by; None when they overflowed under loss scaling."""
        norms = []
        for unit, slot in self._slots:
            if slot.arrivals:
                if slot.norm is None:
                    slot.norm = self._norm_of_sum(unit, slot)
                norms.append(slot.norm)
        total = total_norm(norms)
        if self._scaling.loss_scale is None:
            try:
                check_finite(total)
            except BaseException:
                self.discard()
                raise
        return self._scaling.coefficient(total)

    def _norm_of_sum(self, unit: Unit, slot: Slot) -> torch.Tensor:
        assert unit.gradients is not None
        access = Access(unit.gradients.id, AccessMode.READ)
        key = (OpKind.GRADIENT, (unit.index, slot.order, "norm"))
        with self._store.driver_of(unit).op(key, f"norm of {slot.name}", [access]):
            return gradient_norm(self._store.view(unit, slot))

    # ---- updates -----------------------------------------------------------------------------------------------

    def before_use(self, unit: Unit) -> None:
        """Make the update that the last optimizer step decided on, if there is one."""
        if unit.pending is not None:
            pending, unit.pending = unit.pending, None
            self._run(unit, pending)
            forget_arrivals(unit)

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

    def _run(self, unit: Unit, pending: Pending) -> None:
        self._states.follow_edits(unit)
        parts = [(number, part, pieces_of(unit, part)) for number, part in enumerate(unit.slices)]
        parts = [entry for entry in parts if entry[2]]
        for number, part, pieces in parts:
            last = part is parts[-1][1]
            sums = self._paged_sums(unit, last=last)
            accesses = [Access(unit.parameters.id, AccessMode.MODIFY)]
            accesses += [Access(t.id, AccessMode.MODIFY) for t in (part.states, part.master) if t is not None]
            here = unit.home is None or unit.sums_at_home
            accesses += sums if here else []
            with (unit.home or self._driver).op((OpKind.UPDATE, (unit.index, number)), f"update of {unit.name}", accesses):
                with nullcontext() if here or not sums else self._brought_up(unit, number, sums):
                    started_s = time.perf_counter()
                    self._apply(unit, part, pieces, pending, last=last)
                    spent_s = time.perf_counter() - started_s
            self._sink.emit(Event(EventKind.UPDATE, unit.name, part.numel * unit.dtype.itemsize, started_s, spent_s))
        for slot in unit.slots:
            slot.steps += slot.arrivals > 0
        unit.version += 1
        self._store.forget(unit)
        self._updated(unit)

    def _paged_sums(self, unit: Unit, *, last: bool) -> list[Access]:
        """What an update needs of the unit's paged gradients; the last one uses them up."""
        if unit.gradients is None or not any(slot.paged for slot in unit.slots):
            return []
        return [Access(unit.gradients.id, AccessMode.CONSUME if last and not unit.sums_at_home else AccessMode.READ)]

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
                parameter = mover.arena.view(unit.parameters.frame, piece.begin * unit.dtype.itemsize, unit.dtype, piece.numel)
                gradient = self._gradient(unit, piece).to(parameter.device)
                if part.master is not None:
                    master = state_view(mover, part, part.master, 0, piece.begin, piece.numel)
                    narrow.append((parameter, master))
                    parameter, gradient = master, gradient.float()
                if pending.coefficient is not None:
                    # Sums that later slices need, too, may be on their way to the page files: what they hold must not change.
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
        begin = piece.begin - piece.slot.offset
        flat = piece.slot.direct if piece.slot.direct is not None else self._store.view(unit, piece.slot)
        return flat[begin : begin + piece.numel]
