"""What a forked child may not do with its parent's engine, and what the parent goes on doing meanwhile."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw
from small_runs import assert_equal, batches, built, config, engine_of, train, train_plain
from torch.utils.data import DataLoader, Dataset

import offload
from pagemem.errors import RunDirectoryError

REFUSED = (
    "this process was forked from the one that trains, which alone can use its engine; give the child "
    "model.state_dict(), or start it"
)
pytestmark = pytest.mark.timeout(120)


def in_child(folder: Path, call: Callable[[], Any]) -> str:
    """What ``call`` raises in a forked child, or prints as its value."""
    said = folder / "said"
    pid = os.fork()
    if pid == 0:
        try:
            try:
                text = f"returned {call()}"
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            said.write_text(text)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return said.read_text()


def test_every_use_is_refused_at_once(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        train(engine, 3)
        batch = batches(1)[0]
        loss = engine(*batch)
        uses: dict[str, Callable[[], Any]] = {
            "forward": lambda: engine.model(*batch),
            "backward": loss.backward,
            "engine backward": lambda: engine.backward(loss),
            "state_dict": engine.model.state_dict,
            "optimizer step": engine.optimizer.step,
            "optimizer state": engine.optimizer.state_dict,
            "zero_grad": engine.optimizer.zero_grad,
            "engine step": engine.step,
            "save": engine.save,
            "resume": engine.resume,
            "drain": engine.drain,
            "export": lambda: engine.export(tmp_path / "exported"),
            "stats": engine.stats,
            "memory report": engine.memory_report,
            "gathered": lambda: offload.gathered(engine.model).__enter__(),
            "edit": lambda: next(engine.model.parameters()).data.zero_(),
        }
        for what, use in uses.items():
            said = in_child(tmp_path, use)
            assert said.startswith("RuntimeError: ") and REFUSED in said and "\n" not in said, (what, said)
        engine.backward(loss)
        engine.step()


def test_a_child_that_unwinds_changes_nothing_and_the_parent_goes_on(tmp_path: Path) -> None:
    plain = built()
    train_plain(plain, adamw(plain.parameters()), 4)
    model = built()
    pages = tmp_path / "pages"
    with engine_of(model, tmp_path) as engine:
        train(engine, 2)
        engine.save()
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        pid = os.fork()
        if pid == 0:
            try:
                with engine:
                    raise ValueError("the child fails")
            except ValueError:
                engine.close()
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
        assert (pages / "pagemem.lock").exists()
        with pytest.raises(RunDirectoryError, match="is in use by process"):
            offload.initialize(built(), config(tmp_path), adamw)
        for batch in batches(4)[2:]:
            engine.backward(engine(*batch))
            engine.step()
        engine.save()
        assert_equal(model, plain)
    assert not (pages / "pagemem.lock").exists()


def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    (ready, wait), (hold, let_go) = os.pipe(), os.pipe()
    program = f"""
import os, sys
sys.path[:0] = {sys.path!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from small_runs import built, engine_of, train
engine = engine_of(built(), Path({str(tmp_path)!r}))
train(engine, 2)
if os.fork() == 0:
    os.write({wait}, b"!")
    os.close({wait})
    os.read({hold}, 1)
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", program],
        {**os.environ},
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (wait, hold)],
    )
    os.close(wait)
    os.close(hold)
    assert os.read(ready, 1) == b"!"
    os.close(ready)
    os.waitpid(pid, 0)
    engine_of(built(), tmp_path).close()
    os.close(let_go)


class Numbers(Dataset[torch.Tensor]):
    """A data set that holds the model, as careless ones do."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def test_workers_that_merely_inherit_an_engine_work(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        train(engine, 2)
        loader = DataLoader(Numbers(engine.model), batch_size=2, num_workers=2, multiprocessing_context="fork")
        for found in (list(loader), list(loader)):
            assert torch.cat(found).tolist() == list(range(8))
            train(engine, 1)
        engine.save()


def test_a_child_of_a_model_that_is_being_built_cannot_go_on(tmp_path: Path) -> None:
    with offload.deferred_init(config(tmp_path)) as store:
        model = built()
        said = in_child(tmp_path, lambda: model.state_dict())
        assert said.startswith("RuntimeError: ") and REFUSED in said
        assert REFUSED in in_child(tmp_path, built)
    store.close()
