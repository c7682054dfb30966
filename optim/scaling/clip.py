"""Clipping by global norm, in the very arithmetic of `torch.nn.utils.clip_grad_norm_`.

The global norm is the 2-norm of the parameters' norms, in parameter order, each over the whole parameter: a norm of
slices would round differently. Gradients of 16-bit parameters are widened to fp32 first, as their master's would be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pagemem.errors import NonFiniteError


def gradient_norm(flat: torch.Tensor) -> torch.Tensor:
    """2-norm of one parameter's final gradient (flat, any float dtype), a scalar fp32 tensor."""
    norm: torch.Tensor = torch.linalg.vector_norm(flat.float())
    return norm


def total_norm(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The global norm from the norms of all gradients of a step, in parameter order; where these are, or on the CPU if
    that differs."""
    by_device: dict[torch.device, list[int]] = {}
    for index, norm in enumerate(norms):
        by_device.setdefault(norm.device, []).append(index)
    if len(by_device) == 1:
        together = torch.stack(list(norms))
    else:
        together = torch.empty(len(norms), dtype=norms[0].dtype)
        for indices in by_device.values():
            together[indices] = torch.stack(
                [norms[index] for index in indices]
            ).cpu()  # a device is waited for once, not for each
    total: torch.Tensor = torch.linalg.vector_norm(together)
    return total


def clip_coefficient(total: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What every gradient is multiplied by so that their global norm ``total`` becomes at most ``max_norm`` (> 0)."""
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)


def is_finite(flat: torch.Tensor) -> bool:
    """Whether every element of a tensor is; one pass in most cases, two when the sum alone overflows."""
    if flat.is_meta:
        return True  # It has no values: a rehearsal's.
    return bool(torch.isfinite(flat.sum())) or bool(torch.isfinite(flat).all())


def check_loss(value: float, step: int, where: str = "") -> None:
    """Raise unless a loss is a number.

    Args:
        step: of the optimizer, that it is for; from 1. where: which rank's, for the message.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss of step {step}{where} is {value}: no parameter changed by it; lower the learning rate or look "
            "at the batch"
        )


def check_finite(total: torch.Tensor) -> None:
    """Raise unless a global norm can be clipped by.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    if not bool(torch.isfinite(total)):
        raise NonFiniteError(
            f"the gradients' global norm is {float(total)}: no parameter was changed; lower the learning rate, or look "
            "for the first step with an infinite loss"
        )
