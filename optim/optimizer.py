"""The optimizer that users hold: a `torch.optim.Optimizer` whose states live in pages.

param_groups, LR schedulers, state_dict and ``loss.backward(); optimizer.step(); optimizer.zero_grad()`` work as with
torch's own. Most updates have been made by the time `step` is called, or are made later, before their parameters are
next used; every way to look at parameters or states shows them as if `step` had done everything.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch.optim import Optimizer

from optim.rules import UpdateRule
from optim.states import StateAccess
from optim.unit import Hyper, Slot, Unit
from optim.updater import Updater
from pagemem.process.forks import disowned


@contextmanager
def without_compiler() -> Iterator[None]:
    """Have torch optimizers made without torch.compile, which adding a group imports just to be left alone by it.

    It takes 75 MB and seconds. Where it is there already, nothing changes.
    """
    guarded = Optimizer.add_param_group
    if "torch._dynamo" not in sys.modules:
        Optimizer.add_param_group = inspect.unwrap(guarded)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = guarded  # type: ignore[method-assign]


class PagedOptimizer(Optimizer):
    """Optimizer over paged parameters. Made by `offload.prepare` and `offload.initialize`, not by hand.

    Args:
        template: a torch optimizer over the same parameters: its groups, hyper-parameters and class are taken over.
        rule: what the template's class does.
        places: unit and slot of each parameter that is ever updated, or of each of its slices.
        states: reads and writes the paged states.
        untraced: context in which looking at states leaves the traced step as it is.
    """

    def __init__(
        self,
        template: torch.optim.Optimizer,
        rule: UpdateRule,
        places: Mapping[torch.Tensor, Sequence[tuple[Unit, Slot]]],
        states: StateAccess,
        untraced: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._rule = rule
        self._places = places
        self._states = states
        self._untraced = untraced
        self._updater: Updater | None = None
        self._closed = False
        self._packing = True
        groups = [dict(group.items()) for group in template.param_groups]
        super().__init__(groups, dict(template.defaults))
        self._known_members = self._members()
        self._packing = False

    @property
    def state(self) -> Any:
        """Refused, as what is there cannot be edited in place; torch's own code finds that nothing is kept outside of
        pages.

        Raises:
            RuntimeError: always, with what to call instead.
        """
        if self._packing:
            return defaultdict(dict)
        raise RuntimeError(
            "optimizer.state: the states are in pages; read them with optimizer.state_dict(), write or reset them with "
            "optimizer.load_state_dict()"
        )

    @state.setter
    def state(self, value: Any) -> None:
        if not self._packing:
            raise RuntimeError(
                "optimizer.state: the states are in pages; write or reset them with optimizer.load_state_dict()"
            )

    @contextmanager
    def _by_torch(self) -> Iterator[None]:
        """Inside the block torch's own code sees an optimizer without states."""
        self._packing = True
        try:
            yield
        finally:
            self._packing = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("an optimizer over pages cannot be copied or pickled; use optimizer.state_dict()")

    def attach(
        self,
        updater: Updater,
        stepped: Callable[[], None],
        check_model: Callable[[], None],
        collect_in_hooks: Callable[[bool], None],
    ) -> None:
        """Give the optimizer the updater that does its work. Once, while it is made.

        Args:
            stepped: is told of each step.
            check_model: makes sure before it.
            collect_in_hooks: takes gradients over that hooks which failed have left behind, or throws them away.
        """
        self._updater, self._stepped, self._check_model, self._collect_in_hooks = (
            updater,
            stepped,
            check_model,
            collect_in_hooks,
        )

    @property
    def torch_class(self) -> type[torch.optim.Optimizer]:
        """The class of torch that it stands for."""
        return self._rule.torch_class

    @property
    def state_names(self) -> tuple[str, ...]:
        """What it keeps of each element."""
        return self._rule.state_names

    def hypers(self) -> list[Hyper]:
        """Hyper-parameters of every group as they are now."""
        return [{name: group[name] for name in self._rule.hyper_names} for group in self.param_groups]

    @property
    def updater(self) -> Updater:
        """What applies the updates."""
        if self._updater is None or self._closed:
            raise RuntimeError("this optimizer's engine is closed")
        return self._updater

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with the gradients since the last one.

        Raises:
            RuntimeError: hyper-parameters changed after updates of this step had used them, a gradient that an update
                used up was not cleared since, or the model no longer has the parameters that are in pages; no update
                was made by this call.
            ValueError: a group asks for something that the rule does not do, or has other parameters; likewise.
            NonFiniteError: with clipping, the gradients' norm is not finite; no parameter was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updater = self.updater
        self._check_model()
        self._check_groups()
        self._collect_in_hooks(True)
        updater.step()
        self._stepped()
        return loss

    def _members(self) -> list[list[int]]:
        return [list(map(id, group["params"])) for group in self.param_groups]

    def _check_groups(self) -> None:
        if self._members() != self._known_members:
            raise ValueError(
                "parameters of a paged optimizer cannot be added or taken out; name all of them in the factory"
            )
        for group in self.param_groups:
            self._rule.check(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Throw gradients away: after a step, as in every loop, or in place of one.

        Args:
            set_to_none: otherwise they are zeros, with which the next step updates parameters that get no gradient in
                it.

        Raises:
            RuntimeError: updates of a step that was begun but not made have already been applied. `Engine.abandon_step`
                gives such a step up.
        """
        if not self._closed:
            self._collect_in_hooks(False)
            self.updater.clear(zeros=not set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group while the optimizer is made; parameters cannot be added later."""
        if self._updater is not None:
            raise RuntimeError("parameter groups cannot be added to a paged optimizer; name all of them in the factory")
        super().add_param_group(param_group)

    def close(self) -> None:
        """The engine is closed: using the optimizer raises from now on."""
        self._closed = True

    def disown(self, updater: Updater) -> None:
        """In a forked child: the engine is the parent's, and ``updater`` refuses everything."""
        self._updater, self._closed = updater, False

    @contextmanager
    def _settled(self) -> Iterator[None]:
        with self.updater.consistent(whole=True), self._untraced():
            yield

    def state_dict(self) -> dict[str, Any]:
        """torch's format, with every state gathered into an ordinary fp32 tensor; the bytes of large ones are in files
        of their own beside the page files, so that they take no RAM.

        Raises:
            DiskFullError: there is no room for one there.
        """
        with self._by_torch():
            packed = super().state_dict()
        names = self._rule.state_names
        with self._settled():
            for number, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
                if parameter not in self._places:
                    continue
                places = self._places[parameter]
                steps = places[0][1].steps
                if steps:
                    state: dict[str, Any] = {"step": torch.tensor(float(steps))} if self._rule.keeps_step else {}
                    shape = parameter.shape
                    state.update({name: self._states.read(places, shape, i) for i, name in enumerate(names)})
                    packed["state"][number] = state
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take groups and states over from `state_dict` of this class or of the torch optimizer it stands for.

        Raises:
            ValueError: a group asks for something that the rule does not do; nothing was changed. Groups or shapes
                differ; what was read before the difference is kept.
        """
        for group in state_dict["param_groups"]:
            self._rule.check(group)
        states, bare = state_dict["state"], {**state_dict, "state": {}}
        with self._settled():
            with self._by_torch():
                super().load_state_dict(bare)
            for number, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
                if parameter not in self._places:
                    continue
                places = self._places[parameter]
                state = states.get(number, {})
                # SGD keeps no step count: a buffer means that there was a first update.
                for _, slot in places:
                    slot.steps, slot.lookahead = int(state["step"]) if "step" in state else int(bool(state)), ()
                for i, name in enumerate(self._rule.state_names):
                    value = state.get(name)
                    self._states.write(places, parameter.shape, i, torch.zeros(()) if value is None else value)


class _Refusing:
    """What a forked child has in the place of its parent's updater."""

    def __getattr__(self, name: str) -> Any:
        raise disowned("this optimizer")


def refusing_updater() -> Updater:
    """Whatever is asked of it raises RuntimeError."""
    return cast(Updater, _Refusing())
