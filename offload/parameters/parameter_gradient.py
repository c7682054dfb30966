"""``parameter.grad`` of one paged parameter: what autograd delivers, what users assign, and the hooks in between.

Autograd's own place for it is empty but inside hooks: the last hook of each parameter, which is ours, whenever others
were registered, hands the gradient to the updater. Where there are others, another one of ours comes first and adds
what arrived to what there is, so that they see what plain PyTorch's hooks see.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offload.parameters.paged_gradient import GradientPlace, PagedGradient
from offload.parameters.tensor_functions import GET_GRAD, SET_GRAD, no_torch_function
from optim.unit import Grad, Slot, Unit
from optim.updater import Updater


class GradientBinder(Protocol):
    """What the gradients of an engine's parameters have in common.

    Attributes:
        updater: takes gradients; None before there is one.
        in_hooks: parameters whose hooks are running, or have failed.
        save_hooks: what has autograd copy gradients that it saves.
    """

    updater: Updater | None
    closed: bool
    in_hooks: list[Any]
    save_hooks: Callable[[], AbstractContextManager[Any]]
    torch_device: torch.device

    def confirm_structure(self) -> None:
        """Raise when no gradient may be used."""


class ParameterGradient:
    """The gradient of one parameter, which every method is given. Training thread, or autograd's in its place, without
    torch functions."""

    def __init__(self, binder: GradientBinder, unit: Unit, slot: Slot) -> None:
        self._binder = binder
        self._unit = unit
        self._slot = slot
        self._shown: PagedGradient | None = None
        self._hook_ids: list[int] = []
        self._brought: Tensor | None = None
        self._was_own = self._diverted = False

    @property
    def _updater(self) -> Updater | None:
        """What the gradient goes to; None: it stays where autograd puts it."""
        updater = self._binder.updater
        if updater is None or self._binder.closed:
            return None
        return updater if self._slot.group >= 0 or updater.keeps_unoptimized else None

    def get(self, parameter: nn.Parameter) -> Tensor | None:
        """``parameter.grad``."""
        self._end_diversion()
        found: Tensor | None = GET_GRAD(parameter)
        updater = self._updater
        if found is not None or updater is None:
            return found  # inside hooks
        updater.catch_up(self._unit)
        if self._slot.own is not None or self._slot.grad is Grad.NONE:
            return self._slot.own
        if self._shown is None or not self._shown.is_current:
            place = GradientPlace(updater, self._unit, self._slot, self._slot.generation, self._binder.save_hooks)
            on_device = self._unit.sums_resident or (self._slot.direct is not None and self._unit.device_resident)
            self._shown = PagedGradient.standing_for(
                place, self._binder.torch_device if on_device else torch.device("cpu")
            )
        return self._shown

    def set(self, parameter: nn.Parameter, value: Tensor | None) -> None:
        """``parameter.grad = value``.

        Raises:
            RuntimeError: its shape, dtype or device is not the parameter's; or the parameter's update of this step has
                been made.
        """
        self._end_diversion()
        if value is not None and value is self._shown and self._shown.is_current:
            return  # parameter.grad *= 2 assigns what is there
        if isinstance(value, PagedGradient):
            raise RuntimeError(
                f"{self._slot.name}: .grad is assigned another gradient that is in pages; assign a copy of it, with "
                ".grad.clone()"
            )
        SET_GRAD(parameter, value)  # which raises where it does not fit
        if self._updater is not None and not any(one is parameter for one in self._binder.in_hooks):
            SET_GRAD(parameter, None)
            self._updater.assign(self._unit, self._slot, value)

    def collect(self, parameter: nn.Parameter, *, wanted: bool) -> None:
        """Take over what autograd's place has, or throw it away."""
        there = GET_GRAD(parameter)
        SET_GRAD(parameter, None)
        self._brought = None
        if wanted and there is not None:
            self.set(parameter, there)

    # ---- hooks -------------------------------------------------------------------------------------------------

    def watch(self, parameter: nn.Parameter) -> None:
        """Take what there is, and from now on what autograd delivers, if the parameter requires it. Idempotent."""
        if self._updater is None or self._hook_ids:
            return
        with no_torch_function():
            self.collect(parameter, wanted=True)
            if parameter.requires_grad:
                self._hook_ids = [parameter.register_post_accumulate_grad_hook(self._take).id]  # type: ignore[no-untyped-call]
                self.order_hooks(parameter)

    def order_hooks(self, parameter: nn.Parameter) -> None:
        """Have our hooks first and last, whatever has been registered."""
        self._end_diversion()
        hooks: dict[int, Any] = parameter._post_accumulate_grad_hooks
        if not self._hook_ids or len(hooks) == len(self._hook_ids):
            return
        if len(self._hook_ids) == 1:
            self._hook_ids.append(parameter.register_post_accumulate_grad_hook(self._bring).id)  # type: ignore[no-untyped-call]
        take, bring = self._hook_ids
        others = {key: hook for key, hook in hooks.items() if key not in self._hook_ids}
        # Torch calls them in the order in which they were put in.
        hooks.clear()
        hooks.update({bring: self._bring, **others, take: self._take})

    def may_divert(self, parameter: nn.Parameter) -> bool:
        """Whether our hook is the only one."""
        return len(self._hook_ids) == 1 and list(parameter._post_accumulate_grad_hooks or {}) == self._hook_ids

    def divert(self, parameter: nn.Parameter, hook: Callable[[Any], None]) -> None:
        """Have another hook in the place of ours, which is the only one."""
        parameter._post_accumulate_grad_hooks[self._hook_ids[0]] = hook
        self._diverted = True

    def end_diversion(self, parameter: nn.Parameter) -> None:
        """Have our own hook again."""
        parameter._post_accumulate_grad_hooks[self._hook_ids[0]] = self._take
        self._diverted = False

    def _end_diversion(self) -> None:
        if self._diverted and self._binder.updater is not None:
            self._binder.updater.catch_up(self._unit)

    def _bring(self, arrived: nn.Parameter) -> None:
        """Before the user's hooks."""
        with no_torch_function():
            updater, gradient = self._updater, GET_GRAD(arrived)
            if updater is None or gradient is None:
                return
            self._binder.in_hooks.append(arrived)
            self._was_own = self._slot.own is not None
            held = updater.bring_out(self._unit, self._slot)
            self._brought = gradient if held is None else held.add_(gradient)
            SET_GRAD(arrived, self._brought)

    def _take(self, arrived: nn.Parameter) -> None:
        """After the user's hooks."""
        with no_torch_function():
            updater, gradient = self._updater, GET_GRAD(arrived)
            brought, self._brought = self._brought, None
            if brought is not None:
                self._binder.in_hooks[:] = [one for one in self._binder.in_hooks if one is not arrived]
            if updater is None or gradient is None:
                return
            SET_GRAD(arrived, None)
            self._binder.confirm_structure()
            if brought is not None and (self._was_own or gradient is not brought):
                updater.assign(self._unit, self._slot, gradient)
            else:
                updater.gradient(self._unit, self._slot, gradient)
