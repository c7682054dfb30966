"""Paged parameters: `nn.Parameter`s whose values come and go, and the binder that brings them for each use.

A released parameter keeps its shape, dtype, identity and hooks, but its data is one NaN seen through zero strides. Every
torch function called with it goes through `PagedParameter.__torch_function__`, which asks the binder to bind it: for the
length of that call its data is a view of host pages. So it does not matter where a parameter is used: in its own module,
in another one, tied, in a functional call, in recomputation or under no_grad.

A view that outlives the call (a slice of the parameter, a weight saved by autograd where no hook of ours could take it
down) is a lease of the arena: the pages stay where they are until the last alias is gone.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from offload.activations import SavedActivations
from offload.compilers import refuse_compilers
from offload.gradients import PagedGradient
from offload.parameter_gradient import ParameterGradient
from offload.tensor_functions import EXPORTS, METADATA
from optim.unit import Slot, Unit, late_use
from optim.updater import Updater, refusing_updater
from pagemem.forks import disowned
from pagemem.heap import ForwardEnd, give_back_free_pages
from pagemem.mover import Mover
from pagemem.page import TensorId
from scheduler.driver import Driver
from scheduler.trace import Access, AccessMode, OpKind

is_functorch_wrapped_tensor, peek_interpreter_stack = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.peek_interpreter_stack
_NO_TORCH_FUNCTION = torch._C.DisableTorchFunctionSubclass
_TENSOR: Any = Tensor  # Its attributes are descriptors here, which its type stub does not say.
_GET_GRAD: Final = _TENSOR.grad.__get__
_SET_GRAD: Final = _TENSOR.grad.__set__
_SET_DATA: Final = _TENSOR.data.__set__
_REQUIRES_GRAD: Final = frozenset({Tensor.requires_grad_, _TENSOR.requires_grad.__set__})
#: What gives something out through which torch does not count writes.
_UNCOUNTED: Final = EXPORTS | {_TENSOR.data.__get__}
_POST_HOOK: Final = Tensor.register_post_accumulate_grad_hook


class Place:
    """Where a paged parameter's values are, and what it holds while they are not bound.

    Attributes:
        seen: the parameter's count of writes, as torch keeps it, when a view that it counts was first given out; None: none was.
    """

    __slots__ = ("binder", "bound", "gradient", "placeholder", "seen", "slot", "unit")

    def __init__(self, binder: Binder, unit: Unit, slot: Slot) -> None:
        self.binder = binder
        self.unit = unit
        self.slot = slot
        self.bound = 0
        self.gradient = ParameterGradient(binder, unit, slot)
        self.seen: tuple[weakref.ref[Tensor], int] | None = None
        self.placeholder = self._nan()

    def _nan(self) -> Tensor:
        # NaN: values read past the binder's back are conspicuous, and zero strides make writes fail.
        return torch.full((), float("nan"), dtype=self.slot.dtype, device=self.binder.torch_device).expand(self.slot.shape)

    def follow(self, parameter: PagedParameter) -> None:
        """The unit went on in another dtype or on another device: so does the parameter."""
        self.placeholder = self._nan()
        with _NO_TORCH_FUNCTION():
            parameter.data = self.placeholder


class PagedParameter(nn.Parameter):
    """A parameter whose values live in pages. Made from an ordinary one in place, so that its identity stays."""

    _place: Place

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Bind every paged parameter among the arguments for the length of the call."""
        named = dict(kwargs or {})
        if PagedGradient in types and func != _SET_GRAD:
            return NotImplemented  # It comes next, and then again to us, without gradients.
        with _NO_TORCH_FUNCTION():
            if func in METADATA:
                return func(*args, **named)
            parameters = list(_paged(args)) + list(_paged(named.values()))
            if func == _SET_GRAD:
                return parameters[0]._place.gradient.set(parameters[0], args[1])
            if func == _GET_GRAD:
                return parameters[0]._place.gradient.get(parameters[0])
            if func in _REQUIRES_GRAD:
                before = parameters[0].requires_grad
                result = func(*args, **named)
                parameters[0]._place.binder.watch_gradient(parameters[0], changed=parameters[0].requires_grad is not before)
                return result
            if func is _POST_HOOK:
                result = func(*args, **named)
                parameters[0]._place.gradient.order_hooks(parameters[0])
                return result
            if func == _SET_DATA:
                if args[0] is args[1]:  # As conversions do that change nothing.
                    return None
                func = _copy_into
            elif func == Tensor.share_memory_:
                raise RuntimeError(f"{parameters[0]._place.slot.name}: a paged parameter cannot be shared with other processes; share model.state_dict()")
            return parameters[0]._place.binder.call(func, args, named, parameters)

    # The two methods of tensors that torch keeps from ``__torch_function__``.

    def set_(self, source: Any = None, *place: Any) -> PagedParameter:
        """As ``.data = source``, where the source is a tensor; torch's parametrizations call it."""
        if not isinstance(source, Tensor) or place:
            raise RuntimeError(f"{self._place.slot.name}: a paged parameter keeps its memory; write values with parameter.copy_(values)")
        self.data = source
        return self

    def detach(self) -> Tensor:
        """As torch's. ``nn.Parameter(paged)``, which begins with it, is another parameter over the same pages, while the model is built.

        Raises:
            RuntimeError: the engine is made, and parameters cannot be added any more.
        """
        if sys._getframe(1).f_code is not nn.Parameter.__new__.__code__:
            return super().detach()
        binder = self._place.binder
        if binder.updater is not None or binder.closed:
            raise RuntimeError(
                f"nn.Parameter over {self._place.slot.name}, which is paged: an engine's parameters stay as they are; make parametrizations "
                "(weight_norm, ...) and other changes before prepare, or clone the values (nn.Parameter(weight.detach().clone()))"
            )
        return binder.alias(nn.Parameter(self._place.placeholder), self._place)

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


