"""The binder: binds paged parameters to their pages for each call that uses them, and notes what the call changed.

Parameters are bound, which is to have views of pages for data, for the length of a call
(`offload.parameters.paged_parameter` says why).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from offload.activations.saved import SavedActivations
from offload.heap import ForwardEnd, give_back_free_pages
from offload.hooks import refuse_compilers
from offload.parameters.edits import Edits
from offload.parameters.inner_tensors import all_parameters
from offload.parameters.paged_parameter import BoundBetweenUses, PagedParameter, Place, paged_class, plain_class
from offload.parameters.state_copies import StateCopies
from offload.parameters.tensor_functions import EXPORTS, UNCOUNTED, among, is_bare, no_torch_function
from offload.parameters.without_values import WithoutValues, assign
from optim.gradient_errors import early_use, late_use
from optim.optimizer import refusing_updater
from optim.unit import Slot, Unit
from optim.updater import Updater
from pagemem.frames.page import TensorId
from pagemem.process.forks import disowned
from pagemem.residency.mover import Mover
from scheduler.execution.driver import Driver
from scheduler.planning.trace import Access, AccessMode, OpKind

peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack


class Binder:
    """Binds paged parameters for the calls that use them. Training thread only.

    Args:
        driver: brings the pages that compute uses.
        mover: owner of the arena that they are in.
        bindings: makes what binds units between uses, too.
        device: where that arena is.

    Attributes:
        doubted: the model had other parameters in the last forward pass; no gradient may be used before that is
            checked.
        pointed: views of what addresses were given out of in the forward pass under way.
        bindings: the units that are bound between uses, too.
    """

    def __init__(
        self, driver: Driver, mover: Mover, bindings: Callable[[Binder], BoundBetweenUses], device: str = "cpu",
        state_copies: StateCopies | None = None,
    ) -> None:  # fmt: skip
        self.driver = driver
        self.mover = mover
        self.edits = Edits(mover)
        self.torch_device = torch.device(device)
        self.updater: Updater | None = None
        self.root: nn.Module | None = None
        self.activations: SavedActivations | None = None
        self.owner: object = None
        self.state_copies = state_copies or StateCopies()
        self.without_values = WithoutValues()
        self.pointed: list[Tensor] = []
        self.forwards = 0
        self.closed = self._forked = self.trims = self.converting = False
        self.save_hooks: Callable[[], Any] = nullcontext
        self.forward_end = ForwardEnd(self._at_forward_end)
        self.units: dict[TensorId, Unit] = {}
        self.check_structure: Callable[[], None] = lambda: None
        self.doubted = self.only_trainable = False
        self.in_hooks: list[Any] = []
        self.bindings = bindings(self)
        self.state_copies.before_copies = self.bindings.let_go

    def compute_on(self, mover: Mover, device: torch.device, units: Iterable[Unit]) -> None:
        """Bind ``units`` in another mover's arena from now on, on another device."""
        self.mover, self.torch_device = mover, device
        self.edits.follow(mover)
        self.units = {unit.compute.id: unit for unit in units}

    def train(
        self, model: nn.Module, updater: Updater, activations: SavedActivations | None,
        save_hooks: Callable[[], Any], check_structure: Callable[[], None], *, only_trainable: bool, trims: bool,
    ) -> None:  # fmt: skip
        """Calls belong to training from now on, and gradients go to the updater.

        Args:
            save_hooks: saved-tensor hooks for one call.
            check_structure: raises when the model no longer has the parameters that are in pages.
            only_trainable: the optimizer was made from the configuration, for what was trainable then.
            trims: free pages of the heap are given back at the end of forward passes.
        """
        self.root, self.updater, self.activations = model, updater, activations
        self.save_hooks, self.check_structure = save_hooks, check_structure
        self.only_trainable, self.trims = only_trainable, trims
        for parameter in among(PagedParameter, [parameter for _, parameter in all_parameters(model)]):
            self.watch_gradient(parameter)

    def adopt(self, parameter: nn.Parameter, unit: Unit, slot: Slot) -> PagedParameter:
        """Make a parameter that is ordinary, or was in another unit, one of ``unit``, whose pages hold its values
        already. There may be several for one slot, as ``nn.Parameter(paged)`` makes them."""
        place = Place(self, unit, slot)
        assign(parameter, place.placeholder)
        parameter.__class__ = paged_class(type(parameter))
        assert isinstance(parameter, PagedParameter)
        parameter._place = place
        return parameter

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], parameters: list[PagedParameter]
    ) -> Any:
        """Call ``func`` with ``parameters`` bound; what it changed in them is kept.

        Raises:
            BudgetError: their units do not fit in host memory together with what is held.
            StorageError: a page file failed; nothing was lost.
        """
        if is_compiling() or torch._C._is_tracing() or peek_interpreter_stack() is not None:
            refuse_compilers(parameters[0]._place.slot.name)
        if self.closed:
            raise self.refusal(parameters[0]._place.slot.name)
        parameters = [parameter for parameter in parameters if not is_bare(parameter)]
        copying = self.state_copies.copying and getattr(func, "__name__", "").partition(".")[0] == "detach"
        with self._scope(), self.bound(parameters):
            self.edits.before_writes(parameters)
            versions = [parameter._version for parameter in parameters]
            called = self.without_values.guarding(func, parameters, copying) if self.without_values else func
            result = called(*args, **kwargs)
            may_be_aliased = func in EXPORTS or (not copying and self.edits.exposes(result))
            if func == Tensor.data_ptr and self.forwards:
                # Whoever is given an address uses it after this: the pages stay until the forward pass is over.
                self.pointed += [parameter.detach() for parameter in parameters]
            for parameter, version in zip(parameters, versions, strict=True):
                if parameter._version != version:
                    self.edits.check_whole(parameter)
                    self.edits.changed(parameter._place)
                if may_be_aliased:
                    in_pass = self.forwards > 0 or torch._C._current_graph_task_id() != -1
                    self.edits.exposed(parameter, counted=func not in UNCOUNTED, in_pass=in_pass)
            return self.state_copies.give(parameters[0]._place.slot.name, result) if copying else result

    def _scope(self) -> Any:
        """Uses that evaluate, copy, edit or initialise the model do not belong to the traced step."""
        if self.root is None or self.state_copies.copying:
            return self.driver.untraced()
        in_pass = self.forwards > 0 or torch._C._current_graph_task_id() != -1
        evaluates = not torch.is_grad_enabled() and not (in_pass and self.root.training)
        return self.driver.untraced() if evaluates and not self.driver.in_pass else nullcontext()

    @contextmanager
    def using(self, parameters: list[PagedParameter]) -> Iterator[None]:
        """Have parameters bound inside the block, as for one call that only reads them. Raises as `call`."""
        if all(parameter._place.bound for parameter in parameters):
            yield
            return
        if self.without_values:
            self.without_values.check(parameter._place.slot for parameter in parameters)
        with self._scope(), self._bound_for_block(parameters):
            yield

    @contextmanager
    def _bound_for_block(self, parameters: list[PagedParameter]) -> Iterator[None]:
        """`bound`, for a block of the user's code."""
        with no_torch_function():
            context = self.bound(parameters)
            context.__enter__()
        try:
            yield
        finally:
            with no_torch_function():
                context.__exit__(None, None, None)

    @contextmanager
    def bound(self, parameters: Iterable[PagedParameter]) -> Iterator[None]:
        """Have parameters bound inside the block, as one op."""
        places = [parameter._place for parameter in parameters]
        units = list(dict.fromkeys(place.unit for place in places))
        in_backward = torch._C._current_graph_task_id() != -1
        for unit in units:
            if unit.forgotten:
                raise RuntimeError(
                    f"{unit.name} was built under deferred_init, but is not part of the model that the engine was "
                    "made for, so its pages were given back; build what the engine does not train outside of that "
                    "block"
                )
            if unit.bound is not None and unit.updated and self.updater is not None:
                self.updater.catch_up(unit)  # Nobody has counted its gradients.
            if unit.ended and in_backward:
                self._refuse_late_use(unit, places)
            if self.updater is not None:
                (self.updater.before_use if self.driver.in_step else self.updater.settle)(unit)
                looks = unit.updated or self.state_copies.copying or not torch.is_grad_enabled()
                if looks and not in_backward:
                    self.note_early_use(unit, places)
        if self.activations is not None:
            self.activations.flush()
        if in_backward:
            self.forward_end.backward_use()
        elif self.forwards and torch.is_grad_enabled():
            self.forward_end.forward_use([unit.compute.id for unit in units], self.units)
        key = (OpKind.BACKWARD if in_backward else OpKind.FORWARD, tuple(unit.index for unit in units))
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
            offset_bytes = slot.offset * slot.dtype.itemsize
            flat = self.mover.lease(place.unit.compute, offset_bytes, slot.dtype, slot.numel)
            parameter.data = flat.view(slot.shape)
        place.bound += 1

    def takes_nothing(self, parameter: PagedParameter, values: Tensor) -> bool:
        """Before ``parameter.data = values``: whether they are the parameter's own memory, so that nothing is to be
        done.

        Raises:
            RuntimeError: somebody has a view of the parameter, or of another one in its unit, which in plain PyTorch
                would keep the old values.
        """
        if parameter is values or self.edits.holds(parameter, values):
            return True
        place = parameter._place
        bound = place.unit.bound
        viewed = bound.aliased if bound is not None else not place.bound and self.driver.viewed(place.unit.compute)
        if viewed and not self.closed:
            raise RuntimeError(
                f"{place.slot.name}: .data is assigned while a view of the parameter (from .data, .detach(), ...) is "
                "in use, which would change with it; keep a copy instead (parameter.detach().clone()), or let go of "
                "the view"
            )
        return False

    @contextmanager
    def gather(self, parameters: list[PagedParameter]) -> Iterator[None]:
        """Have parameters bound inside the block, to be read and written in place, outside of steps. Raises as
        `call`."""
        if self.closed:
            raise self.refusal(parameters[0]._place.slot.name)
        with self.driver.untraced(), self._bound_for_block(parameters):
            versions = [parameter._version for parameter in parameters]
            try:
                yield
            finally:
                for parameter, version in zip(parameters, versions, strict=True):
                    if parameter._version != version:
                        self.edits.changed(parameter._place)

    def note_early_use(self, unit: Unit, places: Iterable[Place]) -> None:
        """A unit is used outside of a backward pass, perhaps between backward and step, where plain PyTorch has its old
        values.

        Raises:
            RuntimeError, StaleGradientError: it has the new ones.
        """
        if unit.updated:
            slot = next(place.slot for place in places if place.unit is unit)
            copying = self.state_copies.copying
            self.state_copies.copying = 0  # A state_dict() that raises does not come to its end.
            raise early_use(slot, in_forward=torch.is_grad_enabled() and self.forwards > 0 and not copying)
        if any(slot.arrivals for slot in unit.slots):
            unit.touched = True  # Whoever does so in one step is going to in the next one.

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
                f"{slot.name}: this parameter was frozen when the optimizer was made from the configuration, which "
                "does not have it; call requires_grad_(True) before offload.prepare, or give prepare an optimizer "
                "factory over all parameters"
            )
        parameter._place.gradient.watch(parameter)

    def confirm_structure(self) -> None:
        """Before a gradient is used: raise when the last forward pass was not of the model that is in pages."""
        if self.doubted:
            self.check_structure()
            self.doubted = False

    def collect_in_hooks(self, wanted: bool) -> None:
        """Take gradients over that hooks which failed have left behind, or throw them away if they are not
        ``wanted``."""
        with no_torch_function():
            while self.in_hooks:
                parameter = self.in_hooks.pop()
                parameter._place.gradient.collect(parameter, wanted=wanted)

    def give_back(self, parameter: PagedParameter, device: str) -> None:
        """Make a paged parameter an ordinary one again, with its values, on ``device``.

        Raises:
            StorageError: they cannot be read; the parameter is still paged.
        """
        device = "meta" if parameter._place.slot in self.without_values else device
        with no_torch_function(), self.driver.untraced(), self.bound([parameter]):
            values = parameter.detach().to(device, copy=True)
        assign(parameter, values)
        parameter.__class__ = plain_class(type(parameter))  # type: ignore[assignment]
        del parameter._place

    def close(self) -> None:
        """Using any of the parameters raises from now on."""
        self.bindings.let_go(for_good=True)
        self.closed = True

    def disown(self) -> None:
        """In a forked child: the pages are the parent's."""
        self.closed = self._forked = True
        self.bindings.disown()
        self.updater = refusing_updater()

    def refusal(self, name: str) -> RuntimeError:
        """The error for a use of what is called ``name`` after that."""
        return disowned(name) if self._forked else RuntimeError(f"{name}: the engine that holds this is closed")
