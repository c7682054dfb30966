"""Paged parameters: `nn.Parameter`s whose values are streamed; a `Binder` brings them for each use.

A released parameter keeps its shape, dtype, identity and hooks, but its data is one NaN seen through zero strides.
Every torch function called with it goes through `PagedParameter.__torch_function__`, which asks the binder to bind it:
for the length of that call its data is a view of host pages. So it does not matter where a parameter is used: in its
own module, in another one, tied, in a functional call, in recomputation or under no_grad.

A view that outlives the call (a slice of the parameter, a weight saved by autograd where no hook of ours could take it
down) is a lease of the arena: the pages stay where they are until the last alias is gone.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from offload.parameters.paged_gradient import PagedGradient
from offload.parameters.parameter_gradient import GradientBinder, ParameterGradient
from offload.parameters.tensor_functions import (
    GET_GRAD,
    METADATA,
    REQUIRES_GRAD,
    SET_DATA,
    SET_GRAD,
    among,
    no_torch_function,
)
from optim.exact.updater import ExactUpdater
from optim.unit import Slot, Unit

_POST_HOOK: Final = Tensor.register_post_accumulate_grad_hook


class BoundBetweenUses(Protocol):
    """The units that are bound between uses, too: `offload.binding.bindings.Bindings`.

    Attributes:
        saves_plainly: whether autograd may save parameters as they are.
    """

    saves_plainly: bool

    def follow(self, model: nn.Module, units: Iterable[Unit], updater: ExactUpdater) -> None:
        """Bind units of ``units`` from now on."""

    def step_ended(self) -> None:
        """Bind what stays where it is."""

    def look_at(self, parameter: PagedParameter) -> None:
        """Have every use of a parameter's unit looked at."""

    def notice(self, unit: Unit) -> None:
        """Count what was written to parameters of a unit that nobody asks for."""

    def view(self, unit: Unit, offset_bytes: int, dtype: torch.dtype, numel: int) -> Tensor | None:
        """A flat view of a bound unit's memory; None: it is not bound."""

    def let_go(self, *, for_good: bool = False) -> None:
        """Bind no unit between uses, until a step's end."""

    def disown(self) -> None:
        """In a forked child: every use is looked at, and refused."""


class ParameterBinder(GradientBinder, Protocol):
    """What binds parameters: `offload.parameters.binder.Binder`.

    Attributes:
        owner: the page store.
        bindings: units that are bound between uses.
    """

    owner: object
    bindings: BoundBetweenUses

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], parameters: list[PagedParameter]
    ) -> Any:
        """Call ``func`` with ``parameters`` bound."""

    def adopt(self, parameter: nn.Parameter, unit: Unit, slot: Slot) -> PagedParameter:
        """Make an ordinary parameter another one over the memory of a paged one."""

    def takes_nothing(self, parameter: PagedParameter, values: Tensor) -> bool:
        """Before ``parameter.data = values``: whether nothing is to be done."""

    def watch_gradient(self, parameter: PagedParameter, *, changed: bool = False) -> None:
        """Have the updater take the parameter's gradients from now on."""

    def gather(self, parameters: list[PagedParameter]) -> AbstractContextManager[None]:
        """Have parameters bound inside the block."""

    def refusal(self, name: str) -> RuntimeError:
        """The error for a use after the engine's end."""


class Place:
    """Where a paged parameter's values are, and what it holds while they are not bound.

    Attributes:
        seen: the parameter's count of writes, as torch keeps it, when a view that it counts was first given out; None:
            none was.
    """

    __slots__ = ("binder", "bound", "gradient", "placeholder", "seen", "slot", "unit")

    def __init__(self, binder: ParameterBinder, unit: Unit, slot: Slot) -> None:
        self.binder = binder
        self.unit = unit
        self.slot = slot
        self.bound = 0
        self.gradient = ParameterGradient(binder, unit, slot)
        self.seen: tuple[weakref.ref[Tensor], int] | None = None
        self.placeholder = self._nan()

    def _nan(self) -> Tensor:
        # NaN: values read past the binder's back are conspicuous, and zero strides make writes fail.
        dtype = self.slot.dtype
        value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        return torch.full((), value, dtype=dtype, device=self.binder.torch_device).expand(self.slot.shape)

    def follow(self, parameter: PagedParameter) -> None:
        """Where the unit went on in another dtype or on another device, so does the parameter."""
        if (self.placeholder.dtype, self.placeholder.device) == (self.slot.dtype, self.binder.torch_device):
            return
        self.placeholder = self._nan()
        with no_torch_function():
            parameter.data = self.placeholder


class Revealed:
    """A parameter that wraps other tensors, which are in pages.

    Attributes:
        _plain: the class that it is of without us.
    """

    __slots__ = ()

    _plain: Any


