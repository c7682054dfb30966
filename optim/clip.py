"""Clipping by global norm, in the very arithmetic of `torch.nn.utils.clip_grad_norm_`.

The global norm is the 2-norm of the parameters' norms, in parameter order, each over the whole parameter: a norm of
slices would round differently. Gradients of 16-bit parameters are widened to fp32 first, as their master's would be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagemem.errors import NonFiniteError


def gradient_norm(flat: torch.Tensor) -> torch.Tensor:
    """2-norm of one parameter's final gradient (flat, any float dtype), a scalar fp32 tensor."""
    norm: torch.Tensor = torch.linalg.vector_norm(flat.float())
    return norm


def clip_coefficient(norms: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """What every gradient is multiplied by so that their global norm is at most ``max_norm``.

    Args:
        norms: norms of all gradients of the step, in parameter order.
        max_norm: largest global norm wanted, > 0.

    Raises:
        NonFiniteError: the global norm is NaN or infinite.
    """
    total = torch.linalg.vector_norm(torch.stack(list(norms)))
    if not bool(torch.isfinite(total)):
        raise NonFiniteError(
            f"the gradients' global norm is {float(total)}: no parameter was changed; lower the learning rate, or look "
            "for the first step with an infinite loss"
        )
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)
