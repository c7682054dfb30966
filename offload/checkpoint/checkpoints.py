"""Saving and restoring the complete state of training: `Checkpoints` of one engine.

Counters, hyper-parameters, random generators and the states of tracked objects (LR schedulers, data) are JSON in the
manifest; buffers and ordinary parameters are a safetensors file beside it. No pickle is written or read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from offload.checkpoint.committer import CommitContent, Committer
from offload.checkpoint.compatibility import (
    Resumed,
    check_contents,
    check_groups,
    config_changes,
    hyper_changes,
)
from offload.commits.commit_state import ENCODING, random_states, set_random_states
from offload.commits.plain_state import UnknownState, decode, encode
from offload.commits.run_commits import Commit
from offload.commits.sidecar import read_sidecar
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
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.sources.source_files import Origin
from pagemem.tier import TRANSIENT

_MAX_NAME: Final = 200
#: How torch computes updates: the engine has one way, which commits once did not name.
_KERNEL_KEYS: Final = ("fused", "foreach")


class Stateful(Protocol):
    """What can be tracked: an LR scheduler, a data source, ..."""

    def state_dict(self) -> dict[str, Any]:
        """The state; see `Engine.track` for what may be in it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take a state over."""


class Checkpoints:
    """Saves and resumes. Methods belong to the training thread, between two steps."""

    def __init__(
        self, model: nn.Module, store: PageStore, optimizer: PagedOptimizer, updater: Updater, config: Config
    ) -> None:
        self._model = model
        self._store = store
        self._optimizer = optimizer
        self._updater = updater
        self._config = config
        self._tracked: dict[str, Stateful] = {}
        #: Hyper-parameters that the groups were given, by whoever made the optimizer: here, or where the commit was
        #: made.
        self._given = [_without(group, "params") for group in optimizer.param_groups]
        self.committer = Committer(store, config.commit.keep)
        self._last_step = 0
        self._last_s = time.monotonic()

    def track(self, name: str, thing: Stateful, *, replace: bool = False) -> None:
        """Have a thing's state in every commit from now on, and restored by `resume`.

        Args:
            replace: what is tracked by this name so far.

        Raises:
            ValueError: the name is taken, or the thing has a state that cannot be committed; says where in it.
        """
        if name in self._tracked and not replace:
            raise ValueError(f"something is tracked as {name!r} already; take another name")
        encode(thing.state_dict(), f"the state of {name!r}")
        self._tracked[name] = thing

    # ---- saving ------------------------------------------------------------------------------------------------

    def save(self, step: int, name: str | None = None, *, whole: bool = True) -> int:
        """Begin to commit the state after ``step`` steps; returns the commit's number. See `Committer.begin`.

        Args:
            whole: with every update of these steps. Otherwise gradients that are on their way to the updater of
                lock-free mode are left out, and training does not wait for them; a run that resumes from there misses
                them.

        Raises:
            ValueError: the name is empty, too long, or not one line. Nothing was begun, as after the next.
            CommitError: a tracked state, a parameter group or a buffer has something that cannot be committed; says
                where.
            RuntimeError: the model no longer has the parameters that are in pages.
        """
        if name is not None and (not name or len(name) > _MAX_NAME or not name.isprintable()):
            raise ValueError(
                f"a commit's name is one line of 1 to {_MAX_NAME} characters, not {name[: _MAX_NAME + 1]!r}"
            )
        self._store.binder.check_structure()
        self._store.binder.without_values.check(self._slots())
        self._store.binder.bindings.let_go()  # A commit has what is changed copied before.
        with self._updater.consistent(whole=whole):
            if self._store.device_tier is not None:
                self._store.device_tier.bring_down()
            number = self.committer.begin(CommitContent(step, name, self._state(), self._sidecar()))
        self._last_step, self._last_s = step, time.monotonic()
        return number

    def due(self, step: int) -> bool:
        """Whether a commit is due by the configuration, and none is being written. Raises the error of the last one."""
        self.committer.check()
        due = self._config.commit
        by_step = due.every_steps is not None and step - self._last_step >= due.every_steps
        by_time = due.every_s is not None and time.monotonic() - self._last_s >= due.every_s and step > self._last_step
        wanted = by_step or by_time
        if self._store.collectives is not None and (due.every_steps is not None or due.every_s is not None):
            # Clocks differ, and so do the times that commits take: rank 0's counts, once all are through with the last.
            said = self._store.collectives.agree([float(wanted), float(self.committer.busy)])
            return bool(said[0][0]) and not any(busy for _, busy in said)
        return wanted and not self.committer.busy

    def _state(self) -> dict[str, Any]:
        try:
            tracked = {
                name: encode(thing.state_dict(), f"the state of {name!r}") for name, thing in self._tracked.items()
            }
            groups, given = (
                [
                    encode(_without(group, "params"), f"optimizer.param_groups[{place}]")
                    for place, group in enumerate(groups)
                ]
                for groups in (self._optimizer.param_groups, self._given)
            )
        except UnknownState as error:
            raise CommitError(f"nothing is committed: {error}") from error
        return {
            "slice_numel": self._store.slice_numel,
            "cut_bytes": self._store.cut_sizes.ram_bytes if self._store.cut_sizes.cuts else 0,
            "staleness": self._updater.staleness,
            "optimizer": self._optimizer.torch_class.__name__,
            "parameters": self._parameters(),
            "update_steps": {slot.name: slot.steps for slot in self._slots()},
            "lookahead": {slot.name: list(slot.lookahead) for slot in self._slots() if slot.lookahead},
            "edited": [slot.name for slot in self._slots() if slot.edited],
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

    def _sidecar(self) -> bytes:
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in self._ordinary_tensors().items()}
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES.values():
                raise CommitError(
                    f"{name} has {tensor.dtype}, which cannot be committed; give it another dtype, or register it as a "
                    "buffer that is not persistent"
                )
        return save_tensors(tensors) if tensors else b""

    def _ordinary_tensors(self) -> dict[str, Tensor]:
        """Persistent buffers, and parameters that are not paged."""
        found: dict[str, Tensor] = {
            n: p for n, p in self._model.named_parameters() if not isinstance(p, PagedParameter) and not is_wrapper(p)
        }
        for prefix, module in self._model.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                if key not in module._non_persistent_buffers_set:
                    found[f"{prefix}.{key}" if prefix else key] = buffer
        return found

    def _parameters(self) -> dict[str, Any]:
        """What must be equal where a run resumes: shape, dtype and parameter group of each paged parameter, as JSON has
        it."""
        return {slot.name: [list(slot.shape), str(slot.dtype), slot.group] for slot in self._slots()}

    def _slots(self) -> list[Slot]:
        return [slot for unit in self._store.index.units for slot in unit.slots]

    # ---- resuming ----------------------------------------------------------------------------------------------

    def resume(
        self, name: str | None = None, *, allow_older: bool = False, keep_hypers: bool = False
    ) -> Resumed | None:
        """Continue from the newest commit, or the one of this name; None when the run has no commit.

        Args:
            keep_hypers: keep the parameter groups' own hyper-parameters instead of the commit's.

        Raises:
            CommitError: it is damaged, or of another model, optimizer or precision; the engine is as it was.
        """
        self._store.binder.check_structure()
        found = self._choose(name, allow_older)
        if found is None:
            return None
        commit, ordinary = found
        manifest, where = commit.manifest, f"commit {commit.manifest.number}"
        state = manifest.state
        self._check_contents(commit, ordinary)
        read = decode if "encoding" in state else lambda value: value
        groups = [_without(read(group), *_KERNEL_KEYS) for group in state["groups"]]
        check_groups(where, groups, self._optimizer)
        files = [file.find(self._store.sources.reader.files) for file in manifest.files]
        origins = {tensor.key: tensor.origin(files) for tensor in manifest.referenced}
        self._updater.drain()
        self._store.driver.quiesce()
        with self._store.binder.driver.untraced():
            self._check_unused()
            self._load_tracked(where, {name: read(state["tracked"][name]) for name in self._tracked})
            self._take_all_over(commit, origins)
        self._set_counters(state)
        self._set_hypers(groups, keep=keep_hypers)
        with torch.no_grad():
            for key, kept in self._ordinary_tensors().items():
                kept.copy_(ordinary[key])
        set_random_states(state["random"], self._store.binder.torch_device)
        self.committer.follow(commit)
        self._last_step, self._last_s = manifest.step, time.monotonic()
        changed = config_changes(state["config"], self._config.model_dump(mode="json"))
        if state.get("given") is not None:
            given = [_without(read(group), *_KERNEL_KEYS) for group in state["given"]]
            changed += hyper_changes(given, self._given, kept=keep_hypers)
            self._given = self._given if keep_hypers else given
        newer = [str(error) for number, error in sorted(self.committer.damaged.items()) if number > manifest.number]
        return Resumed(manifest.step, manifest.number, manifest.name, manifest.created, tuple(newer), tuple(changed))

    def _set_counters(self, state: Mapping[str, Any]) -> None:
        """Restore the counters of each parameter."""
        for slot in self._slots():
            slot.steps, slot.edited = int(state["update_steps"][slot.name]), slot.name in state["edited"]
            # Exact mode continues from where lock-free mode had the parameters; commits of format 1 may lack the entry.
            slot.lookahead = (
                tuple(state.get("lookahead", {}).get(slot.name, ())) if self._config.update.lock_free else ()
            )

    def _set_hypers(self, groups: Sequence[Mapping[str, Any]], *, keep: bool) -> None:
        """Hyper-parameters of the commit's groups; with ``keep`` only what an LR scheduler needs to continue."""
        for group, saved in zip(self._optimizer.param_groups, groups, strict=True):
            if not keep:
                group.update({key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in saved.items()})
            elif "initial_lr" in saved:
                group.setdefault("initial_lr", group["lr"])

    def _check_contents(self, commit: Commit, ordinary: Mapping[str, Tensor]) -> None:
        check_contents(
            commit,
            ordinary,
            optimizer=self._optimizer.torch_class.__name__,
            parameters=self._parameters(),
            ordinary=self._ordinary_tensors(),
            tensors=self._tensors(),
            tracked=set(self._tracked),
        )

    def _load_tracked(self, where: str, states: Mapping[str, Any]) -> None:
        """Have everything that is tracked take its state over, or nothing of it."""
        before: dict[str, Any] = {}
        try:
            for name, thing in self._tracked.items():
                before[name] = thing.state_dict()
                thing.load_state_dict(states[name])
        except Exception as error:
            for name, own in before.items():
                self._tracked[name].load_state_dict(own)
            raise CommitError(f"{where}: {name!r} does not take its state: {type(error).__name__}: {error}") from error

    def _choose(self, name: str | None, allow_older: bool) -> tuple[Commit, dict[str, Tensor]] | None:
        """A commit and the small tensors beside it."""
        while (commit := self.committer.choose(name, allow_older=allow_older)) is not None:
            number = commit.manifest.number
            try:
                return commit, read_sidecar(self._store.earlier.folder, number, commit.manifest.state)
            except CommitError as error:
                if name is not None or not allow_older:
                    raise
                self.committer.damaged[number] = error
        return None

    def _check_unused(self) -> None:
        """Raise CommitError where a view of a paged tensor is in use."""
        self._store.mover.collect_leases()
        for key, tensor in self._tensors().items():
            if tensor.pins or tensor.leases:
                raise CommitError(
                    f"{key} cannot be restored while a view of it is in use; delete the view before you resume"
                )

    def _tensors(self) -> dict[str, PagedTensor]:
        return {f"{t.tag.value}: {t.name}": t for t in self._store.lasting() if t.tag not in TRANSIENT}

    def _take_all_over(self, commit: Commit, origins: Mapping[str, Origin]) -> None:
        """Have pages hold what a commit does."""
        for tensor in self._tensors().values():
            self._take_over(tensor, commit, origins)
        for unit in self._store.index.units:
            self._store.updated(unit)
        if self._store.device_tier is not None:
            self._store.device_tier.bring_up()
        self._store.binder.without_values.discard(self._slots())

    def _take_over(self, tensor: PagedTensor, commit: Commit, origins: Mapping[str, Origin]) -> None:
        mover, frame, key = self._store.mover, tensor.frame, f"{tensor.tag.value}: {tensor.name}"
        resident, tensor.resident = tensor.resident, False
        with mover.changed:
            mover.gathered.changed(tensor)
        if key in origins:
            mover.originate(tensor, origins[key])
        else:
            mover.resume(tensor, commit.copies.get(key))
        if resident and frame is not None:
            mover.start_load(tensor, frame)
            mover.monitor.wait_until(lambda: tensor.readable, tensor.name, tensor.n_bytes)
            tensor.resident = True


def _without(group: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in keys}
