"""Update rules: torch's fused kernels called on flat pieces of parameters. AdamW, Adam and SGD with momentum.

A rule knows which states it keeps and how to apply itself to lists of flat fp32 tensors of one parameter group. It is
bit-identical to the torch optimizer of the same name with ``fused=True`` because it calls the same kernel with the same
scalars; where pieces begin is chosen so that no element's rounding depends on the cut (see `optim.unit`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from optim import knobs
from optim.unit import Hyper


@dataclass(slots=True)
class Batch:
    """Pieces of one parameter group: parallel lists of flat fp32 tensors, and each piece's number of updates so far."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    steps: list[int]


#: Numbers that tell a rule how far a parameter was moved ahead of its last update; none: it was not.
Lookahead = tuple[float, ...]


class UpdateRule(Protocol):
    """What an optimizer must say of itself to run on pages. Stateless; called on whichever thread updates."""

    torch_class: type[torch.optim.Optimizer]
    state_names: tuple[str, ...]
    hyper_names: ClassVar[tuple[str, ...]]
    keeps_step: ClassVar[bool]

    def check(self, group: Hyper) -> None:
        """Raise ValueError when a group asks for something the rule does not do."""

    def apply(self, hyper: Hyper, batch: Batch) -> None:
        """Update ``batch`` in place; each piece is updated for the (steps + 1)-th time."""

    def merge(self, hypers: Sequence[Hyper]) -> list[Hyper]:
        """The updates to make, in this order and all with the mean gradient, for steps whose gradients were added up.

        Args:
            hypers: of each step, oldest first; one alone comes back as it is.
        """

    def lookahead(self, hyper: Hyper, n_updates: int, n_steps: float) -> Lookahead:
        """How far momentum alone takes a parameter in ``n_steps`` steps after its ``n_updates``-th update."""

    def lookahead_hyper(self, hyper: Hyper, n_steps: float) -> Hyper | None:
        """Hyper-parameters with which `apply` ends that far ahead of the update by ``hyper``; None: `apply_lookahead`
        is to follow it."""

    def apply_lookahead(
        self, lookahead: Lookahead, sign: int, parameter: Tensor, states: Sequence[Tensor], scratch: Tensor, out: Tensor
    ) -> None:
        """Write a piece that is moved ahead (``sign`` 1), or back (-1), to ``out``, which may be the parameter itself.

        Args:
            states: those that `lookahead` was asked for. All are flat and alike long.
        """


def _decays(beta: float, n_steps: float) -> float:
    """The share of a step that momentum still makes, added up over so many steps without a gradient."""
    whole = int(n_steps)
    return math.fsum(beta**k for k in range(1, whole + 1)) + (n_steps - whole) * beta ** (whole + 1)


def _refuse(group: Hyper, name: str, *unsupported: str) -> None:
    for option in unsupported:
        if group.get(option):
            raise ValueError(f"{name}: {option}={group[option]!r} is not supported on pages; leave it off")
    for key in ("lr", "betas"):
        value = group.get(key)
        if any(isinstance(number, Tensor) for number in (value if isinstance(value, (list, tuple)) else (value,))):
            raise ValueError(
                f"{name}: a tensor {key} is not supported; use a float (LR schedulers then set floats too)"
            )
    if not group.get("fused"):
        raise ValueError(
            f"{name}: fused={group.get('fused')!r} rounds otherwise than the fused kernel that updates pages; make it "
            "with fused=True"
        )


class AdamRule:
    """`torch.optim.AdamW(fused=True)` or `torch.optim.Adam(fused=True)`, which differ in where weight decay enters.

    Kingma and Ba, ICLR 2015, algorithm 1; decoupled weight decay: Loshchilov and Hutter, ICLR 2019, algorithm 2.
    """

    state_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    hyper_names: ClassVar[tuple[str, ...]] = ("lr", "betas", "eps", "weight_decay", "maximize")
    keeps_step: ClassVar[bool] = True

    def __init__(self, torch_class: type[torch.optim.AdamW | torch.optim.Adam]) -> None:
        self.torch_class: type[torch.optim.Optimizer] = torch_class
        self._decoupled = torch_class is torch.optim.AdamW

    def check(self, group: Hyper) -> None:
        """Raise ValueError for amsgrad, capturable, differentiable, tensors as numbers, a kernel that is not fused, or
        Adam with AdamW's weight decay."""
        not_adam = () if self._decoupled else ("decoupled_weight_decay",)
        _refuse(group, self.torch_class.__name__, "amsgrad", "capturable", "differentiable", *not_adam)

    def apply(self, hyper: Hyper, batch: Batch) -> None:
        """One fused call over all pieces."""
        # Filled where the parameters are: a copy there would be waited for.
        device = batch.params[0].device
        of_step = {
            step: torch.full((), float(step + 1), dtype=torch.float32, device=device) for step in set(batch.steps)
        }
        steps = [of_step[step] for step in batch.steps]
        beta1, beta2 = hyper["betas"]
        kernel = torch._fused_adamw_ if self._decoupled else torch._fused_adam_
        kernel(
            batch.params, batch.grads, batch.states[0], batch.states[1], [], steps,
            lr=hyper["lr"], beta1=beta1, beta2=beta2, weight_decay=hyper["weight_decay"], eps=hyper["eps"],
            amsgrad=False, maximize=hyper["maximize"], grad_scale=None, found_inf=None,
        )  # fmt: skip

    def merge(self, hypers: Sequence[Hyper]) -> list[Hyper]:
        """One update, as with a batch of all these steps, at their mean learning rate times the fourth root of their
        number.

        Malladi et al., On the SDEs and scaling rules for adaptive gradient algorithms, NeurIPS 2022, have the square
        root for a larger batch. These gradients are late as well, which bears less: see docs/lockfree.md.
        """
        if len(hypers) == 1:
            return list(hypers)
        mean = math.fsum(hyper["lr"] for hyper in hypers) / len(hypers)
        return [{**hypers[-1], "lr": mean * len(hypers) ** knobs.MERGED_LR_POWER}]

    def lookahead(self, hyper: Hyper, n_updates: int, n_steps: float) -> Lookahead:
        """Factor of exp_avg, and what is added to the root of exp_avg_sq; both have the corrections for bias in
        them."""
        beta1, beta2 = hyper["betas"]
        reach = hyper["lr"] * _decays(beta1, n_steps)
        if not reach:
            return ()
        root = math.sqrt(1 - beta2**n_updates)
        return reach * root / (1 - beta1**n_updates), hyper["eps"] * root

    def lookahead_hyper(self, hyper: Hyper, n_steps: float) -> Hyper | None:
        """A higher learning rate: the update and the way ahead have one direction, the new exp_avg over its root.
        Decoupled, weights decay as far as the update alone would have them."""
        further = {**hyper, "lr": hyper["lr"] * (1 + _decays(hyper["betas"][0], n_steps))}
        if self._decoupled and further["lr"]:
            further["weight_decay"] = hyper["weight_decay"] * (hyper["lr"] / further["lr"])
        return further

    def apply_lookahead(
        self, lookahead: Lookahead, sign: int, parameter: Tensor, states: Sequence[Tensor], scratch: Tensor, out: Tensor
    ) -> None:
        """Along exp_avg over the root of exp_avg_sq."""
        reach, eps = lookahead
        torch.sqrt(states[1], out=scratch)
        torch.addcdiv(parameter, states[0], scratch.add_(eps), value=-sign * reach, out=out)


