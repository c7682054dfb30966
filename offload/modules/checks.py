"""What a model's parameters must be like before anything of them is paged. Nothing is changed here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from offload.parameters.inner_tensors import all_parameters, is_packed, is_wrapper
from offload.parameters.paged_parameter import PagedParameter

#: What pages hold with the bits of plain PyTorch: updates are made in fp32, of the parameters or of their masters.
_DTYPES: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})
#: Why, and what else.
LLM_INT8_INSTEAD: Final = (
    "which rounds activations, too, and keeps its scales beside the parameter; quantise to 8 bits by torchao "
    "(TorchAoConfig(Int8WeightOnlyConfig())) or to 4 bits by bitsandbytes (load_in_4bit=True)"
)


def check_parameters(model: nn.Module, device: str = "cpu") -> None:
    """Raise ValueError, in one line that names parameter and remedy, for a model that cannot be paged.

    Args:
        device: kind of device that the parameters are to be on.
    """
    _check_uncompiled(model)
    for name, parameter in all_parameters(model):
        if is_lazy(parameter):
            raise ValueError(
                f"{name} is not initialised yet (a lazy module's); run the model's forward once before the engine is "
                "made"
            )
        check_values(name, parameter, device)
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta" and device != "meta":
            raise ValueError(
                f"the buffer {name} is on meta and has no values, and nothing says what they were to be; build it on "
                "the CPU, or the whole model (under deferred_init)"
            )
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError("the model has no floating-point parameters to page")
    _check_separate(model)


def _check_uncompiled(model: nn.Module) -> None:
    """Raise ValueError for modules with parameters that torch.compile or torch.jit has made: they would compute with
    values that pages move away."""
    by_torch_compile = getattr(
        sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ()
    )  # Not imported: nothing is compiled.
    for name, module in model.named_modules():
        if next(module.parameters(), None) is None:
            continue
        what = name.removesuffix("._orig_mod") or "the model"
        if isinstance(module, by_torch_compile) or module._compiled_call_impl is not None:
            raise ValueError(
                f"{what} is compiled by torch.compile, which a model in pages cannot be; give the uncompiled model, "
                "as it was before that"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{what} is made by torch.jit, which cannot look into pages; give the model as it was before that"
            )


def check_values(name: str, parameter: Tensor, device: str) -> None:
    """Raise ValueError unless a parameter is of a kind that pages can hold, and on ``device`` or, without values, on
    meta."""
    if parameter.device.type not in (device, "meta") and not isinstance(parameter, PagedParameter):
        raise ValueError(f"{name} is on {parameter.device}; build the model on the CPU (or under deferred_init)")
    if parameter.is_complex():
        raise ValueError(
            f"{name} is {parameter.dtype}, which pages cannot hold; keep its real view (torch.view_as_real) as the "
            "parameter"
        )
    if parameter.is_floating_point() and parameter.dtype not in _DTYPES:
        raise ValueError(
            f"{name} is {parameter.dtype}, but updates in pages are made in float32; build the model in float32 "
            "(model.float() before offload.prepare), bfloat16 or float16, or keep what is not trained as a buffer"
        )
    if isinstance(parameter, PagedParameter) or is_wrapper(parameter):
        return
    if type(parameter).__name__ == "Int8Params":
        raise ValueError(f"{name} is quantised by bitsandbytes' LLM.int8(), {LLM_INT8_INSTEAD}")
    if type(parameter) is not nn.Parameter and not is_packed(parameter):
        raise ValueError(
            f"{name} is of the class {type(parameter).__name__}, which it would lose in pages; use nn.Parameter itself"
        )
    if parameter.layout is not torch.strided:
        raise ValueError(
            f"{name} is {str(parameter.layout).removeprefix('torch.')}, which pages cannot hold; use a dense parameter"
        )
    if not parameter.is_contiguous():
        raise ValueError(
            f"{name} of shape {tuple(parameter.shape)} has strides {parameter.stride()}, which it would lose in "
            "pages; make it contiguous first: parameter.data = parameter.data.contiguous()"
        )


def _check_separate(model: nn.Module) -> None:
    """Raise ValueError where two parameters, or a parameter and a buffer, are different tensors over the same
    memory."""
    places: dict[tuple[int, int], str] = {}
    spans: list[tuple[int, int, str]] = []
    for name, parameter in all_parameters(model):
        if is_wrapper(parameter):
            continue
        if isinstance(parameter, PagedParameter):
            place = parameter._place
            other = places.setdefault((id(place.unit), place.slot.offset), name)
            if other != name and place.slot.numel:
                raise _shared(other, name)
        else:
            spans += _span(name, parameter)
    n_parameters = len(spans)
    parameters = {name for _, _, name in spans[:n_parameters]}
    for name, buffer in model.named_buffers():
        spans += _span(name, buffer)
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not isinstance(value, PagedParameter):
                spans += _span(f"{prefix}.{key}" if prefix else key, value)
    reached, last = 0, ""
    for begin, end, name in sorted(spans):
        if begin < reached and not parameters.isdisjoint((name, last)):
            raise _shared(last, name)
        if end > reached:
            reached, last = end, name


def _shared(one: str, other: str) -> ValueError:
    return ValueError(
        f"{one} and {other} are different tensors over the same memory, which pages do not share; tie them as one "
        "nn.Parameter (b.weight = a.weight), or clone one"
    )


def _span(name: str, tensor: Tensor) -> Iterator[tuple[int, int, str]]:
    """First byte and end of the memory that a tensor reaches; nothing where it has none."""
    if tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel():
        begin = tensor.data_ptr()
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
        yield begin, begin + reach * tensor.element_size(), name
