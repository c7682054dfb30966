"""What tests of the public interface start from: a small GPT, a budget of a fifth of its states, and what must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cross_references import check_mover
from parity import adamw
from tiny_models import CASES, GPT
from torch import Tensor, nn

import offload

PAGE_BYTES = 64 << 10
RAM_BYTES = 1 << 20


def config(folder: Path, *, ram: int = RAM_BYTES, **update: Any) -> dict[str, Any]:
    """A budget that keeps most of the model on the disk, unless ``ram`` says otherwise."""
    return {
        "memory": {"ram": ram, "page": PAGE_BYTES},
        "ssd": {"paths": [str(folder / "pages")], "threads": 2},
        "update": update,
    }


def built(**arguments: Any) -> GPT:
    """The model, always with the same weights."""
    torch.manual_seed(7)
    return GPT(**arguments)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Always the same batches."""
    generator = torch.Generator().manual_seed(11)
    return [CASES["gpt"].batch(generator) for _ in range(count)]


def engine_of(model: nn.Module, folder: Path, **update: Any) -> offload.Engine:
    """An engine with torch's AdamW in two groups."""
    return offload.initialize(model, config(folder, **update), adamw)


def train(engine: offload.Engine, steps: int) -> None:
    """A few whole steps."""
    for batch in batches(steps):
        engine.backward(engine(*batch))
        engine.step()


def train_plain(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The same steps in plain PyTorch."""
    for batch in batches(steps):
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(model: nn.Module, plain: nn.Module) -> None:
    """All values equal, bit for bit."""
    ours, expected = model.state_dict(), plain.state_dict()
    assert list(ours) == list(expected)
    for name, value in expected.items():
        assert torch.equal(value, ours[name]), name


def assert_untouched(model: nn.Module) -> None:
    """The model is the plain one that was built, parameter by parameter."""
    for (name, mine), expected in zip(model.named_parameters(), built().parameters(), strict=True):
        assert type(mine) is nn.Parameter and torch.equal(mine, expected), name


def assert_closed(engine: offload.Engine) -> None:
    """Closing works, twice, and gives every byte back; threads and descriptors are looked at after each test."""
    check_mover(engine.debug.mover)
    engine.close()
    engine.close()
    engine.debug.store.budget.close()
    assert engine.debug.store.budget.used_bytes == 0
    for path in engine.config.ssd.paths:
        assert not (Path(path) / "pagemem.lock").exists()
