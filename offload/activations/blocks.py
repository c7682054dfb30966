"""The blocks of a model, and which of them are recomputed in the backward pass instead of keeping what they save.

A block is an entry of a `nn.ModuleList` or `nn.Sequential` with others of its class: a layer of a transformer, a stage
of a tower. Its ``forward`` is wrapped, at no measurable cost; if the block is recomputed, by `torch.utils.checkpoint`.
Blocks whose forward pass has side effects (it changes a buffer, as batch norm does, or draws Python's or NumPy's random
numbers) are never recomputed: the effect would happen twice, and with other numbers. Torch's own random numbers are
restored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload.hooks import MethodHook

_LISTS: Final = (nn.ModuleList, nn.Sequential)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, as it names them: entries of the outermost lists that have others of their class beside
    them."""
    found: list[nn.Module] = []
    if isinstance(model, _LISTS):
        entries = list(model)
        classes = [type(entry) for entry in entries]
        found = [entry for entry in entries if classes.count(type(entry)) > 1 and _is_composed(entry)]
    if not found:
        for child in model.children():
            found.extend(blocks_of(child))
    return list(dict.fromkeys(found))


def _is_composed(module: nn.Module) -> bool:
    """Whether a module is more than one layer: what it saves is more than what it reads."""
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


@dataclass(slots=True)
class Call:
    """One forward pass through a block.

    Attributes:
        ops: of the step under way, while it was in the block.
        input_bytes: of the tensors that it was given. saved_bytes: of what was saved in it.
    """

    ops: range
    input_bytes: int
    saved_bytes: int


@dataclass(slots=True)
class Block:
    """One block of a model.

    Attributes:
        recomputes: it is recomputed in the backward pass.
        calls: in the step under way, in order. past: in the step before.
        has_side_effects: a forward pass has changed a buffer or the state of random generators that are not torch's.
    """

    module: nn.Module
    recomputes: bool = False
    has_side_effects: bool = False
    calls: list[Call] = field(default_factory=list)
    past: list[Call] = field(default_factory=list)


class Blocks:
    """Watches over the blocks of one model. Training thread only.

    Args:
        position: ops of the step under way so far.
        saved_bytes: of all that was saved for a backward pass so far; only ever more.

    Attributes:
        watching: whether side effects of forward passes are looked for.
    """

    def __init__(self, model: nn.Module, position: Callable[[], int], saved_bytes: Callable[[], int]) -> None:
        self._position = position
        self._saved_bytes = saved_bytes
        self.watching = True
        self._blocks = [Block(module) for module in blocks_of(model)]
        self._undo = [self._wrap(block) for block in self._blocks]

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    @property
    def n_recomputed(self) -> int:
        """Blocks that are recomputed."""
        return sum(block.recomputes for block in self._blocks)

    def step_ended(self) -> None:
        """What was noted of calls is now of the step before."""
        for block in self._blocks:
            block.past, block.calls = block.calls, []

    def close(self) -> None:
        """Leave the model as it was. Idempotent."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _wrap(self, block: Block) -> Callable[[], None]:
        module, inner = block.module, block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            # Within a backward pass it is the model's own recomputation that calls.
            if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
                return inner(*args, **kwargs)
            begun, saved_bytes = self._position(), self._saved_bytes()
            traces = _traces(module) if self.watching else None
            if block.recomputes:
                result = checkpoint(inner, *args, use_reentrant=False, **kwargs)
            else:
                result = inner(*args, **kwargs)
            if traces is not None and _traces(module) != traces:
                block.has_side_effects = True
            block.calls.append(
                Call(
                    range(begun, self._position()),
                    _bytes_in([*args, *kwargs.values()]),
                    self._saved_bytes() - saved_bytes,
                )
            )
            return result

        return MethodHook(forward, module, "forward").undo


def _traces(module: nn.Module) -> tuple[Any, ...]:
    """What a forward pass must leave as it is."""
    numbers: Any = np.random.get_state()
    buffers = [(id(buffer), buffer._version) for buffer in module.buffers()]
    return buffers, random.getstate(), numbers[1].tobytes(), numbers[2]


def _bytes_in(values: list[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
