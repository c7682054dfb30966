"""What the engine would save of the memory that training takes without it: arithmetic over a model that is there.

Not a forecast of a run (that is `offload plan`): peaks are those of the tensors watched, with parameters, states and
gradients replaced by what a budget lets stay in RAM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import nn

from offload.budget.need import Sizes, budget_need, shapes_of
from offload.config import Config
from offload.parameters.optimizer_template import optimized_by
from optim.rules import rule_for
from pagemem.tier import Tag

#: Parts of the states that a budget is shown for, beside the smallest that works.
SHARES: Final = (0.25, 0.5, 1.0)
#: Of the saved activations, in the last row.
ACTIVATIONS_SHARE: Final = 1 / 3
#: Most bytes that a step moves for each byte of parameters, where none stay: read for the forward and the backward
#: pass, and written once; states are read and written once.
_PARAMETER_READS: Final = 2


@dataclass(frozen=True, slots=True)
class Saving:
    """A budget and what comes of it.

    Attributes:
        ram_bytes: `memory.ram`. activations_bytes: `memory.activations`, None: not set.
        peak_bytes: of tensors, where the watched steps had ``plain_bytes``.
        ssd_bytes: of parameters and states in page files.
        read_bytes, written_bytes: moved in a step, at most.
    """

    ram_bytes: int
    activations_bytes: int | None
    peak_bytes: int
    plain_bytes: int
    ssd_bytes: int
    read_bytes: int
    written_bytes: int


def savings(model: nn.Module, optimizer: torch.optim.Optimizer, at_peak: Mapping[Tag, int]) -> list[Saving]:
    """Budgets from the smallest that works to one that holds everything, and the quarter with `memory.activations`.

    Args:
        at_peak: bytes of each tag when the watched steps held most.

    Raises:
        ValueError: the engine has no rule for this optimizer or its options, or the model nothing to page.
    """
    n_states = len(rule_for(optimizer).state_names)
    units = shapes_of(model, optimized_by(optimizer))
    config = Config.model_validate({"memory": {"ram": "1GiB"}, "ssd": {"paths": ["pages"]}})
    shapes = units(replace(Sizes.of(config), page_bytes=1, cuts=False))
    if not shapes:
        raise ValueError("the model has no floating-point parameters to page")
    smallest_bytes = budget_need(units, n_states, config).smallest_bytes
    parameter_bytes = sum(shape.numel * shape.dtype.itemsize for shape in shapes)
    trained = [shape for shape in shapes if shape.trained]
    state_bytes = sum(shape.numel * 4 * (n_states + (shape.dtype is not torch.float32)) for shape in trained)
    # Updated as each one's gradients are final: no more than one unit's wait at a time.
    gradient_bytes = max((shape.numel * shape.dtype.itemsize for shape in trained), default=0)
    plain_bytes = sum(at_peak.values())
    others_bytes = at_peak.get(Tag.ACTIVATION, 0) + at_peak.get(Tag.TEMPORARY, 0)
    whole_bytes = parameter_bytes + state_bytes

    def saving(ram_bytes: int, spared_bytes: int = 0) -> Saving:
        activations_bytes = at_peak.get(Tag.ACTIVATION, 0) - spared_bytes if spared_bytes else None
        away = max(0, whole_bytes - ram_bytes) / whole_bytes
        read_bytes = away * (_PARAMETER_READS * parameter_bytes + state_bytes) + spared_bytes
        peak_bytes = min(ram_bytes, whole_bytes) + gradient_bytes + others_bytes - spared_bytes
        written_bytes = away * (sum(s.numel * s.dtype.itemsize for s in trained) + state_bytes) + spared_bytes
        return Saving(
            ram_bytes, activations_bytes, peak_bytes, plain_bytes, max(0, whole_bytes - ram_bytes) + spared_bytes,
            round(read_bytes), round(written_bytes),
        )  # fmt: skip

    budgets = sorted({smallest_bytes, *(max(smallest_bytes, round(share * whole_bytes)) for share in SHARES)})
    quarter_bytes = max(smallest_bytes, round(SHARES[0] * whole_bytes))
    spared_bytes = round((1 - ACTIVATIONS_SHARE) * at_peak.get(Tag.ACTIVATION, 0))
    found = [saving(ram_bytes) for ram_bytes in budgets]
    return [*found, saving(quarter_bytes, spared_bytes)] if spared_bytes else found
