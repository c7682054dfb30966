"""Updates of bound units: their gradients stay where autograd puts them, and nobody is asked for pages.

A unit whose parameters and states stay in memory takes part while each of its gradients is foretold to be the only one
of its step. It is updated in the backward pass once all are there and nobody has an alias of the parameters; units with
few bytes together, in one call of torch's kernel of lists. Whatever else happens to it (a gradient too many, one too
few at the step's end, somebody who looks at one) ends that: the unit leaves, and is from there on like any other,
until it is admitted again.

Per unit and step:   waiting --gradients--> updated --optimizer step, zero_grad--> waiting
                     waiting, updated --leave--> as in `optim.exact.updater`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from optim import knobs
from optim.exact.admitted import GET_GRAD, Admitted, BoundPiece, bytes_of, no_torch_function
from optim.exact.bound_unit import BoundUnit, Hook
from optim.gradient_budget import GradientBudget
from optim.gradient_errors import uncleared_gradient
from optim.rules import Batch, UpdateRule
from optim.unit import Grad, Hyper, Slot, Unit
from pagemem.residency.mover import Mover
from pagemem.telemetry.events import Event, EventKind, EventSink


class BoundUpdates:
    """The units that take part. Training thread, or autograd's in its place.

    Args:
        mover: of the arena where their pages are.
        hypers: the present hyper-parameters, which are used from then on.
        gradient: takes a gradient of a unit that has left.
        updated: told of each unit that was updated.
        viewed: whether somebody has a view of a unit. whole: context of an update, which must not be cut off.

    Attributes:
        confirm: raises where no gradient may be used.
    """

    def __init__(
        self, mover: Mover, rule: UpdateRule, budget: GradientBudget, hypers: Callable[[], Sequence[Hyper]],
        gradient: Callable[[Unit, Slot, torch.Tensor], None], updated: Callable[[Unit], None],
        viewed: Callable[[Unit], bool], whole: Callable[[Unit], AbstractContextManager[None]], sink: EventSink,
    ) -> None:  # fmt: skip
        self.confirm: Callable[[], None] = lambda: None
        self._mover, self._rule, self._budget, self._sink = mover, rule, budget, sink
        self._hypers, self._gradient, self._updated = hypers, gradient, updated
        self._viewed, self._whole = viewed, whole
        self._units: dict[Unit, tuple[Admitted, Callable[[], None]]] = {}
        self._complete: list[Admitted] = []
        self._n_bytes = self._granted_bytes = self._complete_bytes = 0
        self._task = -1

    def __contains__(self, unit: Unit) -> bool:
        return unit in self._units

    # ---- who takes part ----------------------------------------------------------------------------------------

    def admit(self, unit: Unit, bound: BoundUnit) -> list[Hook]:
        """Have a unit take part whose states are in memory and stay there; returns a hook for each parameter, which
        `installed` is to follow."""
        one = Admitted.of(self._mover, unit, bound, len(self._rule.state_names))
        self._units[unit] = one, lambda: None
        return [self._hook(one, number) for number in range(len(unit.slots))]

    def installed(self, unit: Unit, undo: Callable[[], None]) -> None:
        """The hooks of a unit are called from now on, until ``undo``."""
        self._units[unit] = self._units[unit][0], undo

    def leave(self, unit: Unit) -> None:
        """Have a unit be like any other, with the gradients that have arrived. Nothing if it does not take part.

        Raises:
            As `optim.updater.Updater.gradient`; the unit has left all the same.
        """
        if unit not in self._units:
            return
        one, undo = self._units.pop(unit)
        undo()
        one.bound.end_sharing(one.n_shares)
        arrived = [number for number, there in enumerate(one.arrived) if there]
        if one in self._complete:
            self._complete.remove(one)
            self._complete_bytes -= one.n_bytes
        if one.spent:
            for number in arrived:
                slot = unit.slots[number]
                slot.arrivals = int(unit.updated)
                slot.become(Grad.HELD)
                slot.become(Grad.SPENT)
            return
        self._release(sum(bytes_of(unit.slots[number]) for number in arrived))
        taken = [(unit.slots[number], one.take(number)) for number in arrived]
        for slot, gradient in taken:
            if gradient is not None:
                self._gradient(unit, slot, gradient)

    def leave_unfinished(self) -> None:
        """At the optimizer step: those that have gradients and were not updated leave.

        Raises:
            RuntimeError: the gradients of the last step were used up and not cleared.
        """
        for one, _ in list(self._units.values()):
            if one.spent and not one.unit.updated:
                raise uncleared_gradient(one.unit.slots[one.arrived.index(True)])
            if not one.spent and any(one.arrived):
                self.leave(one.unit)
        self._task = -1

    def leave_all(self) -> None:
        """Every unit leaves."""
        for unit in list(self._units):
            self.leave(unit)

    def close(self) -> None:
        """Nobody takes part any more, and gradients that were not used are thrown away. Idempotent."""
        self.clear()
        for _, undo in self._units.values():
            undo()
        self._units.clear()

    @property
    def under_way(self) -> bool:
        """Whether gradients have come since the last step."""
        return any(one.unit.updated or (not one.spent and any(one.arrived)) for one, _ in self._units.values())

    def clear(self) -> None:
        """Gradients are None; those that were not used are thrown away."""
        self._complete.clear()
        self._complete_bytes = 0
        self._release(self._n_bytes)
        for one, _ in self._units.values():
            if not one.spent:
                for number, there in enumerate(one.arrived):
                    if there:
                        one.take(number)
            one.restart()

    # ---- gradients ---------------------------------------------------------------------------------------------

    def _hook(self, one: Admitted, number: int) -> Hook:
        awaited, n_bytes = one.awaited[number], bytes_of(one.unit.slots[number])

        def take(_parameter: Any) -> None:
            if not awaited or one.arrived[number]:
                self._take_strange(one, number)
                return
            one.arrived[number] = True
            one.missing -= 1
            self._n_bytes += n_bytes
            if self._n_bytes > self._granted_bytes and not self._grant():
                self.leave(one.unit)  # Its gradients are added up in pages.
                return
            if not one.missing:
                self._complete.append(one)
                self._complete_bytes += one.n_bytes
                if self._complete_bytes >= knobs.BATCH_BYTES:
                    self.flush()
            task = torch._C._current_graph_task_id()
            if task != self._task and task != -1:
                self._task = task
                torch.autograd.Variable._execution_engine.queue_callback(self.flush)

        return take

    def _take_strange(self, one: Admitted, number: int) -> None:
        """A gradient that was not foretold: one too many, which autograd has added to the first, or one after the
        update, or without `zero_grad` after a step."""
        unit, slot = one.unit, one.unit.slots[number]
        again = one.awaited[number] and not one.spent
        gradient = one.take(number)
        if again:
            one.arrived[number] = False
            self._release(bytes_of(slot))
        self.leave(unit)
        if gradient is not None:
            slot.arrivals += again
            self._gradient(unit, slot, gradient)

    def _grant(self) -> bool:
        """Have the budget cover what has arrived; some more is taken with it, so that not each one asks."""
        needed_bytes = self._n_bytes - self._granted_bytes
        spare_bytes = min(self._budget.limit_bytes - self._budget.n_bytes, knobs.BATCH_BYTES)
        for more_bytes in (max(spare_bytes, needed_bytes), needed_bytes):
            if self._budget.take(more_bytes):
                self._granted_bytes += more_bytes
                return True
        if self._complete:
            self.flush()
            return self._n_bytes <= self._granted_bytes or self._grant()
        return False

    def _release(self, n_bytes: int) -> None:
        """So many bytes of gradients are gone; nothing is kept for others."""
        self._n_bytes -= n_bytes
        if self._granted_bytes > self._n_bytes:
            self._budget.release(self._granted_bytes - self._n_bytes)
            self._granted_bytes = self._n_bytes

    # ---- updates -----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Update the units that have all their gradients, but those that somebody has an alias of: they wait for the
        optimizer step.

        Raises:
            RuntimeError: no gradient may be used. ValueError: one has a graph of its own.
        """
        complete, self._complete, self._complete_bytes = self._complete, [], 0
        if not complete:
            return
        self.confirm()
        with no_torch_function():
            graphs = [one for one in complete if one.has_graphs]
        for one in graphs:
            self.leave(one.unit)  # which refuses it
        ready = [one for one in complete if not one.unit.live_views and not self._viewed(one.unit)]
        edited = [one for one in ready if one.was_edited]
        for one in edited:
            self.leave(one.unit)  # Its masters follow what was written first.
        self._run([one for one in ready if one not in edited])

    def _run(self, ready: Sequence[Admitted]) -> None:
        if not ready:
            return
        started_s, hypers = time.perf_counter(), self._hypers()
        with torch.no_grad(), no_torch_function():
            gradients = [[GET_GRAD(parameter) for parameter in one.bound.parameters] for one in ready]
            with self._whole(ready[0].unit):
                for group, hyper in enumerate(hypers):
                    pieces = [one.pieces.get(group, ()) for one in ready]
                    self._run_group(hyper, list(zip(pieces, gradients, strict=True)))
                for one in ready:
                    one.note_updated()
        for one in ready:
            self._updated(one.unit)
        n_bytes = sum(one.n_bytes for one in ready)
        self._release(n_bytes)
        self._sink.emit(
            Event(EventKind.UPDATE, ready[0].unit.name, n_bytes, started_s, time.perf_counter() - started_s)
        )

    def _run_group(self, hyper: Hyper, units: Sequence[tuple[Sequence[BoundPiece], list[torch.Tensor | None]]]) -> None:
        batch, narrow = Batch([], [], [[] for _ in self._rule.state_names], []), []
        for pieces, gradients in units:
            for piece in pieces:
                gradient = gradients[piece.number]
                if gradient is None:
                    continue
                if piece.part is not None:
                    gradient = gradient.reshape(-1)[piece.part[0] : piece.part[1]]
                if piece.master is not None:
                    narrow.append((piece.parameter, piece.master))
                    gradient = gradient.float()
                batch.params.append(piece.parameter if piece.master is None else piece.master)
                batch.grads.append(gradient)
                batch.steps.append(piece.slot.steps)
                for states, state in zip(batch.states, piece.states, strict=True):
                    states.append(state)
        if batch.params:
            self._rule.apply(hyper, batch)
        for parameter, master in narrow:
            parameter.copy_(master)
