"""Torch's attention layers in evaluation: they take a kernel of their own only when none of their tensors has a
``__torch_function__``.

That kernel rounds otherwise than the operations that it stands for. So that a model in pages gives the bits of plain
PyTorch, such a layer's parameters are bound for the whole of its forward pass and look like ordinary ones, wherever the
fast path may be taken at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

from offload.binding.bound_parameter import BoundParameter
from offload.hooks import MethodHook
from offload.parameters.binder import Binder
from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.tensor_functions import among

_LAYERS: Final = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def keep_fast_paths(model: nn.Module, binder: Binder) -> list[Callable[[], None]]:
    """Have torch's attention layers in a model find their parameters ordinary in evaluation.

    Their parameters must then fit in host memory (or on the device) together: those of one layer of a
    `torch.nn.TransformerEncoder`, of which the first one's decide for all.

    Returns:
        What undoes it.
    """
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        if isinstance(module, _LAYERS):
            undo.append(_wrapped(module, module, binder, binds=True))
        elif isinstance(module, nn.TransformerEncoder) and len(module.layers):
            undo.append(_wrapped(module, module.layers[0], binder, binds=False))
    return undo


def _wrapped(module: nn.Module, owner: nn.Module, binder: Binder, *, binds: bool) -> Callable[[], None]:
    inner, paged = module.forward, list(among(PagedParameter, owner.parameters()))

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Those bound between uses look ordinary anyway.
        parameters = [parameter for parameter in paged if not isinstance(parameter, BoundParameter)]
        _look(parameters, PagedParameter)  # The encoder around this layer may have made them look ordinary.
        if not parameters or module.training or binder.closed or _needs_grad([*paged, *args, *kwargs.values()]):
            return inner(*args, **kwargs)
        with binder.using(parameters) if binds else nullcontext(), _ordinary(parameters):
            return inner(*args, **kwargs)

    return MethodHook(forward, module, "forward").undo


def _needs_grad(values: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


@contextmanager
def _ordinary(parameters: Sequence[PagedParameter]) -> Iterator[None]:
    _look(parameters, nn.Parameter)
    try:
        yield
    finally:
        _look(parameters, PagedParameter)


def _look(parameters: Sequence[nn.Parameter], kind: type[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.__class__ = kind