def _paged(values: Iterable[Any]) -> Iterator[PagedParameter]:
    """Paged parameters among arguments, lists and tuples of arguments."""
    for value in values:
        if isinstance(value, PagedParameter):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _paged(value)


def _copy_into(parameter: PagedParameter, values: Tensor) -> None:
    """What ``parameter.data = values`` means in pages: the values are copied."""
    name = parameter._place.slot.name
    if values.shape != parameter.shape:
        raise RuntimeError(
            f"{name}: .data of shape {tuple(values.shape)} for a paged parameter of shape {tuple(parameter.shape)}; a paged parameter keeps its shape"
        )
    if (values.dtype, values.device) != (parameter.dtype, parameter.device):
        raise RuntimeError(
            f"{name}: .data of {values.dtype} on {values.device} for a paged parameter of {parameter.dtype} on {parameter.device}; convert the model "
            "before offload.prepare (or set model.dtype in the configuration), or write values with parameter.data.copy_(values)"
        )
    with torch.no_grad():
        parameter.copy_(values)


def _detached(values: Tensor) -> Tensor:
    """A copy for a ``state_dict()``, in host memory where the device's need not hold all parameters."""
    return values.cpu() if values.device.type == "cuda" else values.clone()


class Binder:
    """Binds paged parameters for the calls that use them. Training thread only.

    Args:
        driver: brings the pages that compute uses.
        mover: owner of the arena that they are in.

    Attributes:
        torch_device: where that arena is.
        structure_is_known, check_structure: says, and raises, when the model no longer has the parameters that are in pages.
        doubted: it had not in the last forward pass; no gradient may be used before that is checked.
        only_trainable: the optimizer was made from the configuration, for what was trainable then.
        pointed: views of what addresses were given out of in the forward pass under way.
    """

    def __init__(self, driver: Driver, mover: Mover) -> None:
        self.driver = driver
        self.mover = mover
        self.torch_device = torch.device("cpu")
        self.updater: Updater | None = None
        self.root: nn.Module | None = None
        self.activations: SavedActivations | None = None
        self.trims = False
        self.copying = 0
        self.pointed: list[Tensor] = []
        self._watched: dict[Unit, dict[Slot, Place]] = {}
        self.forwards = 0
        self.closed = self._forked = False
        self.converting = False
        self.save_hooks: Callable[[], Any] = nullcontext
        self.forward_end = ForwardEnd(self._at_forward_end)
        self.units: dict[TensorId, Unit] = {}
        self.structure_is_known: Callable[[], bool] = lambda: True
        self.check_structure: Callable[[], None] = lambda: None
        self.doubted = False
        self.only_trainable = False
        self.in_hooks: list[Any] = []
        self.owner: object = None

    def adopt(self, parameter: nn.Parameter, unit: Unit, slot: Slot) -> None:
        """Make a parameter that is ordinary, or was in another unit, one of ``unit``; its values must already be in the unit's pages."""
        place = Place(self, unit, slot)
        with _NO_TORCH_FUNCTION():
            parameter.data = place.placeholder
        parameter.__class__ = PagedParameter
        parameter._place = place  # type: ignore[attr-defined]

    def alias(self, parameter: nn.Parameter, place: Place) -> PagedParameter:
        """Make an ordinary parameter another one over the memory of a paged one, as ``nn.Parameter(paged)`` is."""
        with _NO_TORCH_FUNCTION():
            parameter.data = place.placeholder
        parameter.__class__ = PagedParameter
        parameter._place = Place(self, place.unit, place.slot)  # type: ignore[attr-defined]
        assert isinstance(parameter, PagedParameter)
        return parameter

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], parameters: list[PagedParameter]) -> Any:
        """Call ``func`` with ``parameters`` bound; what it changed in them is kept.

        Raises:
            BudgetError: their units do not fit in host memory together with what is held.
            StorageError: a page file failed; nothing was lost.
        """
        if is_compiling() or torch._C._is_tracing() or peek_interpreter_stack() is not None:
            refuse_compilers(parameters[0]._place.slot.name)
        if self.closed:
            raise self.refusal(parameters[0]._place.slot.name)
        copying = self.copying and getattr(func, "__name__", "") == "detach"
        with self._scope(), self.bound(parameters):
            self._before_writes(parameters)
            versions = [parameter._version for parameter in parameters]
            result = func(*args, **kwargs)
            exposed = func in EXPORTS or (not copying and self._exposes(result))
            if func == Tensor.data_ptr and self.forwards:
                # Whoever is given an address uses it after this: the pages stay until the forward pass is over.
                self.pointed += [parameter.detach() for parameter in parameters]
            for parameter, version in zip(parameters, versions, strict=True):
                if parameter._version != version:
                    self._check_whole(parameter)
                    self._changed(parameter._place)
                if exposed:
                    self._exposed(parameter, counted=func not in _UNCOUNTED)
            return _detached(result) if copying else result

    def _scope(self) -> Any:
        """Uses that evaluate, copy, edit or initialise the model do not belong to the traced step."""
        if self.updater is None or self.copying:
            return self.driver.interlude()
        if not self.forwards and not torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            return self.driver.interlude()
        if self.root is not None and not self.root.training and not torch.is_grad_enabled():
            return self.driver.interlude()
        return nullcontext()

    @contextmanager
    def using(self, parameters: list[PagedParameter]) -> Iterator[None]:
        """Have parameters bound inside the block, as for one call that only reads them.

        Raises:
            As `call`.
        """
        if all(parameter._place.bound for parameter in parameters):
            yield
            return
        with self._scope():
            with _NO_TORCH_FUNCTION():
                context = self.bound(parameters)
                context.__enter__()
            try:
                yield
            finally:
                with _NO_TORCH_FUNCTION():
                    context.__exit__(None, None, None)

    @contextmanager
    def bound(self, parameters: Iterable[PagedParameter]) -> Iterator[None]:
        """Have parameters bound inside the block, as one op."""
        places = [parameter._place for parameter in parameters]
        units = list(dict.fromkeys(place.unit for place in places))
        for unit in units:
            if unit.forgotten:
                raise RuntimeError(
                    f"{unit.name} was built under deferred_init, but is not part of the model that the engine was made for, so its pages "
                    "were given back; build what the engine does not train outside of that block"
                )
            if unit.ended and torch._C._current_graph_task_id() != -1:
                self._refuse_late_use(unit, places)
            if self.updater is not None:
                (self.updater.before_use if self.driver.in_step else self.updater.settle)(unit)
        if self.activations is not None:
            self.activations.flush()
        kind = OpKind.FORWARD if torch._C._current_graph_task_id() == -1 else OpKind.BACKWARD
        if kind is OpKind.BACKWARD:
            self.forward_end.backward_use()
        elif self.forwards and torch.is_grad_enabled():
            self.forward_end.forward_use([unit.compute.id for unit in units], self.units)
        key = (kind, tuple(unit.index for unit in units))
        held = self.driver.begin(key, units[0].name, [Access(unit.compute.id, AccessMode.READ) for unit in units])
        taken: list[tuple[PagedParameter, Place]] = []
        try:
            for parameter, place in zip(parameters, places, strict=True):
                self._bind(parameter, place)
                taken.append((parameter, place))
            with self.save_hooks():
                yield
        finally:
            for parameter, place in taken:
                place.bound -= 1
                if not place.bound:
                    parameter.data = place.placeholder
            self.driver.end(held)

    def _at_forward_end(self) -> None:
        # Where all pages fit, memory is not short, and the time is better kept.
        if self.trims and sum(tensor.n_frames for tensor in self.mover.tensors.values()) > self.mover.arena.n_frames:
            give_back_free_pages()

    def _bind(self, parameter: PagedParameter, place: Place) -> None:
        slot = place.slot
        if not place.bound and slot.numel:
            flat = self.lease(place.unit, slot.offset * slot.dtype.itemsize, slot.dtype, slot.numel)
            parameter.data = flat.view(slot.shape)
        place.bound += 1

    def lease(self, unit: Unit, offset_bytes: int, dtype: torch.dtype, numel: int) -> Tensor:
        """A flat view of a unit's pages, which stay where they are until its last alias is gone. The unit is pinned."""
        tensor = unit.compute
        assert tensor.frame is not None
        tensor.leases += 1
        return self.mover.arena.lease(tensor.id, tensor.frame, offset_bytes, dtype, numel)

    def _exposes(self, result: Any) -> bool:
        """Whether a result lets its holder write to the pages without our notice."""
        values = result if isinstance(result, (list, tuple)) else (result,)
        return any(
            isinstance(value, Tensor)
            and not isinstance(value, PagedParameter)
            and not value.requires_grad
            and value.layout is torch.strided
            and not is_functorch_wrapped_tensor(value)
            and self.mover.arena.locate(value.data_ptr()) is not None
            for value in values
        )

    def _check_whole(self, parameter: PagedParameter) -> None:
        """Raise when a call gave a bound parameter other memory or another shape (``t_``, ``set_``, ...); its values are as they were."""
        slot = parameter._place.slot
        if parameter.shape != slot.shape or not parameter.is_contiguous() or (slot.numel and self.mover.arena.locate(parameter.data_ptr()) is None):
            raise RuntimeError(
                f"{slot.name}: a paged parameter keeps its shape and its memory, so it cannot be transposed, resized or set in place; "
                "write values with parameter.copy_(values)"
            )

    def _changed(self, place: Place) -> None:
        place.unit.version += 1
        place.slot.edited = True
        self.mover.touch(place.unit.compute)

    def _exposed(self, parameter: PagedParameter, *, counted: bool) -> None:
        """A view was given out that can be written to; with ``counted``, torch counts that as writing to the parameter."""
        place = parameter._place
        place.slot.edited = True
        place.unit.compute.exposed = True
        self.mover.touch(place.unit.compute)
        if counted:
            if place.seen is None or not place.unit.live_views:
                place.seen = weakref.ref(parameter), parameter._version
                self._watched.setdefault(place.unit, {})[place.slot] = place
        elif not self.forwards and torch._C._current_graph_task_id() == -1:
            # Nobody will know of writes. What is given out inside of a forward or backward pass is for kernels, which read.
            place.unit.version += 1

    def notice_edits(self, unit: Unit) -> None:
        """Count what was written to a unit's parameters through views: when one is saved, so that it is not held against it, and asked for again."""
        for place in self._watched.get(unit, {}).values():
            assert place.seen is not None
            reference, version = place.seen
            parameter = reference()
            if parameter is None:
                continue
            with _NO_TORCH_FUNCTION():
                now = parameter._version
            if now != version:
                place.seen = reference, now
                unit.version += 1

    def _before_writes(self, parameters: Iterable[PagedParameter]) -> None:
        """Have a commit that waits for the values of parameters get them, where the call may change them or give them out."""
        for parameter in parameters:
            if parameter._place.unit.compute.owed and not (parameter.requires_grad and torch.is_grad_enabled()):
                self.mover.make_writable(parameter._place.unit.compute)

    def _refuse_late_use(self, unit: Unit, places: Iterable[Place]) -> None:
        for place in places:
            if place.unit is unit and place.slot.group >= 0 and place.slot.arrivals:
                raise late_use(place.slot)

    def watch_gradient(self, parameter: PagedParameter, *, changed: bool = False) -> None:
        """Have the updater take this parameter's gradients from now on, if it requires any.

        Args:
            changed: whether it does is new, so that earlier steps do not foretell its gradients.
        """
        slot = parameter._place.slot
        if changed:
            slot.expected, slot.share = None, 0.0
        if self.only_trainable and slot.group < 0 and parameter.requires_grad:
            parameter.requires_grad_(False)
            raise RuntimeError(
                f"{slot.name}: this parameter was frozen when the optimizer was made from the configuration, which does not have it; "
                "call requires_grad_(True) before offload.prepare, or give prepare an optimizer factory over all parameters"
            )
        parameter._place.gradient.watch(parameter)

    def confirm_structure(self) -> None:
        """Before a gradient is used: raise when the last forward pass was not of the model that is in pages."""
        if self.doubted:
            self.check_structure()
            self.doubted = False

    def collect_in_hooks(self, wanted: bool) -> None:
        """Take gradients over that hooks which failed have left behind, or throw them away if they are not ``wanted``."""
        with _NO_TORCH_FUNCTION():
            while self.in_hooks:
                parameter = self.in_hooks.pop()
                parameter._place.gradient.collect(parameter, wanted=wanted)

    def give_back(self, parameter: PagedParameter, device: str) -> None:
        """Make a paged parameter an ordinary one again, with its values, on ``device``.

        Raises:
            StorageError: they cannot be read; the parameter is still paged.
        """
        with _NO_TORCH_FUNCTION():
            with self.driver.interlude(), self.bound([parameter]):
                values = parameter.detach().to(device, copy=True)
            parameter.data = values
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
            del parameter._place

    def close(self) -> None:
        """Using any of the parameters raises from now on."""
        self.closed = True

    def disown(self) -> None:
        """In a forked child: the pages are the parent's."""
        self.closed = self._forked = True
        self.updater = refusing_updater()

    def refusal(self, name: str) -> RuntimeError:
        """The error for a use of what is called ``name`` after that."""
        return disowned(name) if self._forked else RuntimeError(f"{name}: the engine that holds this is closed")


@contextmanager
def gathered(what: nn.Module | Iterable[Tensor]) -> Iterator[None]:
    """Have whole parameter values at hand, readable and writable in place, inside the block.

    Args:
        what: a module (all its parameters) or parameters. Ordinary parameters are left as they are.

    Raises:
        BudgetError: their units do not all fit in host memory at once; gather fewer.
    """
    tensors = list(what.parameters()) if isinstance(what, nn.Module) else list(what)
    parameters = [tensor for tensor in tensors if isinstance(tensor, PagedParameter)]
    if not parameters:
        yield
        return
    binder = parameters[0]._place.binder
    if binder.closed:
        raise binder.refusal(parameters[0]._place.slot.name)
    with binder.driver.interlude():
        with _NO_TORCH_FUNCTION():
            context = binder.bound(parameters)
            context.__enter__()
        versions = [parameter._version for parameter in parameters]
        try:
            yield
        finally:
            with _NO_TORCH_FUNCTION():
                for parameter, version in zip(parameters, versions, strict=True):
                    if parameter._version != version:
                        binder._changed(parameter._place)
                context.__exit__(None, None, None)
