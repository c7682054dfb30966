"""Conversions of modules with paged parameters: ``to``, ``half``, ``cuda``, ``to_empty`` and all else that torch does
by ``Module._apply``.

What would give a paged parameter another dtype, device or layout is refused before anything of the module is converted,
its buffers included. Everything else does what it does in plain PyTorch; a conversion that leaves parameters as they
are reads no page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from offload.hooks import MethodHook
from offload.parameters.binder import Binder
from offload.parameters.paged_parameter import PagedParameter, Revealed

#: What torch does to every parameter and buffer of a module.
Conversion = Callable[[Tensor], Tensor]


def guard_conversions(module: nn.Module, binder: Binder, waits: Callable[[nn.Parameter], bool]) -> Callable[[], None]:
    """Refuse conversions of a module that its paged parameters cannot follow: they raise RuntimeError then, and convert
    nothing.

    Args:
        waits: whether an ordinary parameter is to be paged soon.

    Returns:
        What makes the module convertible again.
    """

    def convert(fn: Conversion, recurse: bool = True) -> Any:
        plain = MethodType(type(module)._apply, module)
        if binder.converting:  # The module around this one has asked already.
            return plain(fn, recurse)
        keeps = _keeps(fn, _paged_parameters(module, waits, recurse=recurse))
        binder.converting = True
        try:
            kept = (lambda tensor: tensor if isinstance(tensor, PagedParameter) else fn(tensor)) if keeps else fn
            with _set_aside(module) if keeps else nullcontext():
                return plain(kept, recurse)
        finally:
            binder.converting = False

    return MethodHook(convert, module, "_apply").undo


def _paged_parameters(
    module: nn.Module, waits: Callable[[nn.Parameter], bool], *, recurse: bool
) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=recurse):
        if isinstance(parameter, PagedParameter):
            yield parameter._place.slot.name, parameter
        elif isinstance(parameter, Revealed) or waits(parameter):
            yield f"{type(module).__name__}.{name}", parameter


def _keeps(fn: Conversion, parameters: Iterable[tuple[str, nn.Parameter]]) -> bool:
    """Whether ``fn`` leaves every parameter as it is. It is tried on small tensors of the same kind."""
    kinds: dict[tuple[Any, ...], bool] = {}
    for name, parameter in parameters:
        size = [min(length, 2) for length in parameter.shape]
        kind = (*size, parameter.dtype, parameter.device)
        if kind not in kinds:
            with torch.no_grad():
                before = torch.zeros(size, dtype=parameter.dtype, device=parameter.device)
                stride = before.stride()
                after = fn(before)
            _refuse_change(name, before, stride, after)
            kinds[kind] = after is before
    return all(kinds.values())


@contextmanager
def _set_aside(module: nn.Module) -> Iterator[None]:
    """Have a module's parameters that wrap paged tensors out of torch's way, which would swap them for others."""
    places = [
        (part._parameters, key, parameter)
        for part in module.modules()
        for key, parameter in part._parameters.items()
        if isinstance(parameter, Revealed)
    ]
    try:
        for parameters, key, _ in places:
            parameters[key] = None
        yield
    finally:
        for parameters, key, parameter in places:
            parameters[key] = parameter


def _refuse_change(name: str, before: Tensor, stride: tuple[int, ...], after: Tensor) -> None:
    """Raise unless a conversion gives a parameter the same kind of tensor."""
    ways_out = {
        "dtype": "convert the model before offload.prepare, or set model.dtype in the configuration",
        "device": "set device in the configuration, which says where a model in pages computes",
    }
    for what, remedy in ways_out.items():
        was, becomes = getattr(before, what), getattr(after, what)
        if was != becomes:
            raise RuntimeError(
                f"{name}: the conversion would make this parameter {becomes}, but it lives in pages as {was}; "
                f"{remedy}. Nothing was converted"
            )
    if after.shape != before.shape or after.layout != before.layout or after.stride() != stride:
        raise RuntimeError(
            f"{name}: the conversion would change how this parameter lies in memory (a memory_format?), which pages "
            "do not do; leave it off. Nothing was converted"
        )
    if after.is_shared():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            f"{name}: a parameter that lives in pages cannot be shared with other processes; share "
            "model.state_dict(). Nothing was converted"
        )
