"""The step under way: its micro-batches, its gradients, and how it ends.

NO GRADIENTS --(backward, add_gradient)--> UNDER WAY --(optimizer.step)--> NO GRADIENTS, one step more
                                           UNDER WAY --(abandon)--> NO GRADIENTS
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from offload.activations.policy import RecomputeChoice
from offload.cutting.cut_parameter import CutParameter
from offload.parameters.paged_parameter import PagedParameter
from offload.store.page_store import PageStore
from offload.store.plan_file import PlanKeeper
from optim.scaling.loss_scale import LossScale
from optim.unit import Slot, Unit
from optim.updater import Updater
from pagemem.process import interrupts


class HasLoss(Protocol):
    """The output of a model that computes its loss itself, as those of transformers do when they are given labels."""

    loss: Any


def _loss_in(output: Tensor | HasLoss | Mapping[str, Any]) -> Tensor:
    if isinstance(output, Tensor):
        loss: Any = output
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"backward is given a {type(output).__name__} without a loss; give the loss, or call the model with labels"
        )
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}, and backward takes one number: its mean() or sum()")
    return loss


class TrainingStep:
    """Counts micro-batches and steps of one engine, and takes its gradients. Training thread only.

    Args:
        accumulation: micro-batches in a step of `Engine.step`.

    Attributes:
        made: optimizer steps made, those before `resume` included.
        loss_scale: None without loss scaling.
    """

    def __init__(
        self,
        store: PageStore,
        updater: Updater,
        loss_scale: LossScale | None,
        accumulation: int,
        recompute_choice: RecomputeChoice | None,
        plan_keeper: PlanKeeper,
    ) -> None:
        self.made = 0
        self.loss_scale = loss_scale
        self._store = store
        self._updater = updater
        self._accumulation = accumulation
        self._recompute_choice = recompute_choice
        self._plan_keeper = plan_keeper
        self._micro_batches = 0

    @property
    def under_way(self) -> bool:
        """Whether there are gradients since the last step."""
        return self._micro_batches > 0 or self._updater.step_under_way

    def check_ended(self) -> None:
        """Raise RuntimeError while a step is under way, whose gradients a commit would miss."""
        if self.under_way:
            raise RuntimeError(
                "a commit between backward and step would miss the gradients of the step under way; call save() and "
                "export() after optimizer.step() (engine.step() returns True), or give the step up with "
                "engine.abandon_step()"
            )

    def take_micro_batches(self) -> bool:
        """Whether all micro-batches of the step are through; if so, they are counted anew."""
        if self._micro_batches < self._accumulation:
            return False
        self._micro_batches = 0
        return True

    def backward(self, output: Tensor | HasLoss | Mapping[str, Any]) -> None:
        """Backward of one micro-batch; see `Engine.backward`."""
        loss = _loss_in(output)
        self._updater.expect(loss, self.made + 1)
        parts = self._accumulation * (1 if self._store.collectives is None else self._store.collectives.n_ranks)
        if parts > 1:
            loss = loss / parts
        self.scaled(loss).backward()  # type: ignore[no-untyped-call]
        self._micro_batches += 1

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, if there is one."""
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    def ended(self) -> None:
        """The optimizer has made the step."""
        interrupts.renew()
        self.go_on_from(self.made + 1)
        if self._recompute_choice is not None:
            self._recompute_choice.step_ended()
        self._plan_keeper.keep()
        self._store.binder.bindings.step_ended()

    def go_on_from(self, made: int) -> None:
        """Between two steps, of which so many were made."""
        self.made, self._micro_batches = made, 0

    def abandon(self) -> None:
        """Give the step under way up; see `Engine.abandon_step`."""
        self.free_failed_backward()
        self._store.binder.collect_in_hooks(False)
        self._updater.abandon()
        self._store.binder.bindings.step_ended()
        self._micro_batches = 0

    def free_failed_backward(self) -> None:
        """Free what a backward pass that failed has left in autograd's queue, which only another one or the end of the
        thread empties."""
        saved = any(
            unit.live_views or (unit.bound is not None and unit.bound.aliased) for unit in self._store.index.units
        )
        if saved and torch._C._current_graph_task_id() == -1:
            with torch.inference_mode(False), torch.enable_grad():
                torch.zeros((), requires_grad=True).clone().backward()  # type: ignore[no-untyped-call]

    def add_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        """See `Engine.add_gradient`."""
        places = self._places_of(parameter)
        _, slot = places[0]
        if (gradient.shape, gradient.dtype) != (parameter.shape, slot.dtype):
            raise ValueError(
                f"{slot.name}: a gradient of shape {tuple(gradient.shape)} and {gradient.dtype} for a parameter of "
                f"{tuple(parameter.shape)} and {slot.dtype}"
            )
        rows = [gradient] if len(places) == 1 else torch.split(gradient, [slot.shape[0] for _, slot in places])
        for (unit, slot), part in zip(places, rows, strict=True):
            self._updater.gradient(unit, slot, part.detach().to(self._store.binder.torch_device, copy=True))

    def gradient_ready(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """See `Engine.gradient_ready`."""
        places = self._places_of(parameter)
        if gradient is not None:
            self.add_gradient(parameter, gradient)
        for place in places:
            self._updater.ready(*place)

    def _places_of(self, parameter: Tensor) -> list[tuple[Unit, Slot]]:
        """Unit and slot of a parameter, or of each of its slices."""
        parts = parameter.slices if isinstance(parameter, CutParameter) else [parameter]
        found = [part for part in parts if isinstance(part, PagedParameter)]
        if not found or found[0]._place.binder is not self._store.binder:
            raise ValueError("this parameter is not one that the engine has in pages")
        return [(part._place.unit, part._place.slot) for part in found]
