"""transformers' Trainer over a paged model: checkpoints whose optimizer states never leave their pages.

The Trainer trains a model and an optimizer of `offload.prepare` as they are. Its own checkpoints hold the optimizer's
states as a pickle of their full size. With ``save_only_model=True`` and this callback they are in a commit instead,
which copies nothing, and from which ``train(resume_from_checkpoint=...)`` goes on with the same bits.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from optim.optimizer import PagedOptimizer
from pagemem.errors import CommitError

if TYPE_CHECKING:
    from offload.engine import Engine

#: In a checkpoint's folder: which commit belongs to it.
COMMIT_FILE: Final = "offload_commit.json"
#: The Trainer's own file of the states of random generators, which it reads when the batches before are skipped.
RANDOM_FILE: Final = "rng_state.pth"
_SCHEDULER: Final = "transformers.lr_scheduler"


class OffloadCallback(transformers.TrainerCallback):
    """Makes a commit with every checkpoint of a Trainer, and goes on from it when the Trainer does.

    A commit is kept as long as its checkpoint, and the last one until the next is made. Training thread.

    Raises:
        ValueError: (when training begins) the Trainer's optimizer is not one of `offload.prepare`.
        CommitError: (when training begins) ``ssd.paths`` has commits of another training; (when it goes on) the
            checkpoint's commit is not in the run's folder any more.
    """

    def __init__(self) -> None:
        self._last_name: str | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """Go on from the commit of the checkpoint that the Trainer goes on from, if it does."""
        engine = _engine_of(optimizer)
        engine.track(_SCHEDULER, lr_scheduler, replace=True)  # of a Trainer before this one
        if not state.global_step:
            engine.debug.committer.check_own_course()  # rather than at the first checkpoint, after hours
        else:
            folder = _folder(args, state.global_step)
            commit = _commit_of(folder, engine.run_id)
            with _random_generators_kept():  # the Trainer puts them back by itself, once its sampler has drawn
                resumed = engine.resume(commit["name"])
            if resumed is None or resumed.number != commit["number"]:
                raise CommitError(
                    f"{folder} belongs to commit {commit['number']}, and the run has a later one in its place; train "
                    "on from a newer checkpoint, or without resume_from_checkpoint in a new ssd.paths"
                )
            self._last_name = commit["name"]

    def on_save(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:
        """Commit, and note in the checkpoint's folder which commit it is."""
        engine = _engine_of(optimizer)
        folder = _folder(args, state.global_step)
        taken = {*_names_in(Path(args.output_dir), but=folder), self._last_name}
        name = next(name for number in itertools.count(1) if (name := f"trainer {number}") not in taken)
        content = {"run": engine.run_id, "name": name, "number": engine.save(name)}
        self._last_name = name
        if args.save_only_model:  # otherwise the Trainer has saved them
            _save_random_states(folder / RANDOM_FILE)
        path = folder / COMMIT_FILE
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(content), encoding="utf-8")
        os.replace(draft, path)


def _save_random_states(path: Path) -> None:
    """What `transformers.Trainer` saves of random generators, where it saves more than the model."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state()
    torch.save(states, path)


@contextmanager
def _random_generators_kept() -> Iterator[None]:
    """Leave the global random generators of the CPU as they are, whatever is done to them inside."""
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.random.set_rng_state(of_torch)


def _engine_of(optimizer: Any) -> Engine:
    own = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not isinstance(own, PagedOptimizer):
        raise ValueError(
            f"the Trainer's optimizer is a {type(own).__name__}; give it the one of offload.prepare: "
            "Trainer(model=model, optimizers=(optimizer, None), ...)"
        )
    engine: Engine = own.engine  # type: ignore[attr-defined]
    return engine


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _commit_of(folder: Path, run_id: str) -> dict[str, Any]:
    path = folder / COMMIT_FILE
    commit = _content_of(path)
    if commit["run"] != run_id:
        raise CommitError(f"{path} names a commit of run {commit['run']}, and ssd.paths has run {run_id}")
    return commit


def _names_in(output: Path, *, but: Path) -> Iterator[str]:
    """Names of the commits of all checkpoints but one."""
    for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMMIT_FILE}"):
        try:
            if path.parent != but:
                yield _content_of(path)["name"]
        except CommitError:
            continue  # nothing goes on from such a checkpoint, so its commit is not needed


def _content_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"run": str(found["run"]), "name": str(found["name"]), "number": int(found["number"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommitError(
            f"{path} cannot be read ({error}), so the optimizer's states of that checkpoint are not known; was it "
            "saved with OffloadCallback?"
        ) from error
