"""A unit without a model, and gradients for it that show which steps they are of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.layout import cut, lay_out
from optim.lockfree.unit_channel import GradientSum
from optim.unit import Slot, Unit
from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag
from pagemem.units import KiB

PAGE_BYTES = 64 * KiB


def unit_of(*numels: int, number: int = 0) -> Unit:
    """A unit with one fp32 parameter of each size, all in group 0, in the frame of its own number."""
    layout = lay_out([(f"{number}.{letter}", torch.Size([numel])) for letter, numel in zip("abcdefgh", numels)])
    tensor = PagedTensor.sized(TensorId(number), f"unit {number}", Tag.PARAM, layout.numel * 4, PAGE_BYTES)
    tensor.frame, tensor.resident = FrameId(number), True
    slots = [Slot(name, shape, torch.float32, offset, group=0) for name, shape, offset in layout.slots]
    return Unit(number, f"unit {number}", torch.float32, tensor, slots, cut(layout.numel, layout.numel))


def mark(numel: int, *steps: int) -> Tensor:
    """Zeros with a one at the place of each step."""
    marked = torch.zeros(numel)
    for step in steps:
        marked[step] += 1
    return marked


def sums(slots: Sequence[Slot], step: int) -> dict[Slot, GradientSum]:
    """One step's gradients of some parameters; the learning rate is the step."""
    return {slot: GradientSum(slot, mark(slot.numel, step), [{"lr": step}]) for slot in slots}
