"""Runs that commit, stop and go on: a model, its training loop with everything that a moment consists of, and its
state."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cross_references import check_mover
from parity import Factory, adamw, schedule
from tiny_models import CASES, Case
from torch import Tensor, nn

import offload

KIB, MIB = 1 << 10, 1 << 20


class Random(nn.Module):
    """An MLP that draws from all three global generators in each forward, with buffers and a parameter that is not
    paged."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, width), nn.BatchNorm1d(width)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.last = nn.Linear(width, 10)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.seen: Tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross entropy."""
        self.seen += 1
        hidden = F.gelu(self.norm(self.first(x.to(self.first.bias.dtype)))) * (
            1 + 0.01 * random.random() + 0.01 * float(np.random.rand())
        )
        for layer in self.middle:
            hidden = F.gelu(layer(F.dropout(hidden, 0.3)))
        return F.cross_entropy(self.last(F.dropout(hidden, 0.3)), y)


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum, one group."""
    return torch.optim.SGD(list(parameters), lr=1e-2, momentum=0.9, weight_decay=0.01, fused=True)


@dataclass(frozen=True)
class Setup:
    """What is trained and how."""

    case: Case
    ram: int
    update: dict[str, Any] = field(default_factory=dict)
    factory: Factory = adamw
    micro_batches: int = 1
    more: dict[str, Any] = field(default_factory=dict)

    def config(self, folder: Path, **commit: Any) -> dict[str, Any]:
        """The engine's configuration."""
        ssd = {"paths": [str(folder / "pages")], "threads": 2}
        return {
            "memory": {"ram": self.ram, "page": "64KiB"},
            "ssd": ssd,
            "update": self.update,
            "commit": commit,
            **self.more,
        }


RANDOM = Case(Random, "vectors")
SMALL = Setup(RANDOM, 640 * KIB)
LOCK_FREE = {"mode": "lock-free", "max_staleness": 0, "exact_steps": 0}
SETUPS: dict[str, Setup] = {
    "random": SMALL,
    "random, all in RAM": Setup(RANDOM, 16 * MIB),
    "random, clipped, micro-batches": Setup(RANDOM, 640 * KIB, {"clip_norm": 0.5}, micro_batches=2),
    "random, momentum": Setup(RANDOM, 640 * KIB, factory=momentum),
    "gpt": Setup(CASES["gpt"], 3 * MIB // 2),
    "gpt, tied, least RAM": Setup(CASES["tied"], 1 * MIB),
    "gpt, bf16": Setup(CASES["gpt"], 2 * MIB, more={"model": {"factory": "none:none", "dtype": "bf16"}}),
    "gpt, fp16, clipped": Setup(
        CASES["gpt"], 2 * MIB, {"clip_norm": 1.0}, more={"model": {"factory": "none:none", "dtype": "fp16"}}
    ),
    "conv, momentum": Setup(CASES["conv"], 1 * MIB, factory=momentum),
    "partly trained": Setup(CASES["partly_trained"], 640 * KIB),
    "random, lock-free": Setup(RANDOM, 4 * MIB, LOCK_FREE),
    "gpt, lock-free, clipped": Setup(CASES["gpt"], 6 * MIB, {**LOCK_FREE, "clip_norm": 0.5}),
    "gpt, lock-free, bf16": Setup(
        CASES["gpt"], 8 * MIB, LOCK_FREE, more={"model": {"factory": "none:none", "dtype": "bf16"}}
    ),
}


class Run:
    """One process's part of a run; a context manager that closes the engine.

    Args:
        seed: of the weights, and of all generators; what goes on from a commit must not depend on it.
    """

    def __init__(self, setup: Setup, folder: Path, *, seed: int = 7, **commit: Any) -> None:
        self.setup = setup
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        model, self.optimizer = offload.prepare(setup.case.build(), setup.factory, setup.config(folder, **commit))
        self.model = model
        self.engine: offload.Engine = self.optimizer.engine
        self.schedule = schedule(self.optimizer)
        self.engine.track("schedule", self.schedule)
        self.losses: dict[int, Tensor] = {}

    def step(self) -> None:
        """One optimizer step, on the batches of its number; commits when that is due."""
        number = self.engine.steps
        for micro in range(self.setup.micro_batches):
            batch = self.setup.case.batch(torch.Generator().manual_seed(1000 * number + micro))
            loss = self.model(*batch)
            self.engine.scaled(loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses[self.engine.steps] = loss.detach().clone()
        self.engine.save_if_due()

    def train(self, until: int) -> None:
        """Steps up to this number."""
        while self.engine.steps < until:
            self.step()

    def state(self) -> dict[str, Any]:
        """All that training has changed, as plain copies."""
        optimizer = self.optimizer.state_dict()
        return {
            "model": {name: value.clone() for name, value in self.model.state_dict().items()},
            "states": optimizer["state"],
            "groups": optimizer["param_groups"],
            "schedule": self.schedule.state_dict(),
            "torch": torch.get_rng_state(),
            "numpy": np.random.rand(4).tolist(),
            "python": random.random(),
        }

    def used_frames(self) -> int:
        """Page-file frames in use."""
        return self.engine.debug.mover.ssd.used_frames

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.engine.drain()
            check_mover(self.engine.debug.mover)
        self.engine.close()


def uninterrupted(setup: Setup, folder: Path, steps: int) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Losses and final state of a run that never commits nor stops."""
    with Run(setup, folder / "uninterrupted") as run:
        run.train(steps)
        return run.losses, run.state()


def assert_same(found: Any, expected: Any, what: str = "state") -> None:
    """Equal bit for bit."""
    if isinstance(expected, Tensor):
        same = found.dtype == expected.dtype and found.shape == expected.shape
        assert same and torch.equal(found, expected), f"{what} differs"
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for key, value in expected.items():
            assert_same(found[key], value, f"{what}: {key}")
    else:
        assert found == expected, f"{what} is {found!r}, not {expected!r}"


def committed(folder: Path, setup: Setup = SMALL, steps: tuple[int, ...] = (1, 2)) -> dict[int, dict[str, Any]]:
    """A run with a commit after each of these steps; returns the state after each."""
    states = {}
    with Run(setup, folder, keep=5) as run:
        for step in range(1, max(steps) + 1):
            run.step()
            if step in steps:
                run.engine.save()
                states[step] = without_draws(run)
    return states


def without_draws(run: Run) -> dict[str, Any]:
    """The state, without numbers drawn from the generators."""
    return {key: value for key, value in run.state().items() if key not in ("numpy", "python", "torch")}
