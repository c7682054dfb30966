"""Quantised parameters: pages hold the tensors that they are made of.

A tensor subclass that wraps others (torchao's) has no memory of its own; those inside become frozen paged parameters in
their places, which its operations find there. A packed parameter with a state of tensors (Params4bit of bitsandbytes)
is paged itself, and so are the tensors of its state. All are frozen: what is trained over them is an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, Final

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from offload.parameters.paged_parameter import PagedParameter, Revealed
from offload.parameters.tensor_functions import METADATA, among, no_torch_function

#: Attributes of a packed parameter's state that hold a tensor, or another state.
_STATE_ATTRIBUTES: Final = ("absmax", "code", "offset", "state2")
#: Attribute of a module of bitsandbytes that has it replace its weights by others, rounded, when it is evaluated.
_REPACKS: Final = "support_avx512bf16_for_cpu"


def slice_name(begin: int, end: int) -> str:
    """What the name of a slice of rows ends with."""
    return f"[{begin}:{end}]"


def is_slice(parameter: Tensor) -> bool:
    """Whether a parameter is a slice of a cut one."""
    return hasattr(parameter, "_slice_of")


def owner_of(parameter: Any) -> Any:
    """The parameter that a slice is of; any other one itself."""
    return getattr(parameter, "_slice_of", parameter)


class SlicedParameter(Revealed, nn.Parameter):
    """A parameter whose values are in slices of its rows.

    Attributes:
        slices: in order; paged parameters once their units are made.
        released: whether all of them are in pages, so that it has no values of its own.
        gathered: its placeholder, while a copy of all values is in its place.
    """

    slices: list[nn.Parameter]
    released: bool
    gathered: Tensor | None

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First row and end of each slice."""
        ends = [0]
        for part in self.slices:
            ends.append(ends[-1] + part.shape[0])
        return list(pairwise(ends))


def is_wrapper(parameter: Tensor) -> bool:
    """Whether a parameter's values are in other tensors alone."""
    if isinstance(parameter, SlicedParameter):
        return True
    return not isinstance(parameter, PagedParameter) and is_traceable_wrapper_subclass(parameter)


def is_packed(parameter: Tensor | None) -> bool:
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
    ``__torch_function__`` off. For that length the wrappers are of class ``plain`` again, which some operations ask.
    """

    def torch_function(
        cls: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        wrappers = {w: type(w) for w in among(Tensor, [*args, *named.values()]) if isinstance(w, Revealed)}
        try:
            for wrapper, revealed in wrappers.items():
                wrapper.__class__ = revealed._plain
            inside = [] if func in METADATA else _paged_inside(wrappers)
            return _bound_call(func, args, named, inside) if inside else func(*args, **named)
        finally:
            for wrapper, revealed in wrappers.items():
                wrapper.__class__ = revealed

    made: Any = type(
        plain.__name__,
        (Revealed, plain),
        {"__torch_function__": classmethod(torch_function), "_plain": plain, "__module__": plain.__module__},
    )
    return made  # type: ignore[no-any-return]


def _bound_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inside: list[PagedParameter]) -> Any:
    """Call ``func`` on wrappers with what is ``inside`` of them bound; what it writes there is kept, as is what is
    written later through the views that it returns."""
    binder: Any = inside[0]._place.binder
    edits = binder.edits
    with binder.using(inside):
        with no_torch_function():
            edits.before_writes(inside)
            versions = [parameter._version for parameter in inside]
        result = func(*args, **kwargs)
        copying = binder.state_copies.copying and isinstance(result, Tensor) and is_wrapper(result)
        with no_torch_function():
            exposes = not copying and edits.exposes([*among(Tensor, [result]), *_inside(among(Tensor, [result]))])
            for parameter, version in zip(inside, versions, strict=True):
                if parameter._version != version:
                    edits.check_whole(parameter)
                    edits.changed(parameter._place)
                if exposes:
                    edits.exposed(parameter, counted=True, in_pass=binder.forwards > 0)
        return result.clone() if copying and not _paged_inside([result]) else result


def _inside(values: Iterable[Tensor]) -> list[Tensor]:
    return [inner for value in values for _, _, inner in _inner(value)]


def _paged_inside(values: Iterable[Tensor]) -> list[PagedParameter]:
    return [inner for inner in _inside(values) if isinstance(inner, PagedParameter)]


def reveal(model: nn.Module) -> None:
    """Have the tensors inside of quantised parameters be frozen parameters in their places. Idempotent.

    Raises:
        ValueError: a quantised parameter is to be trained, or is in the form that bitsandbytes evaluates with.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, SlicedParameter):
            continue
        owners = [owner for owner, _, _ in _inner(parameter)]
        if owners and parameter.requires_grad:
            raise ValueError(
                f"{name} is quantised ({type(parameter).__name__}) and requires a gradient; freeze it with "
                "requires_grad_(False), and train an adapter over it"
            )
        if any(getattr(owner, "packing_format_for_cpu", False) for owner in owners):
            raise ValueError(
                f"{name} has been repacked by bitsandbytes for evaluation on this CPU, which rounds it; prepare the "
                "model before its first evaluation"
            )
    reveal_all(model.parameters())


