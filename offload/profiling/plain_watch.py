"""Watches training that does not use the engine: what each module's tensors hold, and when each computes.

Nothing of the model is changed but for hooks, which are taken off again, and no value: gradients and updates are bit
for bit those of unwatched steps. Which module a backward pass works for is told by whose saved tensors it asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from offload.activations.saved_storage import KeptTensor
from offload.profiling.live_storages import Holder, LiveStorages
from pagemem.telemetry.recorder import UNKNOWN_CAUSE, Recorder, Recording
from pagemem.tier import Tag, Tier
from scheduler.planning.trace import OpKind

#: Name of the spans and tensors of an optimizer.
OPTIMIZER: Final = "optimizer"
#: Followed as what a module keeps, rather than what its ops left over.
KEPT: Final = (Tag.PARAM, Tag.GRAD, Tag.MOMENT, Tag.ACTIVATION)


class PlainWatch:
    """Records a model's training from `__enter__` to `__exit__`. Entered and left on the training thread, once.

    Args:
        model: on CPU or CUDA.
        optimizer: makes the steps.

    Attributes:
        peaks: most bytes that each module held at once for each of `KEPT`, by (module, tag).
        at_peak: bytes of each tag when most was held in all, on all devices together.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._modules = [(name or type(model).__name__, module) for name, module in model.named_modules()]
        self._owners = {
            id(parameter): (owner, parameter)
            for owner, module in self._modules
            for parameter in module.parameters(recurse=False)
        }
        self._buffers = [(owner, b) for owner, module in self._modules for b in module.buffers(recurse=False)]
        self._storages = LiveStorages(self._changed)
        self._exits = ExitStack()
        self._within: list[str] = []
        self._computing = ""
        self._recorder: Recorder | None = None
        self._held: Counter[tuple[Tier, Tag]] = Counter()
        self._by_module: Counter[tuple[str, Tag]] = Counter()
        self._by_tag: Counter[Tag] = Counter()
        self.peaks: Counter[tuple[str, Tag]] = Counter()
        self.at_peak: Counter[Tag] = Counter()

    # ---- what is told -------------------------------------------------------------------------------------------

    def _changed(self, holder: Holder, more_bytes: int) -> None:
        tier = Tier.HOST if holder.device == "cpu" else Tier.DEVICE
        if self._recorder is None:
            self._held[tier, holder.tag] += more_bytes
        else:
            self._recorder.held(tier, holder.tag, more_bytes)
        self._by_tag[holder.tag] += more_bytes
        if more_bytes > 0 and self._by_tag.total() > self.at_peak.total():
            self.at_peak = self._by_tag.copy()
        if holder.tag in KEPT:
            key = holder.name, holder.tag
            self._by_module[key] += more_bytes
            self.peaks[key] = max(self.peaks[key], self._by_module[key])

    def _compute(self, kind: OpKind | None, name: str) -> None:
        """What the training thread does from now on; None: nothing of the model's."""
        assert self._recorder is not None
        self._computing = name
        self._recorder.ends()
        if kind is not None:
            self._recorder.begins(kind.value, name, name, 0)

    def _enters(self, name: str) -> None:
        self._within.append(name)
        self._compute(OpKind.FORWARD, name)

    def _leaves(self) -> None:
        self._within.pop()
        self._compute(OpKind.FORWARD if self._within else None, self._within[-1] if self._within else "")

    def _pack(self, tensor: Tensor) -> tuple[KeptTensor, str]:
        module = self._within[-1] if self._within else self._modules[0][0]
        self._hold_unless_kept(tensor, Tag.ACTIVATION, module)
        return KeptTensor(tensor), module

    def _unpack(self, saved: tuple[KeptTensor, str]) -> Tensor:
        kept, module = saved
        if not self._within and self._computing != module:
            self._compute(OpKind.BACKWARD, module)
        return kept.unpack()

    def _has_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._storages.hold(parameter.grad, Tag.GRAD, self._owners[id(parameter)][0])

    def _updated(self, *_: Any) -> None:
        self._hold_states()
        assert self._recorder is not None
        self._recorder.step_ends()
        self._compute(None, "")

    def _hold_states(self) -> None:
        for parameter, state in self._optimizer.state.items():
            owner = self._owners.get(id(parameter), (OPTIMIZER, None))[0]
            for value in tree_leaves(state):
                if isinstance(value, Tensor):
                    self._hold_unless_kept(value, Tag.MOMENT, owner)

    def _hold_unless_kept(self, tensor: Tensor, tag: Tag, owner: str) -> None:
        """A weight that autograd saves stays a weight, and one that an optimizer keeps, too."""
        holder = self._storages.holder(tensor)
        if holder is None or holder.tag is Tag.TEMPORARY:
            self._storages.hold(tensor, tag, owner)

    # ---- begin and end ------------------------------------------------------------------------------------------

    def __enter__(self) -> PlainWatch:
        """Begin to record."""
        for owner, parameter in self._owners.values():
            self._storages.hold(parameter, Tag.PARAM, owner)
        for owner, buffer in self._buffers:
            self._storages.hold(buffer, Tag.PARAM, owner)
        for _, parameter in self._owners.values():
            self._has_gradient(parameter)
        self._hold_states()
        self._recorder = Recorder(lambda _: UNKNOWN_CAUSE)
        with ExitStack() as undo:
            for name, module in self._modules:
                undo.callback(module.register_forward_pre_hook(lambda *_, name=name: self._enters(name)).remove)
                undo.callback(module.register_forward_hook(lambda *_: self._leaves(), always_call=True).remove)
            for _, parameter in self._owners.values():
                if parameter.requires_grad and parameter.is_leaf:
                    undo.callback(parameter.register_post_accumulate_grad_hook(self._has_gradient).remove)
            undo.callback(
                self._optimizer.register_step_pre_hook(lambda *_: self._compute(OpKind.UPDATE, OPTIMIZER)).remove
            )
            undo.callback(self._optimizer.register_step_post_hook(self._updated).remove)
            undo.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            undo.enter_context(self._storages)
            self._exits = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def recording(self) -> Recording:
        """Everything recorded, once the block is over."""
        assert self._recorder is not None
        return self._recorder.finish(self._held)

    def bytes_by_module(self) -> Mapping[str, Mapping[Tag, int]]:
        """`peaks` by module, in the model's order; modules that hold nothing are left out."""
        names = [*(name for name, _ in self._modules), OPTIMIZER]
        found = {name: {tag: self.peaks[name, tag] for tag in KEPT if self.peaks[name, tag]} for name in names}
        return {name: tags for name, tags in found.items() if tags}
