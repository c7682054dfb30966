"""Saving and restoring the complete state of training: `Checkpoints` of one engine.

A commit of the same shape, as many ranks that share the model alike, is gone on from where it lies: its pages become
this run's. One of another shape is read whole (`offload.checkpoint.import_commit`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from offload.checkpoint.committer import CommitContent, Committer
from offload.checkpoint.compatibility import (
    Change,
    Resumed,
    check_contents,
    check_groups,
    check_imported,
    config_changes,
    hyper_changes,
)
from offload.checkpoint.import_commit import import_values
from offload.checkpoint.run_state import RunState, Stateful, without
from offload.commits.commit_state import set_random_states
from offload.commits.foreign_commits import OTHERS, ForeignCommits
from offload.commits.plain_state import decode
from offload.commits.run_commits import Commit
from offload.commits.sidecar import read_sidecar
from offload.commits.stored_values import CommitPart, StoredValues
from offload.config import Config
from offload.store.page_store import PageStore
from optim.optimizer import PagedOptimizer
from optim.updater import Updater
from pagemem.durable.manifest import Manifest
from pagemem.errors import CommitError
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.sources.source_files import Origin
from pagemem.tier import TRANSIENT

_MAX_NAME: Final = 200
#: How torch computes updates: the engine has one way, which commits once did not name.
_KERNEL_KEYS: Final = ("fused", "foreach")


class Checkpoints:
    """Saves and resumes. Methods belong to the training thread, between two steps."""

    def __init__(
        self, model: nn.Module, store: PageStore, optimizer: PagedOptimizer, updater: Updater, config: Config
    ) -> None:
        self._store = store
        self._optimizer = optimizer
        self._updater = updater
        self._config = config
        self._own = RunState(model, store, optimizer, updater, config)
        self.committer = Committer(store, config.commit.keep)
        self._paths = [Path(path) for path in config.ssd.paths]
        self._last_step = 0
        self._last_s = time.monotonic()

    def track(self, name: str, thing: Stateful, *, replace: bool = False) -> None:
        """See `RunState.track`."""
        self._own.track(name, thing, replace=replace)

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
        self._store.binder.without_values.check(self._own.slots())
        self._store.binder.bindings.let_go()  # A commit has what is changed copied before.
        with self._updater.consistent(whole=whole):
            if self._store.device_tier is not None:
                self._store.device_tier.bring_down()
            number = self.committer.begin(CommitContent(step, name, self._own.state(), self._own.sidecar()))
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

    def parts_of(self, number: int) -> list[CommitPart]:
        """The parts of a commit of this run, in rank order."""
        folders = tuple(directory.path for directory in self._store.directories)
        if self._store.rank_run is None:
            return [CommitPart(folders, self.committer.commits[number].manifest)]
        return ForeignCommits(self._paths, OTHERS).parts(number)

    @contextmanager
    def on_first_rank(self) -> Iterator[bool]:
        """Inside the block: whether this is the rank that does something for all; the others wait for it at its end.

        Raises:
            RankError: another rank failed.
        """
        collectives = self._store.collectives
        yield collectives is None or collectives.rank == 0
        if collectives is not None:
            collectives.agree([0.0])

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
        self.committer.wait()
        foreign = self._store.foreign.newest(name)
        if foreign > self.committer.newest(name):
            return self._import(foreign, keep_hypers=keep_hypers)
        found = self._choose(name, allow_older)
        if found is None:
            return None
        commit, ordinary = found
        manifest, state = commit.manifest, commit.manifest.state
        self._check_contents(commit, ordinary)
        groups = self._checked_groups(manifest)
        files = [file.find(self._store.sources.reader.files) for file in manifest.files]
        origins = {tensor.key: tensor.origin(files) for tensor in manifest.referenced}
        with self._taking_over(manifest):
            self._take_all_over(commit, origins)
        self._own.set_counters(state)
        changed = self._take_state(manifest, groups, ordinary, keep_hypers=keep_hypers)
        self.committer.follow(manifest.number)
        newer = [str(error) for number, error in sorted(self.committer.damaged.items()) if number > manifest.number]
        return Resumed(manifest.step, manifest.number, manifest.name, manifest.created, tuple(newer), tuple(changed))

    def _import(self, number: int, *, keep_hypers: bool) -> Resumed:
        """Go on from a commit of another shape."""
        foreign, run = self._store.foreign, self._store.rank_run
        parts = foreign.parts(number)
        rank = 0 if run is None else run.rank
        manifest = parts[rank if rank < len(parts) else 0].manifest
        ordinary = read_sidecar(foreign.folder_of(number, rank), number, manifest.state)
        with StoredValues(parts) as values:
            check_imported(
                manifest, ordinary, optimizer=self._optimizer.torch_class.__name__, slots=self._own.slots(),
                ordinary=self._own.ordinary_tensors(), tracked=set(self._own.tracked),
            )  # fmt: skip
            groups = self._checked_groups(manifest)
            with self._taking_over(manifest):
                import_values(self._store, values, len(self._optimizer.state_names))
        self._store.binder.without_values.discard(self._own.slots())
        self._own.set_counters(manifest.state)
        changed = self._take_state(manifest, groups, ordinary, keep_hypers=keep_hypers)
        self.committer.follow(number)
        return Resumed(manifest.step, number, manifest.name, manifest.created, (), tuple(changed))

    def _checked_groups(self, manifest: Manifest) -> list[dict[str, Any]]:
        """The hyper-parameters of a commit's groups, which this run's optimizer takes."""
        groups = [without(_read(manifest.state, group), *_KERNEL_KEYS) for group in manifest.state["groups"]]
        check_groups(f"commit {manifest.number}", groups, self._optimizer)
        return groups

    @contextmanager
    def _taking_over(self, manifest: Manifest) -> Iterator[None]:
        """Nobody uses the tensors in the block, which takes over what they are to hold; tracked states are taken."""
        self._updater.drain()
        self._store.driver.quiesce()
        tracked = manifest.state["tracked"]
        with self._store.binder.driver.untraced():
            self._check_unused()
            states = {name: _read(manifest.state, tracked[name]) for name in self._own.tracked}
            self._own.load_tracked(f"commit {manifest.number}", states)
            yield

    def _take_state(
        self, manifest: Manifest, groups: list[dict[str, Any]], ordinary: Mapping[str, Tensor], *, keep_hypers: bool
    ) -> list[Change]:
        """Have everything beside paged tensors as a commit has it; returns what of the configuration differs."""
        state = manifest.state
        self._own.set_hypers(groups, keep=keep_hypers)
        with torch.no_grad():
            for key, kept in self._own.ordinary_tensors().items():
                kept.copy_(ordinary[key])
        set_random_states(state["random"], self._store.binder.torch_device)
        self._last_step, self._last_s = manifest.step, time.monotonic()
        changed = list(config_changes(state["config"], self._config.model_dump(mode="json")))
        if state.get("given") is not None:
            given = [without(_read(state, group), *_KERNEL_KEYS) for group in state["given"]]
            changed += hyper_changes(given, self._own.given, kept=keep_hypers)
            self._own.given = self._own.given if keep_hypers else given
        return changed

    def _check_contents(self, commit: Commit, ordinary: Mapping[str, Tensor]) -> None:
        check_contents(
            commit,
            ordinary,
            optimizer=self._optimizer.torch_class.__name__,
            parameters=self._own.parameters(),
            ordinary=self._own.ordinary_tensors(),
            tensors=self._tensors(),
            tracked=set(self._own.tracked),
        )

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
        self._store.binder.without_values.discard(self._own.slots())

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


def _read(state: Mapping[str, Any], value: Any) -> Any:
    """A value as a commit with this state has it."""
    return decode(value) if "encoding" in state else value
