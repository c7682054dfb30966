"""Whether a commit fits the model and optimizer that resume from it, and which settings differ. Nothing is changed."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from offload.commits.commit_state import state_of
from offload.commits.run_commits import Commit
from optim.optimizer import PagedOptimizer
from optim.unit import Slot
from pagemem.durable.manifest import Manifest
from pagemem.errors import CommitError
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag

#: What to do about a commit of another model.
_OTHER_RUN: Final = (
    "name other ssd.paths, or build the model and its optimizer with the arguments that the commit was made with"
)


def _shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()}


def check_contents(
    commit: Commit,
    sidecar: Mapping[str, Tensor],
    *,
    optimizer: str,
    parameters: Mapping[str, Any],
    ordinary: Mapping[str, Tensor],
    tensors: Mapping[str, PagedTensor],
    tracked: Set[str],
) -> None:
    """Raise CommitError where a commit holds something else than the run; names the first difference.

    Args:
        sidecar: the commit's buffers and parameters that are not paged.
        optimizer: name of torch's class. tracked: names of what `Engine.track` was given.
        parameters: shape, dtype and parameter group of each paged parameter, as JSON has them.
        ordinary: buffers and parameters that are not paged. tensors: paged tensors by `StoredTensor.key`.
    """
    where, state = f"commit {commit.manifest.number}", commit.manifest.state
    if state["optimizer"] != optimizer:
        raise CommitError(f"{where} was made with {state['optimizer']}, this run has {optimizer}; {_OTHER_RUN}")
    differing = _first_difference(state["parameters"], parameters)
    if differing is not None:
        raise CommitError(
            f"{where} and this run differ in parameter {differing} (shape, dtype, parameter group); {_OTHER_RUN}"
        )
    differing = _first_difference(_shapes_of(sidecar), _shapes_of(ordinary))
    if differing is not None:
        raise CommitError(
            f"{where} and this model differ in the buffer or unpaged parameter {differing} (shape, dtype); {_OTHER_RUN}"
        )
    theirs = commit.manifest.sizes
    for key, n_bytes in theirs.items():
        if key not in tensors:
            raise CommitError(
                f"{where} has {key}, which this model and optimizer do not have; resume with those it was made with"
            )
        if tensors[key].n_bytes != n_bytes:
            raise CommitError(
                f"{where} has {key} with {n_bytes} bytes, this model's has {tensors[key].n_bytes}; {_OTHER_RUN}"
            )
    for key, tensor in tensors.items():
        if key not in theirs and tensor.tag in (Tag.PARAM, Tag.MASTER):
            raise CommitError(f"{where} has no {key}; resume with the model it was made with")
    _check_tracked(where, tracked, set(state["tracked"]))


def check_imported(
    manifest: Manifest,
    sidecar: Mapping[str, Tensor],
    *,
    optimizer: str,
    slots: Sequence[Slot],
    ordinary: Mapping[str, Tensor],
    tracked: Set[str],
) -> None:
    """As `check_contents`, of a commit that may cut parameters, units and pages otherwise.

    Args:
        slots: the run's parameters, or slices of them.
    """
    where, state = f"commit {manifest.number}", state_of(manifest)
    if state.optimizer != optimizer:
        raise CommitError(f"{where} was made with {state.optimizer}, this run has {optimizer}; {_OTHER_RUN}")
    theirs: dict[str, list[Any]] = {}
    for unit in state.units:
        for stored in unit.slots:
            group = state.parameters[stored.name][2]
            _count(theirs, stored.whole, stored.end - stored.offset, f"torch.{unit.dtype}", group)
    ours: dict[str, list[Any]] = {}
    for slot in slots:
        _count(ours, slot.whole_name, slot.numel, str(slot.dtype), slot.group)
    for what, wanted, found in (
        ("parameter {} (elements, dtype, parameter group)", theirs, ours),
        ("the buffer or unpaged parameter {} (shape, dtype)", _shapes_of(sidecar), _shapes_of(ordinary)),
    ):
        differing = _first_difference(wanted, found)
        if differing is not None:
            raise CommitError(f"{where} and this run differ in {what.format(differing)}; {_OTHER_RUN}")
    _check_tracked(where, tracked, set(state.tracked))


def _count(found: dict[str, list[Any]], name: str, numel: int, dtype: str, group: int) -> None:
    """One more parameter, or one more slice of it."""
    found.setdefault(name, [0, dtype, group])[0] += numel


def _check_tracked(where: str, tracked: Set[str], there: Set[str]) -> None:
    untracked = tracked - there
    if untracked:
        raise CommitError(
            f"{where} has no state of {', '.join(sorted(untracked))}, which this run tracks; name other "
            "ssd.paths, or track what the commit's run has tracked"
        )


def check_groups(where: str, groups: Sequence[Mapping[str, Any]], optimizer: PagedOptimizer) -> None:
    """Whether torch's optimizer takes a commit's hyper-parameters, and they are of the types that the run's own have.

    Raises:
        CommitError: one is not; names the group.
    """
    if len(groups) != len(optimizer.param_groups):
        raise CommitError(f"{where} has {len(groups)} parameter groups, this run {len(optimizer.param_groups)}")
    known = set(inspect.signature(optimizer.torch_class).parameters) - {"params"}
    needed = set(optimizer.hypers()[0]) if groups else set()
    for place, (saved, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        if needed - set(saved):
            raise CommitError(f"{where}: parameter group {place} has no {min(needed - set(saved))}")
        for key, value in saved.items():
            like = own.get(key, 0.0 if key == "initial_lr" else value)
            if _kind(value) != _kind(like) and not (like is None and type(value) in (bool, int, float)):
                raise CommitError(
                    f"{where}: {key} of parameter group {place} is {reprlib.repr(value)}, this run's "
                    f"{reprlib.repr(like)}"
                )
        try:
            optimizer.torch_class([torch.zeros(1)], **{key: v for key, v in saved.items() if key in known})
        except (TypeError, ValueError, RuntimeError) as error:
            raise CommitError(f"{where}: parameter group {place}: {error}") from error


def _first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The first key under which two mappings have something else, in words."""
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            return f"{key}: {theirs.get(key, 'none')} and {ours.get(key, 'none')}"
    return None


