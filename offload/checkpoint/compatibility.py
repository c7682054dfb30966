"""Whether a commit fits the model and optimizer that resume from it; nothing is changed here."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

import torch

from offload.checkpoint.sidecar import TORCH_DTYPES, Sidecar
from offload.commits.run_commits import Commit
from optim.optimizer import PagedOptimizer
from pagemem.errors import CommitError
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag

#: What to do about a commit of another model.
_OTHER_RUN: Final = (
    "name other ssd.paths, or build the model and its optimizer with the arguments that the commit was made with"
)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a run's commits hold.

    Attributes:
        optimizer: name of torch's class.
        parameters: shape, dtype and parameter group of each paged parameter, as JSON has them.
        ordinary: shape and dtype of buffers and parameters that are not paged.
        tensors: paged tensors by `StoredTensor.key`.
        tracked: names of what `Engine.track` was given.
    """

    optimizer: str
    parameters: Mapping[str, Any]
    ordinary: Mapping[str, Any]
    tensors: Mapping[str, PagedTensor]
    tracked: Set[str]


def check_contents(commit: Commit, sidecar: Sidecar, run: Contents) -> None:
    """Raise CommitError where a commit holds something else than the run; names the first difference."""
    where, state = f"commit {commit.manifest.number}", commit.manifest.state
    if state["optimizer"] != run.optimizer:
        raise CommitError(f"{where} was made with {state['optimizer']}, this run has {run.optimizer}; {_OTHER_RUN}")
    differing = _first_difference(state["parameters"], run.parameters)
    if differing is not None:
        raise CommitError(
            f"{where} and this run differ in parameter {differing} (shape, dtype, parameter group); {_OTHER_RUN}"
        )
    differing = _first_difference(
        {name: [list(weight.shape), str(TORCH_DTYPES[weight.dtype])] for name, weight in sidecar.weights.items()},
        run.ordinary,
    )
    if differing is not None:
        raise CommitError(
            f"{where} and this model differ in the buffer or unpaged parameter {differing} (shape, dtype); {_OTHER_RUN}"
        )
    ours = run.tensors
    theirs = {stored.key: stored.n_bytes for stored in commit.manifest.tensors}
    for key, n_bytes in theirs.items():
        if key not in ours:
            raise CommitError(
                f"{where} has {key}, which this model and optimizer do not have; resume with those it was made with"
            )
        if ours[key].n_bytes != n_bytes:
            raise CommitError(
                f"{where} has {key} with {n_bytes} bytes, this model's has {ours[key].n_bytes}; {_OTHER_RUN}"
            )
    for key, tensor in ours.items():
        if key not in theirs and tensor.tag in (Tag.PARAM, Tag.MASTER):
            raise CommitError(f"{where} has no {key}; resume with the model it was made with")
    untracked = run.tracked - set(state["tracked"])
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
