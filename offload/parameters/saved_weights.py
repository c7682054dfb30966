"""Saved weights: what autograd keeps of a paged parameter between forward and backward is its place, not its bytes.

`nn.Linear` and most other layers save the weight, or a view of it, for their backward. Kept as it is, such a view would
hold the unit's pages until then. `SavedWeights` records unit, offset, shape and strides instead and fetches the unit
again when the backward asks. Torch applies the innermost saved-tensor hooks only; where others are active around an op
(non-reentrant checkpointing, `save_on_cpu`), they get everything but the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.activations.saved_storage import KeptTensor, OffloadedActivation
from offload.hooks import ModelHook, refuse_compiled, refuse_compilers
from offload.parameters.binder import Binder
from offload.parameters.paged_parameter import PagedParameter
from optim.unit import Unit
from scheduler.planning.trace import Access, AccessMode, OpKind


class SavedView:
    """The place of a saved weight. While one lives, its unit's update waits: the backward has yet to read the values.

    Args:
        offset_bytes: where its first element lies in the unit's pages.
    """

    __slots__ = ("__weakref__", "dtype", "offset_bytes", "size", "stride", "unit", "version")

    def __init__(
        self, unit: Unit, offset_bytes: int, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.unit = unit
        self.offset_bytes = offset_bytes
        self.size = size
        self.stride = stride
        self.dtype = dtype
        self.version = unit.version
        unit.views.watch(self, None)


#: A pack and an unpack hook.
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


@dataclass(frozen=True, slots=True)
class _Foreign:
    """What a pack hook around ours made of a saved tensor, and the unpack hook beside it."""

    packed: Any
    unpack_hook: Callable[[Any], Tensor]

    def unpack(self) -> Tensor:
        return self.unpack_hook(self.packed)


@dataclass(frozen=True, slots=True)
class _PackHook:
    """A pack hook that is told from others' by whose it is; ``around``: the hooks that it stands before."""

    of: SavedWeights
    around: Hooks | None

    def __call__(self, saved: Tensor) -> Packed:
        return self.of.pack(saved, self.around)


#: What autograd holds of a saved tensor.
Packed = KeptTensor | OffloadedActivation | SavedView | _Foreign