def _kind(value: Any) -> Any:
    """The type of a hyper-parameter, with int and float as one."""
    if isinstance(value, (tuple, list)):
        return [_kind(item) for item in value]
    return float if type(value) in (int, float) else type(value)


# ---- what a run resumed from ----------------------------------------------------------------------------------------


_NEW: Final = "the new one holds"
#: What holds, where it is not the new value.
_HOLDS: Final = {
    "seed": "random generators go on as the commit has them; the new one is for data that asks for it",
    "memory.page": "pages stay as the commit has them",
}


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs from the commit's; as text, one line.

    Attributes:
        key: of the configuration, or of a parameter group.
        then, now: the values.
        holds: which of them holds from here on, in words.
    """

    key: str
    then: Any
    now: Any
    holds: str

    def __str__(self) -> str:
        return f"{self.key}: {reprlib.repr(self.then)} -> {reprlib.repr(self.now)}; {self.holds}"


@dataclass(frozen=True, slots=True)
class Resumed:
    """The commit that a run resumed from.

    Attributes:
        step: optimizer steps made.
        number, name, created: of the commit; the name is None for an unnamed one.
        passed_over: what is wrong with newer commits, which were damaged.
        changed: settings that differ from those of the commit, and which value holds.
    """

    step: int
    number: int
    name: str | None
    created: str
    passed_over: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()


def config_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Keys that two resolved configurations (`Config.model_dump`) both have, with other values.

    What the optimizer was given is compared by `hyper_changes`: it need not be the configuration's.
    """
    before, after = _flat(then), _flat(now)
    return [
        Change(key, before[key], after[key], _HOLDS.get(key, _NEW))
        for key in after
        if key in before and before[key] != after[key] and not key.startswith("optimizer.")
    ]


def hyper_changes(
    then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], *, kept: bool = False
) -> list[Change]:
    """Hyper-parameters that the parameter groups were given at first then, and are given now.

    A key whose values changed alike in all groups is listed once.

    Args:
        kept: the run keeps its own; otherwise the commit's hold.
    """
    found: dict[str, list[tuple[Any, Any] | None]] = {}
    for place, (before, after) in enumerate(zip(then, now, strict=True)):
        for key in after:
            if key in before and before[key] != after[key]:
                found.setdefault(key, [None] * len(now))[place] = before[key], after[key]
    holds = _NEW if kept else "the commit's holds; set it in optimizer.param_groups after resume() for another"
    changes = []
    for key, pairs in found.items():
        if all(pair == pairs[0] for pair in pairs) and pairs[0] is not None:
            changes.append(Change(f"optimizer.{key}", *pairs[0], holds))
        else:
            changes += [
                Change(f"optimizer.{key} of group {place}", *pair, holds)
                for place, pair in enumerate(pairs)
                if pair is not None
            ]
    return changes


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted names; a section that is not there is the value None."""
    found: dict[str, Any] = {}
    for name, section in config.items():
        if not isinstance(section, Mapping):
            found[name] = section
            continue
        found[name] = "given"
        found.update((f"{name}.{key}", value) for key, value in section.items())
    return found
