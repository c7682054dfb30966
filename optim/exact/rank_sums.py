"""Sums over all ranks of the gradients of shared units, ahead of their updates.

The sum of a unit is made by the comm lane while autograd goes on to the next unit, so its update is made one unit
later. All ranks begin sums and make updates in the same order, which follows from their ops alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import torch

from optim.exact.gradient_store import GradientStore
from optim.scaling.block_norm import SquareSum
from optim.unit import Pending, Unit
from pagemem.ranks.collectives import Collectives

#: Sums under way while autograd goes on.
_AHEAD: Final = 1


class RankSums:
    """Of one updater. Training thread only.

    Args:
        collectives: what connects the ranks.
        make: makes the update of a unit whose sum has been begun.
    """

    def __init__(self, store: GradientStore, collectives: Collectives, make: Callable[[Unit, Pending], None]) -> None:
        self._store = store
        self._collectives = collectives
        self._make = make
        self._waiting: deque[tuple[Unit, Pending]] = deque()

    def begin(self, unit: Unit, *, divides: bool) -> None:
        """Begin to sum a unit's gradients.

        Args:
            divides: whether the sum is divided by the number of ranks: not where losses were.
        """
        self._store.reduce(unit, self._collectives.n_ranks if divides else 1)

    def update(self, unit: Unit, pending: Pending, *, divides: bool) -> None:
        """Begin to sum a unit's gradients, see `begin`, and make the updates that have waited long enough."""
        self.begin(unit, divides=divides)
        self._waiting.append((unit, pending))
        while len(self._waiting) > _AHEAD:
            self._make(*self._waiting.popleft())

    def finish(self) -> None:
        """Make the updates that wait."""
        while self._waiting:
            self._make(*self._waiting.popleft())

    def norm(self, units: Iterable[Unit]) -> torch.Tensor:
        """The norm of the summed gradients of units, the same on all ranks. Their sums have been begun."""
        everybodys, own = SquareSum(), SquareSum()
        for unit in units:
            assert unit.sharing is not None
            into = own if len(unit.sharing.layout.ranges) > 1 else everybodys
            with self._store.pieces(unit) as pieces:
                for piece in pieces:
                    into.add(piece)
        found = self._collectives.agree(own.words())
        for words in found[: self._collectives.n_shards]:  # one group of ranks has the whole model
            everybodys.merge(SquareSum.from_words(words))
        return everybodys.norm()
