"""The updates of one unit: a batch of gradients is turned into new parameter values, slice by slice.

Where a batch holds the gradients of several steps, the update thread cannot keep pace with training; the rule then says
which updates their mean makes (`UpdateRule.merge`). Where gradients were computed with parameters that missed some
steps, the next ones will be, too: parameters are published as far ahead as momentum will take them in as many steps and
one more (`UpdateRule.lookahead`), and moved back before the next update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optim import knobs
from optim.lockfree.unit_channel import GradientBatch, GradientSum, UnitChannel
from optim.rules import Batch, Lookahead, UpdateRule
from optim.states import state_view
from optim.unit import Hyper, Piece, Slice
from pagemem.residency.mover import Mover


def piece_numel(slice_numels: Iterable[int], n_threads: int) -> int:
    """Elements that are updated at a time, of slices of so many each."""
    return min(knobs.PIECE_NUMEL * n_threads, max(slice_numels, default=0))


def scratch_bytes(slice_numels: Iterable[int], n_threads: int) -> int:
    """What the updates need outside the arena."""
    return 2 * piece_numel(slice_numels, n_threads) * torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class _Due:
    """What is to be done to a parameter.

    Attributes:
        updates: hyper-parameters of each.
        lookahead: how far ahead of the last of them it ends. reached: whether that one itself goes so far.
    """

    updates: list[Hyper]
    lookahead: Lookahead
    reached: bool = False


def _due(rule: UpdateRule, total: GradientSum) -> _Due:
    """The updates that a sum makes, and as many steps ahead as its gradients ask for."""
    updates = rule.merge(total.hypers)
    lookahead = rule.lookahead(updates[-1], total.slot.steps + len(updates), total.mean_lookahead_steps)
    hyper = rule.lookahead_hyper(updates[-1], total.mean_lookahead_steps) if lookahead else None
    return _Due(updates, lookahead) if hyper is None else _Due([*updates[:-1], hyper], lookahead, reached=True)


class BatchUpdate:
    """One batch on its way to new values, which replace its gradients. Update thread only.

    Args:
        mover: owner of all residency; each slice's states, and parameters that have no master, must stay in memory
            while it is updated.
        scratch: two rows (fp32) of as many elements as are updated at a time.

    Attributes:
        parts: place in the unit, slice, and pieces of the parameters that have gradients, of each slice with any.
    """

    def __init__(
        self, mover: Mover, rule: UpdateRule, scratch: Tensor, channel: UnitChannel, batch: GradientBatch
    ) -> None:
        self._mover = mover
        self._rule = rule
        self._scratch = scratch
        self._unit = channel.unit
        self._sums = batch.sums
        self._newest = channel.newest_values()
        self._due = {slot: _due(rule, total) for slot, total in batch.sums.items()}
        found = [(place, part, self._pieces(part)) for place, part in enumerate(channel.unit.slices)]
        self.parts = [entry for entry in found if entry[2]]

    def apply(self, part: Slice, pieces: Sequence[Piece]) -> None:
        """Update the pieces of a slice."""
        for piece in pieces:
            self._update(part, piece, self._sums[piece.slot], self._due[piece.slot])

    def finish(self) -> None:
        """All slices are updated: count the updates."""
        for slot, made in self._due.items():
            slot.lookahead = made.lookahead
            slot.steps += len(made.updates)

    def _pieces(self, part: Slice) -> list[Piece]:
        """Parts of the batch's parameters that lie in a slice, none longer than the scratch."""
        most = self._scratch.shape[1]
        found: list[Piece] = []
        for slot in self._sums:
            first, end = max(slot.offset, part.begin), min(slot.end, part.end)
            found += [Piece(slot, begin, min(begin + most, end)) for begin in range(first, end, most)]
        return found

    def _update(self, part: Slice, piece: Piece, total: GradientSum, due: _Due) -> None:
        """All updates of a piece, which is small enough for everything to stay in the processor's cache meanwhile."""
        slot, states = piece.slot, self._states(part, piece)
        begin, end = piece.begin - slot.offset, piece.end - slot.offset
        scratch, spare = self._scratch[0, : piece.numel], self._scratch[1, : piece.numel]
        target = total.flat[begin:end]
        # One scratch is enough for both gradient and parameter: what is not fp32 has masters, which are updated in
        # place.
        gradient = target if target.dtype is torch.float32 else scratch.copy_(target)
        if total.coefficient is not None:
            gradient.mul_(total.coefficient)
        if total.n_steps > 1:
            gradient.mul_(1 / total.n_steps)
        newest_values = self._parameter(part, piece)
        parameter = newest_values if part.master is not None else scratch
        if slot.lookahead:
            self._rule.apply_lookahead(slot.lookahead, -1, newest_values, states, spare, parameter)
        elif parameter is not newest_values:
            parameter.copy_(newest_values)
        for made, hyper in enumerate(due.updates):
            self._rule.apply(hyper, Batch([parameter], [gradient], [[state] for state in states], [slot.steps + made]))
        if due.lookahead and not due.reached:
            self._rule.apply_lookahead(due.lookahead, 1, parameter, states, spare, parameter)
        target.copy_(parameter)

    def _parameter(self, part: Slice, piece: Piece) -> Tensor:
        """The newest fp32 values of a piece; the master where there is one."""
        if part.master is not None:
            return state_view(self._mover, part, part.master, 0, piece.begin, piece.numel)
        known = self._newest.get(piece.slot)
        if known is not None:
            return known[piece.begin - piece.slot.offset : piece.end - piece.slot.offset]
        return self._mover.tenants.view(self._unit.parameters, self._unit.dtype, piece.begin, piece.numel)

    def _states(self, part: Slice, piece: Piece) -> list[Tensor]:
        if part.states is None:
            return []
        return [
            state_view(self._mover, part, part.states, k, piece.begin, piece.numel)
            for k in range(len(self._rule.state_names))
        ]
