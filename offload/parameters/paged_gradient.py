"""``parameter.grad`` of a paged parameter: a tensor whose values are where the updater has them, brought for each use.

Reading it, editing it in place, views of it (``.data``, slices) and lists of them in one call (``torch._foreach_...``,
which are taken one after another, so that not all gradients need be in memory at once) work as with a plain tensor, as
long as there is a gradient. After it was cleared, or assigned anew, a tensor that stood for it raises, and so does one
whose gradient an update has used up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from offload.parameters.tensor_functions import METADATA, REQUIRES_GRAD, SET_DATA, among, no_torch_function
from optim.unit import Slot, Unit
from optim.updater import Updater

_LISTS: Final = ("_foreach_", "_amp_foreach_")
#: What these return is a copy: somebody else's array, pickle or deep copy.
_COPIED: Final[tuple[Any, ...]] = (Tensor.numpy, Tensor.__array__, Tensor.__reduce_ex__, Tensor.__deepcopy__)

_REFUSED: Final = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.__dlpack__}


@dataclass(frozen=True, slots=True)
class GradientPlace:
    """Whose gradient a tensor stands for, and which part of it.

    Attributes:
        generation: of the slot's gradient: when the slot has another one, that gradient is gone.
        view: dtype, size, strides and first element of a view of it; None: all of it, in the parameter's shape.
        save_hooks: have what autograd saves of it copied.
    """

    updater: Updater
    unit: Unit
    slot: Slot
    generation: int
    save_hooks: Callable[[], AbstractContextManager[Any]]
    view: tuple[torch.dtype, torch.Size, tuple[int, ...], int] | None = None

    @contextmanager
    def bound(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inside the block: all of the gradient, flat, and what the tensor stands for.

        Raises:
            RuntimeError: the gradient is gone, or was used up.
        """
        if self.generation != self.slot.generation:
            raise RuntimeError(
                f"{self.slot.name}: this gradient was cleared or replaced; copy it before, with .grad.clone()"
            )
        with self.updater.values(self.unit, self.slot) as flat:
            if self.view is None:
                yield flat, flat.view(self.slot.shape)
            else:
                dtype, size, stride, first = self.view
                typed = flat.view(dtype)
                yield flat, typed.as_strided(size, stride, typed.storage_offset() + first)


class SpreadGradient:
    """A gradient in several places, which comes to us for each of them."""

    __slots__ = ()


class PagedGradient(Tensor):
    """What `PagedParameter.grad` is. Its own memory is one NaN."""

    _place: GradientPlace

    @classmethod
    def standing_for(cls, place: GradientPlace, device: torch.device) -> PagedGradient:
        """A tensor for a gradient that is there."""
        dtype, size = (place.slot.dtype, place.slot.shape) if place.view is None else place.view[:2]
        with no_torch_function():
            made = torch.full((), float("nan")).to(device, dtype).expand(size).as_subclass(cls)
        made._place = place
        return made

    @property
    def is_current(self) -> bool:
        """Whether it stands for all of the gradient that its parameter has now."""
        return self._place.generation == self._place.slot.generation and self._place.view is None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Bind every gradient among the arguments for the length of the call."""
        named = dict(kwargs or {})
        if any(issubclass(kind, SpreadGradient) for kind in types):
            return NotImplemented  # It comes next, and then to us for one place after another.
        if func in METADATA:
            with no_torch_function():
                return func(*args, **named)
        first = args[0] if args and isinstance(args[0], PagedGradient) else None
        if first is not None:
            if func is Tensor.zero_ and first.is_current:
                first._place.updater.zero(first._place.unit, first._place.slot)
                return first
            if func is Tensor.detach_ or (
                func is Tensor.requires_grad_ and not (args[1] if len(args) > 1 else named.get("requires_grad", True))
            ):
                return first
            if func in _REFUSED or func in REQUIRES_GRAD:
                name = getattr(func, "__name__", "this")
                raise RuntimeError(
                    f"{first._place.slot.name}: {name} of a gradient in pages; copy it first, with .grad.clone()"
                )
            if func == SET_DATA:
                func = Tensor.copy_
        if getattr(func, "__name__", "").startswith(_LISTS):
            return _one_by_one(func, args, named)
        return _call(func, args, named)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        values = [_mapped(one, change) for one in value]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    return change(value)


def _one_by_one(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of lists once for each place in them."""
    n_places = len(args[0])
    results = [
        _call(
            func,
            tuple([arg[i]] if isinstance(arg, (list, tuple)) and len(arg) == n_places else arg for arg in args),
            kwargs,
        )
        for i in range(n_places)
    ]
    return None if not results or results[0] is None else [one for result in results for one in result]


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``func`` with the values of gradients; views of them that it returns are gradients again."""
    bound: dict[int, tuple[PagedGradient, Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for gradient in [*among(PagedGradient, args), *among(PagedGradient, kwargs.values())]:
            if id(gradient) not in bound:
                flat, view = stack.enter_context(gradient._place.bound())
                bound[id(gradient)] = gradient, flat, view.clone() if func in _COPIED else view

        def value_of(argument: Any) -> Any:
            return bound[id(argument)][2] if isinstance(argument, PagedGradient) else argument

        def standing_for(result: Any) -> Any:
            if isinstance(result, Tensor) and result.layout is torch.strided and result.numel():
                for gradient, flat, view in bound.values():
                    if result is view:
                        return gradient
                    if result.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
                        return _view_of(gradient._place, flat, result)
            return result

        stack.enter_context(next(iter(bound.values()))[0]._place.save_hooks())
        result = func(*_mapped(args, value_of), **{name: _mapped(value, value_of) for name, value in kwargs.items()})
        name = getattr(func, "__name__", "")
        if (name.endswith("_") and not name.endswith("__")) or str(getattr(func, "__module__", "")).startswith(
            "torch.distributed"
        ):
            # Some kernels of lists, and collectives, write without saying so.
            increment_version([view for _, _, view in bound.values()])
        if func in (Tensor.numpy, Tensor.__array__):
            result.setflags(write=False)  # What is written there would not reach the gradient.
        return result if func in _COPIED else _mapped(result, standing_for)


def _view_of(place: GradientPlace, flat: Tensor, result: Tensor) -> PagedGradient:
    """A tensor for a view of a gradient."""
    if result.dtype.itemsize != flat.dtype.itemsize:
        raise RuntimeError(
            f"{place.slot.name}: a view of its gradient as {result.dtype}; copy it first, with .grad.clone()"
        )
    first = int(result.storage_offset() - flat.storage_offset())
    return PagedGradient.standing_for(
        replace(place, view=(result.dtype, result.size(), result.stride(), first)), result.device
    )
