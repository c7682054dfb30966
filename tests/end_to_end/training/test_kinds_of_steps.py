"""Steps of several kinds, evaluation in between, and experts chosen at run time follow plans, to plain bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import adamw, compare
from torch import Tensor, nn

import offload

WIDTH = 64


def settings(folder: Path, ram: int, **update: Any) -> dict[str, Any]:
    return {
        "memory": {"ram": ram, "page": "64KiB"},
        "ssd": {"paths": [str(folder / "pages")], "threads": 2},
        "update": update,
    }


class Adversaries(nn.Module):
    """A generator and a discriminator; a step trains one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))
        self.discriminator = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)), nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        if real is None:
            return F.softplus(-self.discriminator(torch.tanh(self.generator(x)))).mean()
        with torch.no_grad():
            made = torch.tanh(self.generator(x))
        found = self.discriminator(made), self.discriminator(real)
        return F.softplus(found[0]).mean() + F.softplus(-found[1]).mean()


@pytest.mark.parametrize("evaluates", [False, True])
def test_two_kinds_of_steps_that_alternate_are_planned_and_bit_equal(evaluates: bool, tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain = Adversaries()
    generator = torch.Generator().manual_seed(11)
    model, optimizer = offload.prepare(copy.deepcopy(plain), adamw, settings(tmp_path, 640 << 10))
    with optimizer.engine as engine:
        plain_optimizer = adamw(plain.parameters())
        for step in range(16):
            x = torch.randn(4, WIDTH, generator=generator)
            real = torch.randn(4, WIDTH, generator=generator) if step % 2 else None
            for one, its_optimizer in ((plain, plain_optimizer), (model, optimizer)):
                one(x, real).backward()
                its_optimizer.step()
                its_optimizer.zero_grad()
            if evaluates and step % 5 == 4:
                for one in (plain, model):
                    one.eval()
                with torch.no_grad():
                    assert torch.equal(plain(x, None), model(x, None))
                for one in (plain, model):
                    one.train()
            if step == 3:
                before = engine.stats()
        since = engine.stats().since(before)
        compare(plain, plain_optimizer, model, optimizer, "in the end")
        assert since.planned_steps == since.steps == 12 and since.deviations == 0
        assert since.on_demand_bytes <= 0.05 * since.bytes_read


class Experts(nn.Module):
    """Blocks in which every row goes to one expert of eight, chosen by its own numbers."""

    def __init__(self, announces: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8)) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(3))
        self.head = nn.Linear(WIDTH, 10)
        self.announces = announces

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for gate, experts in zip(self.gates, self.blocks, strict=True):
            assert isinstance(experts, nn.ModuleList)
            weights = gate(x).softmax(-1)
            chosen = weights.argmax(-1)
            used = chosen.unique().tolist()
            if self.announces:
                offload.announce([experts[expert] for expert in used])
            out = torch.zeros_like(x)
            for expert in used:
                rows = (chosen == expert).nonzero().squeeze(-1)
                out = out.index_add(0, rows, torch.tanh(experts[expert](x[rows])) * weights[rows, expert : expert + 1])
            x = x + out
        return F.cross_entropy(self.head(x), y)


@pytest.mark.parametrize("announces", [False, True])
@pytest.mark.parametrize("start", ["auto", "step"])
def test_experts_that_differ_from_step_to_step_are_bit_equal_and_mostly_planned(
    announces: bool, start: str, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    plain = Experts(announces)
    generator = torch.Generator().manual_seed(11)
    model, optimizer = offload.prepare(copy.deepcopy(plain), adamw, settings(tmp_path, 1 << 20, start=start))
    with optimizer.engine as engine:
        plain_optimizer = adamw(plain.parameters())
        for _ in range(20):
            x, y = torch.randn(6, WIDTH, generator=generator), torch.randint(0, 10, (6,), generator=generator)
            for one, its_optimizer in ((plain, plain_optimizer), (model, optimizer)):
                one(x, y).backward()
                its_optimizer.step()
                its_optimizer.zero_grad()
        stats = engine.stats()
        compare(plain, plain_optimizer, model, optimizer, "in the end")
        assert stats.planned_steps >= stats.steps - 2, "the ops that are as before follow the plan"
        assert stats.deviations > 0, "but not all are"


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def inferred(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x).clone()


@pytest.mark.parametrize("passes", [evaluated, inferred])
def test_evaluation_streams_ahead_of_compute(passes: Callable[[nn.Module, Tensor], Tensor], tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain = nn.Sequential(*(nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(20))).eval()
    frozen, optimizer = offload.prepare(copy.deepcopy(plain), adamw, settings(tmp_path, 768 << 10))
    with optimizer.engine as engine:
        frozen.eval()
        for turn in range(6):
            x = torch.randn(4, 2 * WIDTH)
            assert torch.equal(passes(plain, x), passes(frozen, x)), turn
            if turn == 1:
                before = engine.stats()
        since = engine.stats().since(before)
        assert since.planned_passes == 4 and since.on_demand_bytes == 0 < since.bytes_read
