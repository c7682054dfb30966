"""Quantised parameters: pages hold the tensors that they are made of.

A tensor subclass that wraps others (torchao's) has no memory of its own; those inside become frozen paged parameters in
their places, which its operations find there. A packed parameter with a state of tensors (Params4bit of bitsandbytes)
is paged itself, and so are the tensors of its state. All are frozen: what is trained over them is an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Final

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.tensor_functions import METADATA

#: Attributes of a packed parameter's state that hold a tensor, or another state.
_STATE_ATTRIBUTES: Final = ("absmax", "code", "offset", "state2")


def is_wrapper(parameter: Tensor) -> bool:
    """Whether a parameter's values are in other tensors alone."""
    return not isinstance(parameter, PagedParameter) and is_traceable_wrapper_subclass(parameter)


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter holds packed values, of which a state of its own says what they mean."""
    return getattr(parameter, "quant_state", None) is not None


def is_pageable(parameter: Tensor) -> bool:
    """Whether pages hold a parameter as it is: floating-point ones, and quantised values, which are frozen."""
    if is_wrapper(parameter):
        return False
    return parameter.is_floating_point() or is_packed(parameter) or getattr(parameter, "_is_inner", False)


@cache
def _wrapper_class(plain: type[nn.Parameter]) -> type[nn.Parameter]:
    """The class of wrappers that were of class ``plain``: it binds what is inside for the length of each call.

    Not every operation of a wrapper asks the tensors inside for theirs: torch calls most with their
    ``__torch_function__`` off.
    """

    def torch_function(
        cls: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        call = super(made, cls).__torch_function__
        inside = [] if func in METADATA else _paged_inside([*args, *named.values()])
        if not inside:
            return call(func, types, args, named)
        binder: Any = inside[0]._place.binder
        with binder.using(inside):
            result = call(func, types, args, named)
            return _plain_results(result, copy=binder.copying > 0)

    made: Any = type(
        plain.__name__,
        (plain,),
        {"__torch_function__": classmethod(torch_function), "_plain": plain, "__module__": plain.__module__},
    )
    return made  # type: ignore[no-any-return]


def _paged_inside(values: Iterable[Any]) -> list[PagedParameter]:
    found = [inner for value in values if isinstance(value, Tensor) for _, _, inner in _inner(value)]
    return [inner for inner in found if isinstance(inner, PagedParameter)]


def _plain_results(result: Any, *, copy: bool) -> Any:
    """What an operation of a wrapper has returned, of the class that it has in plain PyTorch."""
    if isinstance(result, (tuple, list)):
        return type(result)(_plain_results(one, copy=copy) for one in result)
    if isinstance(result, Tensor) and is_wrapper(result) and not _paged_inside([result]):
        result.__class__ = _plain_class(type(result))
        return result.clone() if copy else result
    return result


def _plain_class(made: type[Any]) -> type[Any]:
    return getattr(made, "_plain", made)


def conceal(parameter: nn.Parameter) -> None:
    """The inverse of `reveal` for one wrapper, whose tensors are ordinary again."""
    parameter.__class__ = _plain_class(type(parameter))


def reveal(model: nn.Module) -> None:
    """Have the tensors inside of quantised parameters be frozen parameters in their places. Idempotent.

    Raises:
        ValueError: a quantised parameter is to be trained.
    """
    for name, parameter in model.named_parameters():
        for owner, path, inner in _inner(parameter):
            if parameter.requires_grad:
                raise ValueError(
                    f"{name} is quantised ({type(parameter).__name__}) and requires a gradient; freeze it with "
                    "requires_grad_(False), and train an adapter over it"
                )
            if not isinstance(inner, nn.Parameter):
                made = nn.Parameter(inner.detach().contiguous(), requires_grad=False)
                made._is_inner = True  # type: ignore[attr-defined]
                setattr(owner, path.rpartition(".")[2], made)
        if is_wrapper(parameter) and _plain_class(type(parameter)) is type(parameter):
            parameter.__class__ = _wrapper_class(type(parameter))


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters, and after each the tensors inside of it, named ``weight.qdata`` or the like."""
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter
        yield from ((f"{name}.{path}", inner) for path, inner in _parameters_inside(parameter))


def all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, in the order of ``model.named_parameters()``, and after each the tensors inside of it."""
    for name, parameter in model.named_parameters():
        yield name, parameter
        yield from ((f"{name}.{path}", inner) for path, inner in _parameters_inside(parameter))


def _parameters_inside(parameter: Tensor) -> Iterator[tuple[str, nn.Parameter]]:
    yield from ((path, inner) for _, path, inner in _inner(parameter) if isinstance(inner, nn.Parameter))


def _inner(owner: Any, path: str = "") -> Iterator[tuple[Any, str, Tensor]]:
    """What has each tensor inside, its path from ``owner``, whose last part is the attribute, and the tensor."""
    if isinstance(owner, Tensor) and is_packed(owner):
        owner = owner.quant_state  # type: ignore[attr-defined]
    elif isinstance(owner, Tensor) and not is_wrapper(owner):
        return
    keys = owner.__tensor_flatten__()[0] if hasattr(owner, "__tensor_flatten__") else _STATE_ATTRIBUTES
    for key in keys:
        inner = getattr(owner, key, None)
        if isinstance(inner, Tensor) and not is_wrapper(inner):
            yield owner, path + key, inner
        elif inner is not None:
            yield from _inner(inner, f"{path}{key}.")