class SavedWeights:
    """Saved-tensor hooks over one binder's arena. Forward on the training thread; unpacking on autograd's."""

    def __init__(self, binder: Binder) -> None:
        self._binder = binder

    def pack(self, saved: Tensor, around: Hooks | None = None) -> Packed:
        """A place for views of pages and for what is to go there, the tensor itself for everything else.

        Args:
            around: others' hooks, which get everything but weights.
        """
        if isinstance(saved, PagedParameter) and saved._place.binder is self._binder:
            if saved._place.slot.numel:
                return self._whole(saved)
            saved = saved._place.placeholder
        dense = self._dense(saved)
        place = self._place(saved) if dense else None
        if isinstance(place, SavedView):
            return place
        kept = saved if place is None else place
        if around is not None:
            return _Foreign(around[0](kept), around[1])
        activations = self._binder.activations
        return KeptTensor(kept) if activations is None or kept is not saved or not dense else activations.pack(kept)

    def _whole(self, parameter: PagedParameter) -> SavedView:
        """Where a whole parameter is, also while it is not bound (an `autograd.Function` saves what it was given)."""
        slot = parameter._place.slot
        self._notice(parameter._place.unit)
        stride = tuple(math.prod(slot.shape[dim + 1 :]) for dim in range(len(slot.shape)))
        return SavedView(parameter._place.unit, slot.offset * slot.dtype.itemsize, slot.shape, stride, slot.dtype)

    def _notice(self, unit: Unit) -> None:
        self._binder.edits.notice(unit)
        self._binder.bindings.notice(unit)

    def _dense(self, saved: Tensor) -> bool:
        return saved.layout is torch.strided and saved.device == self._binder.torch_device and saved.numel() > 0

    def _place(self, saved: Tensor) -> SavedView | Tensor | None:
        """Where a weight is; a copy of what else is in pages, which is a gradient; None for everything else."""
        mover = self._binder.mover
        located = mover.arena.locate(saved)
        if located is None:
            return None
        frame, offset = located
        with mover.changed:
            owner = mover.host.owner(frame)
            unit = self._binder.units.get(owner) if owner is not None else None
            if unit is None or unit.compute.frame is None:
                return saved.clone()
            start = (frame - unit.compute.frame) * mover.arena.page_bytes + offset
        self._notice(unit)
        return SavedView(unit, start, saved.size(), saved.stride(), saved.dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """The saved tensor again, brought back when it has left host memory.

        Raises:
            RuntimeError: it has changed since it was saved, so the gradient would be wrong.
        """
        if isinstance(packed, (KeptTensor, _Foreign)):
            return packed.unpack()
        if isinstance(packed, OffloadedActivation):
            if self._binder.closed or self._binder.activations is None:
                raise self._binder.refusal("what the forward pass saved")
            return self._binder.activations.unpack(packed)
        unit = packed.unit
        if self._binder.closed:
            raise self._binder.refusal(unit.name)
        self._notice(unit)
        if unit.version != packed.version:
            raise RuntimeError(
                f"{unit.name} has been updated or edited since it was saved for this backward pass (version "
                f"{packed.version}, now {unit.version}); call backward before optimizer.step() and before edits"
            )
        reach = 1 + sum((size - 1) * stride for size, stride in zip(packed.size, packed.stride, strict=True))
        flat = self._binder.bindings.view(unit, packed.offset_bytes, packed.dtype, reach)
        if flat is not None:
            return flat.as_strided(packed.size, packed.stride, flat.storage_offset())
        self._binder.forward_end.backward_use()
        driver = self._binder.driver
        key = (OpKind.BACKWARD, (unit.index,))
        held = driver.begin(key, unit.name, [Access(unit.compute.id, AccessMode.READ)])
        try:
            flat = self._binder.mover.lease(unit.compute, packed.offset_bytes, packed.dtype, reach)
            return flat.as_strided(packed.size, packed.stride)
        finally:
            driver.end(held)

    def scope(self) -> AbstractContextManager[Any]:
        """Hooks for one call, unless they are active already; others' hooks get what is not a weight."""
        if not torch.is_grad_enabled():
            return nullcontext()
        around: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if around is not None and getattr(around[0], "of", None) is self:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(_PackHook(self, around), self.unpack)

    def around_forward(
        self, module: torch.nn.Module, structure_is_known: Callable[[], bool]
    ) -> list[Callable[[], None]]:
        """Have the hooks active during the forward of the whole model, for views of parameters that outlive their call.

        Args:
            structure_is_known: whether the model has the parameters that are in pages.

        Returns:
            What removes them again.
        """
        stack: list[ExitStack] = []

        def enter(_module: torch.nn.Module, _args: Any) -> None:
            refuse_compilers(type(module).__name__)
            refuse_compiled(module)
            self._binder.state_copies.check()
            # torch.func.functional_call has other parameters in the model until the forward pass is over.
            self._binder.doubted = not structure_is_known()
            context = ExitStack()
            if not torch.is_grad_enabled() and not module.training:
                context.enter_context(self._binder.driver.evaluating())
            if not self._binder.bindings.saves_plainly:
                context.enter_context(self.scope())
            stack.append(context)
            self._binder.forwards += 1
            self._binder.pointed.clear()
            self._binder.state_copies.copying = 0  # A state_dict() that raised did not come to its end.

        def leave(_module: torch.nn.Module, _args: Any, _result: Any) -> None:
            if stack:
                self._binder.forwards -= 1
                self._binder.pointed.clear()
                stack.pop().close()

        handles = [
            module.register_forward_pre_hook(ModelHook(enter)),
            module.register_forward_hook(ModelHook(leave), always_call=True),
        ]
        return [handle.remove for handle in handles]