class SGDRule:
    """`torch.optim.SGD(fused=True)`, with or without momentum."""

    torch_class: type[torch.optim.Optimizer] = torch.optim.SGD
    hyper_names: ClassVar[tuple[str, ...]] = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    keeps_step: ClassVar[bool] = False

    def __init__(self, *, momentum: bool) -> None:
        self.state_names: tuple[str, ...] = ("momentum_buffer",) if momentum else ()

    def check(self, group: Hyper) -> None:
        """Raise ValueError for differentiable, a tensor lr, a kernel that is not fused, or groups with and without
        momentum in one optimizer."""
        _refuse(group, "SGD", "differentiable")
        if bool(group["momentum"]) != bool(self.state_names):
            raise ValueError("SGD: either all parameter groups have momentum or none")

    def apply(self, hyper: Hyper, batch: Batch) -> None:
        """One fused call for first updates (which set the buffer) and one for the others."""
        for first in (True, False):
            chosen = [i for i, step in enumerate(batch.steps) if (step == 0) is first]
            if chosen:
                torch._fused_sgd_(
                    _take(batch.params, chosen), _take(batch.grads, chosen),
                    _take(batch.states[0], chosen) if self.state_names else [],
                    weight_decay=hyper["weight_decay"], momentum=hyper["momentum"], lr=hyper["lr"],
                    dampening=hyper["dampening"], nesterov=hyper["nesterov"], maximize=hyper["maximize"],
                    is_first_step=first, grad_scale=None, found_inf=None,
                )  # fmt: skip

    def merge(self, hypers: Sequence[Hyper]) -> list[Hyper]:
        """As many updates as steps: parameters move as far as if they had been made one by one."""
        return list(hypers)

    def lookahead(self, hyper: Hyper, n_updates: int, n_steps: float) -> Lookahead:
        """Factor of the momentum buffer.

        Source: Hakimi et al., Taming momentum in a distributed asynchronous environment (DANA), 2019.
        """
        reach = hyper["lr"] * _decays(hyper["momentum"], n_steps)
        return (reach,) if reach else ()

    def lookahead_hyper(self, hyper: Hyper, n_steps: float) -> Hyper | None:
        """A higher learning rate; not with Nesterov's momentum, whose updates have the gradient in them once more."""
        if hyper["nesterov"]:
            return None
        return {**hyper, "lr": hyper["lr"] * (1 + _decays(hyper["momentum"], n_steps))}

    def apply_lookahead(
        self, lookahead: Lookahead, sign: int, parameter: Tensor, states: Sequence[Tensor], scratch: Tensor, out: Tensor
    ) -> None:
        """Along the momentum buffer."""
        torch.add(parameter, states[0], alpha=-sign * lookahead[0], out=out)


def _take(tensors: Sequence[Tensor], chosen: Sequence[int]) -> list[Tensor]:
    return [tensors[i] for i in chosen]


def rule_for(template: torch.optim.Optimizer) -> UpdateRule:
    """The rule that does what ``template`` would do.

    Raises:
        ValueError: its class or one of its options cannot run on pages; the message lists what can.
    """
    rule: UpdateRule
    if isinstance(template, torch.optim.Adam) and type(template) in (torch.optim.AdamW, torch.optim.Adam):
        rule = AdamRule(type(template))
    elif type(template) is torch.optim.SGD:
        rule = SGDRule(momentum=any(group["momentum"] for group in template.param_groups))
    else:
        raise ValueError(f"{type(template).__name__} does not run on pages; use one of torch.optim's AdamW, Adam, SGD")
    for group in template.param_groups:
        rule.check(group)
    return rule
