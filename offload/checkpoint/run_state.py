"""What a commit has of a run beside its paged tensors, as JSON and as a safetensors file: counters, hyper-parameters,
random generators, buffers, and the states of tracked objects (LR schedulers, data). No pickle is written or read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from offload.commits.commit_state import ENCODING, random_states
from offload.commits.plain_state import UnknownState, encode
from offload.commits.stored_layout import names_of, stored_units, unlike_state_dict
from offload.config import Config
from offload.parameters.inner_tensors import is_wrapper
from offload.parameters.paged_parameter import PagedParameter
from offload.sources.safetensors_file import DTYPES
from offload.store.page_store import PageStore
from optim.optimizer import PagedOptimizer
from optim.unit import Slot
from optim.updater import Updater
from pagemem.errors import CommitError


class Stateful(Protocol):
    """What can be tracked: an LR scheduler, a data source, ..."""

    def state_dict(self) -> dict[str, Any]:
        """The state; see `Engine.track` for what may be in it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take a state over."""


class RunState:
    """Of one engine. Training thread, between two steps.

    Attributes:
        tracked: what has its state in every commit, by name.
        given: hyper-parameters that the groups were given, by whoever made the optimizer: here, or where the commit was
            made.
    """

    def __init__(
        self, model: nn.Module, store: PageStore, optimizer: PagedOptimizer, updater: Updater, config: Config
    ) -> None:
        self._model = model
        self._store = store
        self._optimizer = optimizer
        self._updater = updater
        self._config = config
        self.tracked: dict[str, Stateful] = {}
        self.given = [without(group, "params") for group in optimizer.param_groups]

    def track(self, name: str, thing: Stateful, *, replace: bool = False) -> None:
        """Have a thing's state in every commit from now on, and restored by `resume`.

        Args:
            replace: what is tracked by this name so far.

        Raises:
            ValueError: the name is taken, or the thing has a state that cannot be committed; says where in it.
        """
        if name in self.tracked and not replace:
            raise ValueError(f"something is tracked as {name!r} already; take another name")
        encode(thing.state_dict(), f"the state of {name!r}")
        self.tracked[name] = thing

    def state(self) -> dict[str, Any]:
        """For a manifest, see `offload.commits.commit_state.CommitState`.

        Raises:
            CommitError: something cannot be committed; says what, and where in it.
        """
        try:
            tracked = {
                name: encode(thing.state_dict(), f"the state of {name!r}") for name, thing in self.tracked.items()
            }
            groups, given = (
                [
                    encode(without(group, "params"), f"optimizer.param_groups[{place}]")
                    for place, group in enumerate(groups)
                ]
                for groups in (self._optimizer.param_groups, self.given)
            )
        except UnknownState as error:
            raise CommitError(f"nothing is committed: {error}") from error
        return {
            "slice_numel": self._store.slice_numel,
            "cut_bytes": self._store.cut_sizes.ram_bytes if self._store.cut_sizes.cuts else 0,
            "staleness": self._updater.staleness,
            "optimizer": self._optimizer.torch_class.__name__,
            "parameters": self.parameters(),
            "update_steps": {slot.name: slot.steps for slot in self.slots()},
            "lookahead": {slot.name: list(slot.lookahead) for slot in self.slots() if slot.lookahead},
            "edited": [slot.name for slot in self.slots() if slot.edited],
            "units": stored_units(self._store.index.units),
            "names": names_of(self._model),
            "unlike": unlike_state_dict(self._model),
            "encoding": ENCODING,
            "groups": groups,
            "given": given,
            "random": random_states(self._store.binder.torch_device),
            "tracked": tracked,
            "config": self._config.model_dump(mode="json"),
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
        }

    def sidecar(self) -> bytes:
        """A safetensors file with what `ordinary_tensors` has; empty where that is nothing.

        Raises:
            CommitError: one has a dtype that cannot be committed.
        """
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in self.ordinary_tensors().items()}
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES.values():
                raise CommitError(
                    f"{name} has {tensor.dtype}, which cannot be committed; give it another dtype, or register it as a "
                    "buffer that is not persistent"
                )
        return save_tensors(tensors) if tensors else b""

    def ordinary_tensors(self) -> dict[str, Tensor]:
        """Persistent buffers, and parameters that are not paged."""
        found: dict[str, Tensor] = {
            n: p for n, p in self._model.named_parameters() if not isinstance(p, PagedParameter) and not is_wrapper(p)
        }
        for prefix, module in self._model.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                if key not in module._non_persistent_buffers_set:
                    found[f"{prefix}.{key}" if prefix else key] = buffer
        return found

    def parameters(self) -> dict[str, Any]:
        """What must be equal where a run resumes: shape, dtype and parameter group of each paged parameter, as JSON has
        it."""
        return {slot.name: [list(slot.shape), str(slot.dtype), slot.group] for slot in self.slots()}

    def slots(self) -> list[Slot]:
        """All paged parameters, or slices of them, in the units' order."""
        return [slot for unit in self._store.index.units for slot in unit.slots]

    def set_counters(self, state: Mapping[str, Any]) -> None:
        """Restore the counters of each parameter; slices of one have them in common, however it is cut."""
        whole = {slot["name"]: slot.get("of") or slot["name"] for unit in state["units"] for slot in unit["slots"]}
        steps = {whole[name]: int(number) for name, number in state["update_steps"].items()}
        edited = {whole[name] for name in state["edited"]}
        # Exact mode continues from where lock-free mode had the parameters; commits of format 1 may lack the entry.
        lookahead = state.get("lookahead", {}) if self._config.update.lock_free else {}
        for slot in self.slots():
            slot.steps, slot.edited = steps[slot.whole_name], slot.whole_name in edited
            slot.lookahead = tuple(lookahead.get(slot.name, ()))

    def set_hypers(self, groups: Sequence[Mapping[str, Any]], *, keep: bool) -> None:
        """Hyper-parameters of the commit's groups; with ``keep`` only what an LR scheduler needs to continue."""
        for group, saved in zip(self._optimizer.param_groups, groups, strict=True):
            if not keep:
                group.update({key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in saved.items()})
            elif "initial_lr" in saved:
                group.setdefault("initial_lr", group["lr"])

    def load_tracked(self, where: str, states: Mapping[str, Any]) -> None:
        """Have everything that is tracked take its state over, or nothing of it."""
        before: dict[str, Any] = {}
        try:
            for name, thing in self.tracked.items():
                before[name] = thing.state_dict()
                thing.load_state_dict(states[name])
        except Exception as error:
            for name, own in before.items():
                self.tracked[name].load_state_dict(own)
            raise CommitError(f"{where}: {name!r} does not take its state: {type(error).__name__}: {error}") from error


def without(group: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """A parameter group without some of its keys."""
    return {key: value for key, value in group.items() if key not in keys}
