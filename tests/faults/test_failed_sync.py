"""A sync of the page files that fails: whatever is called committed later is on the disk, and what is not is said."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from committed_runs import Run, Setup, assert_same
from losing_disk import LosingDisk
from pairwise import full_product
from tiny_models import Case
from torch import Tensor, nn

import offload

#: A third of the states.
RAM = 640 << 10


class Partly(nn.Module):
    """Layers of a page each, two of them frozen: those are read in each step, and never changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(6))
        for layer in self.layers[1:3]:
            layer.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross entropy."""
        x = self.first(x)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return F.cross_entropy(x, y)


@pytest.fixture(autouse=True, scope="module")
def one_compute_thread() -> Iterator[None]:
    """Threads cost models this small more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, ram: int, seed: int = 7, **ssd: Any) -> Run:
    """A run of the small model; its page files are in ``folder``."""
    setup = Setup(Case(Partly, "vectors"), ram, more={"ssd": {"paths": [str(folder / "pages")], "threads": 1, **ssd}})
    return Run(setup, folder, seed=seed, keep=1)


def state(run: Run) -> dict[str, Any]:
    """What is compared."""
    return {key: value for key, value in run.state().items() if key not in ("numpy", "python", "torch")}


@full_product(
    failing=[0, 1, 2],
    ram={"paged": RAM, "all in RAM": 16 << 20},
    ssd={"probed": {}, "page cache": {"direct": False}, "no checksums": {"checksums": False}},
    more=[0, 1, 3],
)
def test_what_is_called_committed_is_on_the_disk(
    failing: int, ram: int, ssd: dict[str, Any], more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power goes ``more`` steps after the one whose sync failed."""
    durable, states, errors = 0, {}, []
    with monkeypatch.context() as patch:
        disk = LosingDisk(patch, tmp_path / "pages" / "pages.bin", failing)
        trained = run(tmp_path, ram, **ssd)
        try:
            for step in range(1, failing + 2 + more):
                trained.step()
                states[step] = state(trained)
                for _ in range(2):  # a caller that tries again at once
                    try:
                        trained.engine.save()
                        durable = step
                        break
                    except offload.StorageError as error:
                        errors.append(str(error))
        except offload.StorageError as error:
            assert not ssd.get(
                "checksums", True
            ) and "without ssd.checksums nothing tells whether the disk has it" in str(error)
            errors.append(str(error))
        finally:
            trained.engine.close()
        disk.lose_power()
    assert errors[0] == f"syncing {tmp_path}/pages/pages.bin: {os.strerror(errno.EIO)}"
    assert all(
        "cannot be committed: written before a sync of the page files failed" in error
        for error in errors[1:]
        if "checksums" not in error
    )
    if ram > 1 << 20 or (ssd.get("checksums", True) and more > 1):
        assert durable == failing + 1 + more, errors
    with run(tmp_path, ram, seed=8, **ssd) as resumed:
        found = resumed.engine.resume(allow_older=True)
        assert (0 if found is None else found.step) == durable
        if durable:
            assert_same(state(resumed), states[durable])


def test_nothing_is_retired_by_a_commit_whose_sync_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run(tmp_path, RAM) as trained:
        trained.step()
        trained.engine.save()
        names = sorted(os.listdir(tmp_path / "pages" / "commits"))
        trained.step()
        used = trained.used_frames()
        with monkeypatch.context() as patch:
            LosingDisk(patch, tmp_path / "pages" / "pages.bin", 0)
            with pytest.raises(offload.StorageError, match="syncing"):
                trained.engine.save()
        assert sorted(os.listdir(tmp_path / "pages" / "commits")) == names
        assert trained.used_frames() >= used
        trained.step()
        trained.engine.save()
        assert sorted(os.listdir(tmp_path / "pages" / "commits")) == ["commit-00000003.json"]


def test_frames_that_a_failed_sync_lost_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run(tmp_path, RAM) as trained:
        mover = trained.engine.debug.mover
        trained.step()
        with monkeypatch.context() as patch:
            LosingDisk(patch, tmp_path / "pages" / "pages.bin", 0)
            with pytest.raises(offload.StorageError, match="syncing"):
                trained.engine.save()
        lost = {
            run.first + at
            for t in mover.tensors.values()
            if t.copy and t.copy.lost
            for run in t.copy.placement.runs
            for at in range(run.n_frames)
        }
        assert lost
        for _ in range(3):
            trained.step()
            trained.engine.save()
            manifest = trained.engine.debug.committer.commits[max(trained.engine.debug.committer.commits)].manifest
            named = {
                first + at for stored in manifest.tensors for first, n_frames in stored.runs for at in range(n_frames)
            }
            assert named and not named & lost
