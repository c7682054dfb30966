"""Runs that have ended and left commits, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw
from small_runs import batches, config
from torch import Tensor, nn

import offload
from offload.cli import main
from pagemem.durable.commit_folder import CommitFolder
from pagemem.durable.manifest import Manifest, StoredTensor


@dataclass(frozen=True)
class FinishedRun:
    """Where it lies, and ``model.state_dict()`` at its newest commit."""

    folder: Path
    weights: dict[str, Tensor]

    @property
    def newest(self) -> Manifest:
        """Its newest commit."""
        folder = CommitFolder(self.folder)
        return folder.read(folder.numbers()[-1])

    def damage(self, stored: StoredTensor, *, extent: int = 0) -> int:
        """Change one byte of a tensor's extent; returns the frame."""
        place = stored.placement().extents(self.newest.page_bytes)[extent]
        with open(self.folder / "pages.bin", "r+b") as file:
            file.seek(place.frame * self.newest.page_bytes + place.offset_bytes + 17)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        return place.frame

    def tensor(self, tag: str) -> StoredTensor:
        """The newest commit's first tensor of a kind: "parameter", "moment", "master"."""
        return next(stored for stored in self.newest.tensors if stored.tag == tag)

    def content(self) -> dict[str, tuple[bytes, int]]:
        """Bytes and time of change of every file in it."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def settings(folder: Path, *, dtype: str = "fp32", paths: Sequence[Path] = (), **ssd: Any) -> dict[str, Any]:
    """A configuration with commits in ``folder / "pages"``, or in ``paths``."""
    made = config(folder)
    made["model"] = {"factory": "some:model", "dtype": dtype}
    made["ssd"] |= {"paths": [str(path) for path in paths] or made["ssd"]["paths"], **ssd}
    return made


def finished(
    model: nn.Module,
    settings: dict[str, Any],
    data: Sequence[tuple[Tensor, Tensor]] | None = None,
    *,
    names: Sequence[str | None] = (None,),
) -> FinishedRun:
    """Train, with a commit after every step: one for each name."""
    with offload.initialize(model, settings, adamw) as engine:
        for name, batch in zip(names, batches(len(names)) if data is None else data, strict=True):
            engine.backward(engine(*batch))
            engine.step()
            engine.save(name)
        weights = {key: value.clone() for key, value in model.state_dict().items()}
    return FinishedRun(Path(settings["ssd"]["paths"][0]), weights)


class Tied(nn.Module):
    """Weights and a buffer that have two names each, a buffer that is not kept, and a parameter of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 96)
        self.norm = nn.BatchNorm1d(96)
        self.again = self.norm
        self.head = nn.Linear(96, 64, bias=False)
        self.head.weight = self.embed.weight
        self.codes = nn.Parameter(torch.arange(6).view(2, 3), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            self.head(self.again(self.norm(self.embed(x % 64).flatten(0, 1)))), y.flatten() % 64
        )


def refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr and exit code 1."""
    assert main(["export", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("offload: error: ") and error.count("\n") == 1, error
