"""A chain of layers in training in lock-free mode, with gates, and its comparison with a replay."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lockfree_replay import History, Replay, assert_replayed
from parity import adamw
from small_runs import assert_closed, config
from torch import Tensor, nn
from updater_gates import UpdaterGates

import offload

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scale:
    """A chain and a budget for it."""

    width: int
    depth: int
    ram: int


#: Each layer is a unit of two slices, and all of them stay in memory.
RESIDENT = Scale(224, 3, (4 << 20) - (64 << 10))
#: Each layer is a unit of one slice; parameters come and go, and states pass through three slices' room.
STREAMING = Scale(128, 12, 2_500_000)


class Chain(nn.Module):
    """Layers, one after another."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x - y).pow(2).mean()


class Run:
    """The chain in training, its gates, and what it did."""

    def __init__(self, folder: Path, max_staleness: int, scale: Scale, **update: Any) -> None:
        torch.manual_seed(7)
        self.plain = Chain(scale.width, scale.depth)
        self.width = scale.width
        update = {"exact_steps": 0, "on_time": "never", **update}
        settings = config(folder, ram=scale.ram, mode="lock-free", max_staleness=max_staleness, **update)
        self.model, self.optimizer = offload.prepare(copy.deepcopy(self.plain), adamw, settings)
        self.engine: offload.Engine = self.optimizer.engine  # type: ignore[attr-defined]
        self.gates = UpdaterGates(self.engine)
        self.history = History(self.gates, max_staleness, self.model)
        self.steps: list[list[Batch]] = []
        self.losses: list[Tensor] = []
        self.boxes = {box.unit.name: box for box in self.gates.updater._channels.values()}
        self.units = list(self.boxes)
        self._generator = torch.Generator().manual_seed(11)
        assert len(self.units) == scale.depth

    @property
    def resident(self) -> bool:
        """Whether all parameters stay in memory."""
        return all(box.unit.parameters.resident for box in self.boxes.values())

    def batch(self) -> Batch:
        """The next batch, which is remembered as a step of its own."""
        shape = (4, self.width)
        self.steps.append(
            [(torch.randn(shape, generator=self._generator), torch.randn(shape, generator=self._generator))]
        )
        return self.steps[-1][0]

    def step(self, count: int = 1) -> None:
        """Whole steps."""
        for _ in range(count):
            loss = self.model(*self.batch())
            loss.backward()
            self.losses.append(loss.detach())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def warm_up(self) -> None:
        """Two steps, so that gradients are foretold, all of them applied and adopted."""
        self.step(2)
        self.engine.drain()
        self.rest()
        self.gates.waits.clear()

    def rest(self) -> None:
        """Have the updater done with what was published last: waiters are told before it comes to that gate."""
        with self.gates.thread.paused():
            pass

    def clock(self, unit: str) -> tuple[int, int, int]:
        """Produced, applied, adopted."""
        clock = self.boxes[unit].clock
        return clock.produced, clock.applied, clock.adopted

    def catch(self, point: str, unit: str) -> None:
        """Have the updater stand at ``point`` of ``unit`` with the gradient of one more step."""
        self.gates.hold(point, unit)
        self.step()
        self.gates.await_standing(point, unit)

    def assert_replayed(self, clip_norm: float | None = None) -> None:
        """Every bit follows from the history, and nothing is on its way any more."""
        self.gates.open()
        self.engine.drain()
        self.rest()
        replay = Replay(self.plain, adamw, self.history, constant_lr=True, clip_norm=clip_norm)
        losses = replay.run(self.steps)
        assert all(torch.equal(mine, its) for mine, its in zip(self.losses, losses, strict=True))
        assert_replayed(replay, self.model, self.optimizer)
        assert all(produced == applied == adopted for produced, applied, adopted in map(self.clock, self.units))
        assert self.gates.updater.direct_bytes == 0


@contextmanager
def running(folder: Path, max_staleness: int, scale: Scale = RESIDENT, **update: Any) -> Iterator[Run]:
    """A run that is closed at the end."""
    run = Run(folder, max_staleness, scale, **update)
    try:
        yield run
    finally:
        run.gates.open()
        assert_closed(run.engine)
