"""``parameter.grad`` of a cut parameter: a tensor that stands for the gradients of its slices.

Functions that read it get a copy of all of it, in a file beside the page files where it is large; those that change it
element by element are called with one slice after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from offload.cutting.cut_values import shares
from offload.parameters.paged_gradient import PagedGradient, SpreadGradient
from offload.parameters.tensor_functions import GET_DATA, METADATA, REQUIRES_GRAD, SET_GRAD, no_torch_function
from pagemem.files.spilled import SpilledTensor

#: Functions that change each element by itself; names of them that take lists begin with ``_foreach_``.
_ELEMENTWISE: Final = frozenset(
    {
        "zero_", "fill_", "mul_", "div_", "add_", "sub_", "copy_", "clamp_", "clip_", "clamp_min_", "clamp_max_",
        "neg_",
        "sign_", "nan_to_num_", "pow_", "sqrt_", "abs_", "lerp_", "__imul__", "__iadd__", "__isub__", "__itruediv__",
        "true_divide_", "multiply_", "divide_", "subtract_", "addcmul_", "addcdiv_", "masked_fill_",
        "_amp_foreach_non_finite_check_and_unscale_",
    }
)  # fmt: skip
#: Functions that give the same gradient again: it has no graph.
_ITSELF: Final = REQUIRES_GRAD | {Tensor.detach, Tensor.detach_, GET_DATA}
_ADDRESSES: Final = (Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.__dlpack__)
_LISTS: Final = ("_foreach_", "_amp_foreach_")


class CutGradient(SpreadGradient, Tensor):
    """What `CutParameter.grad` is. Its own memory is one NaN."""

    _parts: list[nn.Parameter]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function with all of the gradient, or with one slice after another."""
        named = dict(kwargs or {})
        if func in METADATA:
            with no_torch_function():
                return func(*args, **named)
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if func in _ITSELF:
            return first
        if func in _ADDRESSES and isinstance(first, CutGradient):
            raise RuntimeError(f"{name} of the gradient of a parameter in slices; copy it first, with .grad.clone()")
        if name.startswith(_LISTS) and isinstance(first, (list, tuple)) and len(first) > 1:
            return _one_by_one(func, args, named)
        alone = first[0] if isinstance(first, (list, tuple)) and first else first
        elementwise = name.removeprefix("_foreach_") in _ELEMENTWISE
        if elementwise and isinstance(alone, CutGradient):
            return _slice_by_slice(func, args, named, alone)
        if name.endswith("_") and not name.endswith("__") and isinstance(alone, CutGradient):
            raise RuntimeError(f"{name} of the gradient of a parameter in slices; assign a changed copy to .grad")
        copies: list[tuple[CutGradient, Tensor]] = []

        def whole(value: Any) -> Any:
            if isinstance(value, CutGradient):
                copies.append((value, _whole(value)))
                return copies[-1][1]
            return value

        result = func(*_mapped(args, whole), **{key: _mapped(value, whole) for key, value in named.items()})
        for gradient, copy in copies:
            if isinstance(result, Tensor) and shares(result, copy):
                binder: Any = gradient._parts[0]._place.binder  # type: ignore[attr-defined]
                of = gradient._parts[0]._place.slot.name.rpartition("[")[0]  # type: ignore[attr-defined]
                binder.state_copies.watch_copy(of, "a view of its gradient", result)
        return result


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(one, change) for one in value])
    return change(value)


def _whole(value: CutGradient) -> Tensor:
    """A copy of all of a gradient."""
    binder: Any = value._parts[0]._place.binder  # type: ignore[attr-defined]
    copy = SpilledTensor(binder.state_copies.spill_folder, value.shape, value.dtype)
    begin = 0
    for part in value._parts:
        gradient = part.grad
        # Slices that no gradient came to have zeros, as the rows of the whole would.
        copy.put(begin, torch.zeros(()).expand(part.numel()) if gradient is None else gradient.reshape(-1).clone())
        begin += part.numel()
    return copy.tensor


def _one_by_one(func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call a function of lists once for each place in them."""
    n_places = len(args[0])
    results = [
        func(*([a[i]] if isinstance(a, (list, tuple)) and len(a) == n_places else a for a in args), **named)
        for i in range(n_places)
    ]
    return None if results[0] is None else [one for result in results for one in result]


def _slice_by_slice(func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], whole: CutGradient) -> Any:
    """Call a function that changes each element by itself with the gradient of one slice after another."""
    begin = 0
    for part in whole._parts:
        end = begin + part.shape[0]
        if part.grad is None:
            part.grad = torch.zeros_like(part)

        def mine(value: Any, part: nn.Parameter = part, begin: int = begin, end: int = end) -> Any:
            if isinstance(value, CutGradient):
                return part.grad if value is whole else value._parts[_place_of(whole, part)].grad
            if isinstance(value, Tensor) and value.ndim and value.numel() > 1:
                return value.expand(whole.shape)[begin:end]
            return value

        func(*_mapped(args, mine), **{key: _mapped(value, mine) for key, value in named.items()})
        begin = end
    return args[0]


def _place_of(whole: CutGradient, part: nn.Parameter) -> int:
    return next(place for place, one in enumerate(whole._parts) if one is part)


def gradient_of(parameter: nn.Parameter, slices: Sequence[nn.Parameter]) -> Tensor | None:
    """``parameter.grad``: None where no slice has a gradient; the tensor that was assigned, if that is what slices
    have."""
    assigned: Tensor | None = getattr(parameter, "_assigned", None)
    gradients = [part.grad for part in slices]
    if all(gradient is None for gradient in gradients):
        return None
    if assigned is not None and not any(isinstance(gradient, PagedGradient) for gradient in gradients):
        return assigned
    with no_torch_function():
        like = slices[0]
        made = torch.full((), float("nan"), dtype=like.dtype, device=like.device).expand(parameter.shape)
        gradient = made.as_subclass(CutGradient)
    gradient._parts = list(slices)
    return gradient


def assign_gradient(parameter: nn.Parameter, slices: Sequence[nn.Parameter], value: Tensor | None) -> None:
    """``parameter.grad = value``, of which each slice has its rows.

    Raises:
        RuntimeError: its shape, dtype or device is not the parameter's; or an update of this step has been made.
    """
    held: Any = parameter
    if isinstance(value, CutGradient):
        if all(one is part for one, part in zip(value._parts, slices, strict=True)):
            return  # parameter.grad *= 2 assigns what is there
        value = _whole(value)
    if value is None:
        held._assigned = None
        for part in slices:
            part.grad = None
        return
    with no_torch_function():
        SET_GRAD(parameter, value)  # which raises where it does not fit
        SET_GRAD(parameter, None)
    begin = 0
    for part in slices:
        part.grad = value[begin : begin + part.shape[0]]
        begin += part.shape[0]
    held._assigned = value
