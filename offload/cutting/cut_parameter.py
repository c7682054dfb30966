"""Cut parameters: a parameter whose values are in several units, as slices of its rows, which are paged parameters.

For the model and its optimizer it is one parameter as before. `torch.nn.functional.linear` and ``embedding`` use it
slice by slice; so do writes of all of it. Whatever else only reads it, outside of a graph, gets a copy in a file beside
the page files, and what it writes there goes back to the slices. In a graph, other functions are refused: they would
need all of it, and all of its gradient, in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from offload.cutting.cut_embedding import cut_embedding
from offload.cutting.cut_gradient import assign_gradient, gradient_of
from offload.cutting.cut_linear import cut_linear
from offload.cutting.cut_values import binder_of, gathered_copy, name_of, shares, write
from offload.parameters.inner_tensors import SlicedParameter
from offload.parameters.paged_parameter import PagedParameter, Revealed
from offload.parameters.tensor_functions import (
    EXPORTS,
    GET_DATA,
    GET_GRAD,
    METADATA,
    REQUIRES_GRAD,
    SET_DATA,
    SET_GRAD,
    among,
    no_torch_function,
)
from pagemem.errors import BudgetError

_HOOKS: Final = frozenset({Tensor.register_hook, Tensor.register_post_accumulate_grad_hook})
_COPIED: Final[frozenset[Any]] = frozenset((Tensor.numpy, Tensor.__array__))
_ADDRESSES: Final[frozenset[Any]] = EXPORTS - _COPIED
#: Functions whose results are never part of a graph.
_WITHOUT_GRAPH: Final[frozenset[Any]] = frozenset(
    {Tensor.detach, torch.detach, GET_DATA, torch.equal, Tensor.equal, Tensor.__repr__, Tensor.__format__,
     torch.isnan, Tensor.isnan, torch.isfinite, Tensor.isfinite, Tensor.tolist}
    | {function for name, function in vars(nn.init).items() if callable(function) and name.endswith("_")}
)  # fmt: skip
#: What writes all of its first tensor, alike in every slice, and reads nothing of it.
_WRITES: Final[frozenset[Any]] = frozenset({Tensor.zero_, Tensor.fill_, nn.init.zeros_, nn.init.ones_})


class CutParameter(SlicedParameter):
    """A parameter in slices. Made from an ordinary one in place, by
    `offload.cutting.make_cut`, so that its identity stays."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Use slices one at a time, where the function is one that can."""
        named = dict(kwargs or {})
        cuts = list(dict.fromkeys([*among(CutParameter, args), *among(CutParameter, named.values())]))
        if func in METADATA and func not in _HOOKS:
            with no_torch_function():
                return func(*args, **named)
        if not cuts:
            return NotImplemented
        if func in _HOOKS:
            raise RuntimeError(
                f"{name_of(cuts[0])} is in {len(cuts[0].slices)} slices, whose gradients come one by one, so it "
                "takes no hooks of its gradient; look at it between backward and step, or raise memory.ram"
            )
        if func in _ADDRESSES and cuts[0].released and cuts[0].gathered is None:
            raise RuntimeError(
                f"{name_of(cuts[0])} is in {len(cuts[0].slices)} slices, so it has no one address; use a copy "
                "(parameter.detach()), or offload.gathered"
            )
        own = _OWN.get(func)
        if own is not None and isinstance(args[0], CutParameter):
            return own(args[0], *args[1:], **named)
        if func is torch.autograd.grad:
            return _autograd_grad(*args, **named)
        used = _used_by_slices(func, args, named)
        return _call_on_copies(func, args, named, cuts) if used is None else used

    def set_(self, source: Any = None, *place: Any) -> CutParameter:
        """As ``.data = source``, where the source is a tensor."""
        if not isinstance(source, Tensor) or place:
            raise RuntimeError(f"{name_of(self)}: it keeps its memory; write values with parameter.copy_(values)")
        self.data = source
        return self

    def detach(self) -> Tensor:
        """A copy of the values, which notices writes, as `_call_on_copies` has it."""
        found: Tensor = type(self).__torch_function__(Tensor.detach, (type(self),), (self,))
        return found

    def as_subclass(self, cls: type[Any]) -> Any:
        """A copy of the values, as that class."""
        return self.detach().as_subclass(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """An ordinary parameter, with the values."""
        copied = memo[id(self)] = nn.Parameter(gathered_copy(self).clone(), self.requires_grad)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(f"{name_of(self)}: a parameter in pages cannot be pickled; use model.state_dict()")


def _call(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with the paged parameters among its arguments bound."""
    parameters = list(among(PagedParameter, args))
    return parameters[0]._place.binder.call(func, args, kwargs, parameters) if parameters else func(*args, **kwargs)


# ---- functions that know slices --------------------------------------------------------------------------------------


def _used_by_slices(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The result of a function that uses slices one at a time; None where it does not."""
    if not all(parameter.released for parameter in among(CutParameter, [*args, *named.values()])):
        return None
    if func is functional.linear:
        x, weight, bias = _arguments(args, named, "input", "weight", "bias")
        if isinstance(weight, CutParameter) and weight.gathered is None and _is_plain(x) and not _is_cut(bias):
            with no_torch_function():
                return cut_linear(x, weight.slices, bias, _call)
    if func is Tensor.__getitem__ and isinstance(args[0], CutParameter) and args[0].gathered is None:
        return _row(args[0], args[1])
    if func is functional.embedding:
        keys = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        indices, weight, padding_idx, max_norm, _, by_frequency, sparse = _arguments(args, named, *keys)
        if isinstance(weight, CutParameter) and weight.gathered is None and _is_plain(indices):
            if max_norm is not None or (sparse and weight.requires_grad):
                what = "max_norm" if max_norm is not None else "sparse=True"
                raise ValueError(f"{name_of(weight)}: an embedding in slices takes no {what}; leave it off")
            with no_torch_function():
                return cut_embedding(
                    indices, weight.slices, _call, padding_idx=padding_idx, by_frequency=bool(by_frequency)
                )
    return None


def _row(parameter: CutParameter, index: Any) -> Any:
    """``parameter[index]`` where the index names one row, as a part of its slice; None where it does not."""
    row, *others = index if isinstance(index, tuple) and index else (index,)
    if isinstance(row, Tensor) and row.numel() == 1 and row.ndim == 0 and not row.dtype.is_floating_point:
        row = int(row)
    if type(row) is not int or not -parameter.shape[0] <= row < parameter.shape[0]:
        return None
    row %= parameter.shape[0]
    place = next(place for place, (_, end) in enumerate(parameter.ranges) if row < end)
    row -= parameter.ranges[place][0]
    return parameter.slices[place][(row, *others)]


def _arguments(args: tuple[Any, ...], named: Mapping[str, Any], *keys: str) -> list[Any]:
    given = dict(zip(keys, args, strict=False)) | dict(named)
    return [given.get(key) for key in keys]


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, (PagedParameter, Revealed))


def _is_cut(value: Any) -> bool:
    return isinstance(value, CutParameter)


def _set_requires_grad(parameter: CutParameter, requires_grad: bool = True) -> CutParameter:
    with no_torch_function():
        Tensor.requires_grad_(parameter, requires_grad)
    for part in parameter.slices:
        part.requires_grad_(requires_grad)
    return parameter


def _set_data(parameter: CutParameter, values: Tensor) -> None:
    if values is parameter:
        return
    if (values.shape, values.dtype, values.device) != (parameter.shape, parameter.dtype, parameter.device):
        raise RuntimeError(
            f"{name_of(parameter)}: .data of shape {tuple(values.shape)}, {values.dtype} on {values.device} for a "
            f"parameter in pages of shape {tuple(parameter.shape)}, {parameter.dtype} on {parameter.device}, which "
            "keeps them"
        )
    with torch.no_grad():
        write(parameter, values)


def _get_gradient(parameter: CutParameter) -> Tensor | None:
    return gradient_of(parameter, parameter.slices)


def _set_gradient(parameter: CutParameter, value: Tensor | None) -> None:
    assign_gradient(parameter, parameter.slices, value)


def _refuse_sharing(parameter: CutParameter) -> Any:
    raise RuntimeError(
        f"{name_of(parameter)}: a parameter in pages cannot be shared with other processes; share model.state_dict()"
    )


#: Functions of a cut parameter that have a way of their own.
_OWN: Final[dict[Any, Callable[..., Any]]] = {
    **dict.fromkeys(REQUIRES_GRAD, _set_requires_grad),
    Tensor.copy_: write,
    SET_DATA: _set_data,
    GET_GRAD: _get_gradient,
    SET_GRAD: _set_gradient,
    Tensor.share_memory_: _refuse_sharing,
}


def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **named: Any) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, of all slices of cut parameters among the inputs."""
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    parts = [one.slices if isinstance(one, CutParameter) else [one] for one in inputs]
    with no_torch_function():
        found = iter(torch.autograd.grad(outputs, [part for one in parts for part in one], *args, **named))
        made: list[Tensor | None] = []
        for one in parts:
            gradients = [next(found) for _ in one]
            made.append(None if gradients[0] is None else gradients[0] if len(one) == 1 else torch.cat(gradients))
    return tuple(made)


# ---- all others ------------------------------------------------------------------------------------------------------


def _call_on_copies(func: Any, args: tuple[Any, ...], named: dict[str, Any], cuts: Sequence[CutParameter]) -> Any:
    """Call a function that needs whole tensors with copies, whose changes go back to the slices.

    Raises:
        BudgetError: it is to be part of a graph.
    """
    if all(parameter.gathered is not None or not parameter.released for parameter in cuts):
        with no_torch_function():
            return func(*args, **named)
    if func in _WITHOUT_GRAPH:
        with torch.no_grad():
            return _swapped_call(func, args, named, cuts)
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in cuts):
        raise _needs_whole(func, cuts[0])
    return _swapped_call(func, args, named, cuts)


def _swapped_call(func: Any, args: tuple[Any, ...], named: dict[str, Any], cuts: Sequence[CutParameter]) -> Any:
    writes = func in _WRITES
    copies = {id(p): torch.empty_like(p, device=p.device) if writes else gathered_copy(p) for p in cuts}
    versions = {key: copy._version for key, copy in copies.items()}

    def swapped(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(one, CutParameter) for one in value):
            return type(value)([swapped(one) for one in value])
        return copies.get(id(value), value) if isinstance(value, CutParameter) else value

    result = func(*map(swapped, args), **{key: swapped(value) for key, value in named.items()})
    for parameter in cuts:
        copy = copies[id(parameter)]
        if copy._version != versions[id(parameter)]:
            with torch.no_grad():
                write(parameter, copy)
        elif isinstance(result, Tensor) and shares(result, copy):
            binder_of(parameter).state_copies.watch_copy(name_of(parameter), "a view of it", result)
        if result is copy:
            result = parameter
    return result


def _needs_whole(func: Any, parameter: CutParameter) -> BudgetError:
    name, n_bytes = getattr(func, "__name__", "this function"), parameter.numel() * parameter.element_size()
    return BudgetError(
        f"{name_of(parameter)} ({n_bytes} bytes) does not fit into memory.ram with its gradient, so it is in "
        f"{len(parameter.slices)} slices, and {name} in a graph needs all of it; use it through "
        "torch.nn.functional.linear or embedding, or raise memory.ram until it is whole",
        0,
    )