class PagedParameter(nn.Parameter):
    """A parameter whose values live in pages. Made from an ordinary one in place, so that its identity stays."""

    _place: Place

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Bind every paged parameter among the arguments for the length of the call."""
        named = dict(kwargs or {})
        if PagedGradient in types and func != SET_GRAD:
            return NotImplemented  # It comes next, and then again to us, without gradients.
        if any(issubclass(kind, Revealed) for kind in types):
            return NotImplemented  # It binds what is inside, and then it comes to us again.
        with no_torch_function():
            if func in METADATA:
                return func(*args, **named)
            parameters = [*among(PagedParameter, args), *among(PagedParameter, named.values())]
            if func == SET_GRAD:
                return parameters[0]._place.gradient.set(parameters[0], args[1])
            if func == GET_GRAD:
                return parameters[0]._place.gradient.get(parameters[0])
            if func in REQUIRES_GRAD:
                before = parameters[0].requires_grad
                result = func(*args, **named)
                parameters[0]._place.binder.watch_gradient(
                    parameters[0], changed=parameters[0].requires_grad is not before
                )
                return result
            if func is _POST_HOOK:
                result = func(*args, **named)
                parameters[0]._place.gradient.order_hooks(parameters[0])
                return result
            if func == SET_DATA:
                if parameters[0]._place.binder.takes_nothing(parameters[0], args[1]):
                    return None  # As conversions do that change nothing.
                func = _copy_into
            elif func == Tensor.share_memory_:
                raise RuntimeError(
                    f"{parameters[0]._place.slot.name}: a paged parameter cannot be shared with other processes; "
                    "share model.state_dict()"
                )
            return parameters[0]._place.binder.call(func, args, named, parameters)

    # The two methods of tensors that torch keeps from ``__torch_function__``.

    def set_(self, source: Any = None, *place: Any) -> PagedParameter:
        """As ``.data = source``, where the source is a tensor; torch's parametrizations call it."""
        if not isinstance(source, Tensor) or place:
            raise RuntimeError(
                f"{self._place.slot.name}: a paged parameter keeps its memory; write values with "
                "parameter.copy_(values)"
            )
        self.data = source
        return self

    def detach(self) -> Tensor:
        """As torch's. ``nn.Parameter(paged)``, which begins with it, is another parameter over the same pages, while
        the model is built.

        Raises:
            RuntimeError: the engine is made, and parameters cannot be added any more.
        """
        if sys._getframe(1).f_code is not nn.Parameter.__new__.__code__:
            return super().detach()
        binder = self._place.binder
        if binder.updater is not None or binder.closed:
            raise RuntimeError(
                f"nn.Parameter over {self._place.slot.name}, which is paged: an engine's parameters stay as they are; "
                "make parametrizations (weight_norm, ...) and other changes before prepare, or clone the values "
                "(nn.Parameter(weight.detach().clone()))"
            )
        return binder.adopt(nn.Parameter(self._place.placeholder), self._place.unit, self._place.slot)

    def as_subclass(self, cls: type[Any]) -> Any:
        """A view of the values, as that class."""
        return self.view_as(self).as_subclass(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """An ordinary parameter, with the values."""
        with torch.no_grad():
            copied = memo[id(self)] = nn.Parameter(self.clone(), self.requires_grad)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(f"{self._place.slot.name}: a paged parameter cannot be pickled; use model.state_dict()")


@cache
def paged_class(plain: type[nn.Parameter]) -> type[PagedParameter]:
    """The class of paged parameters that were of class ``plain``: they still are, and others (peft) know its name."""
    if issubclass(plain, PagedParameter):
        return plain
    if plain is nn.Parameter:
        return PagedParameter

    return type(plain.__name__, (_Packed, plain), {"__module__": plain.__module__})


class _Packed(PagedParameter):
    """A packed parameter (Params4bit of bitsandbytes) in pages."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, not as that of the class."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        same = device in (None, self.device) and dtype in (None, self.dtype)
        return self if same else super().to(*args, **kwargs)

    def view(self, *shape: Any) -> Any:
        """As torch's; of the shape that it has itself: autograd functions of bitsandbytes keep that until the backward
        pass, and a view would keep pages in RAM."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape
        own = len(sizes) == self.ndim and all(size in (-1, n) for size, n in zip(sizes, self.shape, strict=True))
        return self if own else super().view(*shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """One that is not in pages, with the values and the state of this."""
        with torch.no_grad():
            copied: Any = torch.Tensor._make_subclass(plain_class(type(self)), self.clone(), self.requires_grad)
        memo[id(self)] = copied
        for key, value in vars(self).items():
            if key != "_place":
                vars(copied)[key] = copy.deepcopy(value, memo) if key == "quant_state" else memo.get(id(value), value)
        return copied  # type: ignore[no-any-return]

    def __copy__(self) -> Any:
        return self.__reduce_ex__(2)


def plain_class(paged: type[nn.Parameter]) -> type[nn.Parameter]:
    """The inverse of `paged_class`."""
    return nn.Parameter if paged is PagedParameter else paged.__bases__[1]


def _copy_into(parameter: PagedParameter, values: Tensor) -> None:
    """What ``parameter.data = values`` means in pages: the values are copied."""
    name = parameter._place.slot.name
    if values.shape != parameter.shape:
        raise RuntimeError(
            f"{name}: .data of shape {tuple(values.shape)} for a paged parameter of shape {tuple(parameter.shape)}; a "
            "paged parameter keeps its shape: resize it in plain PyTorch, before it goes to pages (of a checkpoint: "
            "load it in plain transformers, resize, and save_pretrained to a new folder)"
        )
    if (values.dtype, values.device) != (parameter.dtype, parameter.device):
        raise RuntimeError(
            f"{name}: .data of {values.dtype} on {values.device} for a paged parameter of {parameter.dtype} on "
            f"{parameter.device}; convert the model before offload.prepare (or set model.dtype in the configuration), "
            "or write values with parameter.data.copy_(values)"
        )
    with torch.no_grad():
        parameter.copy_(values)
