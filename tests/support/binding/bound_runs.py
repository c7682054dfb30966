"""Runs in pages that are bound between uses after a few steps, beside the same ones in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from scheduler.planning import durations

STEPS = 12
#: The step before which a test does something: every unit is bound by then.
AT = 8


class Model(nn.Module):
    """Layers of which autograd saves views of weights, weights themselves, and none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(16, 24)
        self.up, self.norm, self.down = nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 16)
        self.recomputes = False

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.table(x)
        hidden = checkpoint(self.inner, hidden, use_reentrant=False) if self.recomputes else self.inner(hidden)
        made: Tensor = self.down(hidden)
        return made


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=1e-2, fused=True)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters), lr=1e-2, momentum=0.9, fused=True)


ENGINES: list[Any] = []


@pytest.fixture
def bound_early(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Units are bound from the fifth step on; engines are closed in the end."""
    monkeypatch.setattr(durations, "MEASURED_STEPS", 1)
    yield
    while ENGINES:
        ENGINES.pop().close()


class Run:
    """A model and what trains it: in pages with ``folder``, else as plain PyTorch does."""

    def __init__(
        self, folder: Path | None, optimizer: Any = adamw, model: nn.Module | None = None, **more: Any
    ) -> None:
        self.model: Any = model or Model()
        self.engine: Any = None
        self.clip_norm: float | None = None
        if folder is None:
            self.optimizer = optimizer(self.model.parameters())
        else:
            config = {"memory": {"ram": "1MiB", "page": "64KiB"}, "ssd": {"paths": [str(folder / "pages")]}, **more}
            self.model, self.optimizer = offload.prepare(self.model, optimizer, config)
            self.engine = self.optimizer.engine  # type: ignore[attr-defined]
            ENGINES.append(self.engine)

    def loss(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        x, y = (torch.randint(16, (6,), generator=generator) for _ in range(2))
        return nn.functional.cross_entropy(self.model(x), y)

    def step(self, number: int) -> float:
        loss = self.loss(number)
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def train(self, begin: int = 0, end: int = STEPS) -> list[float]:
        return [self.step(number) for number in range(begin, end)]

    @property
    def is_bound(self) -> bool:
        return all(unit.bound is not None and unit.bound.is_bare for unit in self.engine.debug.units)

    def values(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


def assert_alike(ours: Run, plain: Run) -> None:
    found, expected = ours.values(), plain.values()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ours.close()