def reveal_all(parameters: Iterable[nn.Parameter]) -> None:
    """`reveal` those that are frozen."""
    made: dict[Tensor, nn.Parameter] = {}  # Several parameters may share a tensor.
    for parameter in parameters:
        if parameter.requires_grad or isinstance(parameter, SlicedParameter):
            continue
        for owner, path, inner in _inner(parameter):
            if isinstance(inner, PagedParameter):
                continue
            if not isinstance(inner, nn.Parameter):
                if inner not in made:
                    made[inner] = nn.Parameter(inner.detach().contiguous(), requires_grad=False)
                inner = made[inner]
                setattr(owner, path.rpartition(".")[2], inner)
            inner._is_inner = True  # type: ignore[attr-defined]
        if is_wrapper(parameter) and not isinstance(parameter, Revealed):
            parameter.__class__ = _wrapper_class(type(parameter))


def conceal(model: nn.Module) -> None:
    """The inverse of `reveal` and `forbid_repacking`; parameters are ordinary again."""
    for parameter in model.parameters():
        if isinstance(parameter, SlicedParameter):
            continue
        if isinstance(parameter, Revealed):
            parameter.__class__ = parameter._plain
    for module in model.modules():
        if _REPACKS in vars(module) and getattr(module, _REPACKS) is None:
            setattr(module, _REPACKS, True)


def forbid_repacking(model: nn.Module) -> None:
    """Have modules of bitsandbytes evaluate with their weights as they are, which pages hold."""
    for module in model.modules():
        if vars(module).get(_REPACKS) and isinstance(module._parameters.get("weight"), PagedParameter):
            setattr(module, _REPACKS, None)


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters, and after each the tensors inside of it, named ``weight.qdata`` or the like, or its
    slices, named ``weight[0:192]``."""
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter
        yield from ((_path(name, path), inner) for path, inner in _parameters_inside(parameter))


def all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, in the order of ``model.named_parameters()``, and after each the tensors inside of it, or
    its slices."""
    seen: set[nn.Parameter] = set()
    for name, parameter in model.named_parameters():
        yield name, parameter
        for path, inner in _parameters_inside(parameter):
            if inner not in seen:
                seen.add(inner)
                yield _path(name, path), inner


def _path(name: str, path: str) -> str:
    return name + path if path.startswith("[") else f"{name}.{path}"


def n_elements(model: nn.Module) -> int:
    """Elements of all parameters; of packed ones those that they stand for."""
    shapes: list[Any] = [getattr(p, "quant_state", None) or p for p in model.parameters()]
    return sum(math.prod(shaped.shape) for shaped in shapes)


def _parameters_inside(parameter: Tensor) -> Iterator[tuple[str, nn.Parameter]]:
    yield from ((path, inner) for _, path, inner in _inner(parameter) if isinstance(inner, nn.Parameter))


def _inner(owner: Any, path: str = "") -> Iterator[tuple[Any, str, Tensor]]:
    """What has each tensor inside, its path from ``owner``, whose last part is the attribute, and the tensor."""
    if isinstance(owner, SlicedParameter):
        for (begin, end), part in zip(owner.ranges, owner.slices, strict=True):
            yield owner, slice_name(begin, end), part
        return
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
