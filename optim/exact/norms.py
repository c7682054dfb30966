"""The norm of a step's gradients, and what they are multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from optim.exact.gradient_store import GradientStore
from optim.exact.rank_sums import RankSums
from optim.scaling.block_norm import SquareSum
from optim.training import Training
from optim.unit import Grad, Slot, Unit


class GradientNorms:
    """Of one exact updater. Training thread only.

    Args:
        ranks: sums over all ranks; None: there is one rank.
    """

    def __init__(self, training: Training, store: GradientStore, ranks: RankSums | None) -> None:
        self._training = training
        self._store = store
        self._ranks = ranks
        self._slots = training.index.slots(optimized=False)

    def coefficient(
        self, waiting: Sequence[Unit], note: Callable[[torch.Tensor], None], *, divides: bool
    ) -> torch.Tensor | None:
        """What a step's gradients are multiplied by; those of parameters that are not optimized are, here.

        Args:
            waiting: units whose gradients wait for it.
            note: is told of the global norm, and may refuse it.
            divides: as `RankSums.begin`.

        Returns:
            None where there are no gradients, or the norm is not finite.
        """
        if self._ranks is not None:
            for unit in waiting:
                self._ranks.begin(unit, divides=divides)
            total = self._ranks.norm(waiting)
        elif self._training.blocks:
            total = self._of_blocks()
        else:
            return self._as_torch(note)
        note(total)
        coefficient = self._training.scaling.coefficient(total)
        if coefficient is not None and self._ranks is None:
            self._scale_others(coefficient)
        return coefficient

    def _of_blocks(self) -> torch.Tensor:
        """As every number of ranks would have it."""
        total = SquareSum()
        for unit, slot in self._slots:
            if slot.own is not None:
                total.add(slot.own.reshape(-1))
            elif slot.grad is Grad.HELD:
                with self._store.values(unit, slot) as flat:
                    total.add(flat)
        for _, gradient in self._training.other_gradients():
            total.add(gradient.reshape(-1))
        return total.norm()

    def _as_torch(self, note: Callable[[torch.Tensor], None]) -> torch.Tensor | None:
        """As `Training.coefficient`."""

        def norm(unit: Unit, slot: Slot) -> torch.Tensor | None:
            return self._store.norm(unit, slot) if slot.whole is None else self._store.norm_of_whole(slot.whole)

        found = [
            (slot.order, norm(unit, slot))
            for unit, slot in self._slots
            if slot.whole is None or slot is slot.whole.places[0][1]
        ]
        norms = [(order, norm) for order, norm in found if norm is not None]
        coefficient = self._training.coefficient(norms, note)
        if coefficient is not None:
            self._scale_kept(coefficient)
        return coefficient

    def _scale_others(self, coefficient: torch.Tensor) -> None:
        for _, gradient in self._training.other_gradients():
            gradient.mul_(coefficient.to(gradient.device))
        self._scale_kept(coefficient)

    def _scale_kept(self, coefficient: torch.Tensor) -> None:
        """Those of parameters that are not optimized, which no update multiplies."""
        for unit, slot in self._slots:
            if slot.group < 0 and slot.grad in (Grad.HELD, Grad.OWN):
                self._store.scale(unit, [slot], coefficient)
