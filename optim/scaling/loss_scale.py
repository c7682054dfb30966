"""Loss scaling for 16-bit floats, and the factor that every gradient of a step gets: scaling back and clipping in one.

The loss of each micro-batch is multiplied by a power of two so that small gradients do not vanish in fp16. A step whose
gradients overflowed is dropped whole and the scale halved; after a run of good steps it is doubled. The scale changes
at the optimizer step only, so all micro-batches of a step have the same.

Source: Micikevicius et al., Mixed Precision Training (ICLR 2018), section 3.2; defaults of `torch.amp.GradScaler`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from optim.scaling.clip import clip_coefficient

FIRST_SCALE: Final = 2.0**16
GROWTH_INTERVAL: Final = 2000
#: A scale beyond these is of no use: gradients would be lost, or overflow, all the same.
LEAST_SCALE: Final = 2.0**-14
MOST_SCALE: Final = 2.0**24


@dataclass(slots=True)
class LossScale:
    """What losses are multiplied by.

    Attributes:
        dynamic: whether overflows and good steps change it.
        good_steps: steps without overflow since it last changed.
        dropped_steps: steps that overflowed.
    """

    scale: float = FIRST_SCALE
    dynamic: bool = True
    good_steps: int = 0
    dropped_steps: int = 0

    def update(self, *, finite: bool) -> None:
        """A step's gradients were all finite, or not."""
        if not finite:
            self.dropped_steps += 1
            self.good_steps = 0
            if self.dynamic:
                self.scale = max(LEAST_SCALE, self.scale / 2)
            return
        self.good_steps += 1
        if self.dynamic and self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = min(MOST_SCALE, self.scale * 2), 0

    def state_dict(self) -> dict[str, Any]:
        """For a commit."""
        return {"scale": self.scale, "good_steps": self.good_steps, "dropped_steps": self.dropped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a commit."""
        self.scale, self.good_steps = float(state_dict["scale"]), int(state_dict["good_steps"])
        self.dropped_steps = int(state_dict["dropped_steps"])


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a step's gradients are scaled before the update.

    Attributes:
        clip_norm: largest global 2-norm of the gradients, or None.
        loss_scale: what the losses were multiplied by, or None.
    """

    clip_norm: float | None = None
    loss_scale: LossScale | None = None

    @property
    def needs_norm(self) -> bool:
        """Whether the norm of all gradients must be known before any of them is used."""
        return self.clip_norm is not None or self.loss_scale is not None

    def unscaled(self, total: torch.Tensor) -> torch.Tensor:
        """The global norm of a step's gradients without the loss scale, from that with it."""
        return total if self.loss_scale is None else total / self.loss_scale.scale

    def coefficient(self, total: torch.Tensor) -> torch.Tensor | None:
        """What to multiply gradients of global norm ``total`` by; None when it is not finite: then the step is to be
        dropped."""
        finite, inverse = bool(torch.isfinite(total)), 1.0
        if self.loss_scale is not None:
            inverse = 1 / self.loss_scale.scale
            self.loss_scale.update(finite=finite)
        if not finite:
            return None
        if self.clip_norm is None:
            return torch.tensor(inverse)
        return clip_coefficient(total * inverse, self.clip_norm) * inverse
