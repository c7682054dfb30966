"""What an updater must know of the training run that it serves. Data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from optim.scaling.clip import check_loss, total_norm
from optim.scaling.loss_scale import Scaling
from optim.unit import Hyper, UnitIndex
from pagemem.ranks.collectives import Collectives
from pagemem.telemetry.events import EventSink
from scheduler.execution.driver import Driver

#: Place among the model's parameters, and gradient, of each parameter whose gradient the updater does not keep.
OtherGradients = Callable[[], Sequence[tuple[int, torch.Tensor]]]


@dataclass(frozen=True, slots=True)
class Training:
    """The training run of one engine.

    Attributes:
        driver: gives pages and keeps the trace.
        index: the model's units.
        hypers: current hyper-parameters of all groups, asked for whenever an update is decided on.
        other_gradients: gradients that the updater does not keep, but that count in the norm.
        scaling: clipping and loss scaling.
        eager: whether a unit is updated as soon as its gradients are complete, not at the optimizer step.
        sink: takes updates and waits.
        collectives: what connects the ranks that share the units; None: there is one rank.
        blocks: whether the gradients' norm is that of `optim.scaling.block_norm`.
    """

    driver: Driver
    index: UnitIndex
    hypers: Callable[[], Sequence[Hyper]]
    other_gradients: OtherGradients
    scaling: Scaling
    eager: bool
    sink: EventSink
    collectives: Collectives | None = None
    blocks: bool = False

    def check_loss(self, value: float, step: int) -> None:
        """Raise, on all ranks, unless the loss of each is a number.

        Args:
            step: of the optimizer, that it is for; from 1.

        Raises:
            NonFiniteError: one is NaN or infinite. RankError: another rank failed.
        """
        if self.collectives is None:
            check_loss(value, step)
            return
        for rank, (other,) in enumerate(self.collectives.agree([value])):
            check_loss(other, step, f" on rank {rank}")

    def coefficient(
        self, norms: list[tuple[int, torch.Tensor]], found: Callable[[torch.Tensor], None]
    ) -> torch.Tensor | None:
        """What this step's gradients are multiplied by; those that the updater does not keep are, by this.

        Args:
            norms: of the gradients that it keeps, each with its parameter's place in the model. All are combined as
                plain PyTorch does.
            found: is told of the global norm, and may refuse it.

        Returns:
            None where there are no gradients, or the norm is not finite.
        """
        others = self.other_gradients()
        norms = [*norms, *((order, torch.linalg.vector_norm(other)) for order, other in others)]
        if not norms:
            return None
        total = total_norm([norm for _, norm in sorted(norms, key=lambda pair: pair[0])])
        found(total)
        coefficient = self.scaling.coefficient(total)
        if coefficient is not None:
            for _, other in others:
                other.mul_(coefficient.to(other.device))
        return coefficient
