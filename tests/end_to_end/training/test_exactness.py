"""The engine's results are plain PyTorch's, bit for bit, whatever is in RAM and whatever is on SSD."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from pairwise import every_third, full_product
from parity import Parity, smallest_ram, state_bytes
from tiny_models import CASES
from torch import nn

import offload

RESIDENCIES = ("all_in_ram", "half_on_ssd", "smallest_budget")


def budget(residency: str, parity: Parity) -> int:
    """Bytes of RAM for a residency."""
    states = state_bytes(parity.case)
    if residency == "all_in_ram":
        return 3 * states + (4 << 20)
    return states // 2 if residency == "half_on_ssd" else smallest_ram(dataclasses.replace(parity, steps=2))


@full_product(name=tuple(CASES), residency=RESIDENCIES, clip_norm=[None, 0.5], accumulation=[1, 3])
def test_every_step_equals_plain_torch(
    name: str, residency: str, clip_norm: float | None, accumulation: int, tmp_path: Path
) -> None:
    parity = Parity(CASES[name], tmp_path, 0, clip_norm, accumulation)
    parity.ram = budget(residency, parity)
    stats = parity.run()
    assert stats.steps == parity.steps
    if residency != "all_in_ram":
        assert stats.bytes_read > 0 and stats.bytes_written > 0


@every_third(2, name=tuple(CASES), residency=RESIDENCIES, clip_norm=[None, 0.5])
def test_planned_steps_equal_plain_torch(name: str, residency: str, clip_norm: float | None, tmp_path: Path) -> None:
    parity = Parity(CASES[name], tmp_path, 0, clip_norm, each_step=False, steps=9)
    parity.ram = budget(residency, parity)
    stats = parity.run()
    assert stats.deviations == 0
    assert stats.planned_steps >= parity.steps - 2


@pytest.mark.parametrize("start", ["auto", "step"])
def test_update_start_does_not_change_results(start: str, tmp_path: Path) -> None:
    Parity(CASES["gpt"], tmp_path, 1 << 20, extra={"start": start}).run()


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(parameters), lr=1e-2, weight_decay=0.01, fused=True)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True)


def sgd_bare(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters), lr=1e-2, fused=True)


@pytest.mark.parametrize("factory", [adam, sgd, sgd_bare])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_other_optimizers(factory: object, clip_norm: float | None, tmp_path: Path) -> None:
    Parity(CASES["gpt"], tmp_path, 1 << 20, clip_norm, factory=factory).run()  # type: ignore[arg-type]


def test_smallest_budget_is_the_smallest(tmp_path: Path) -> None:
    parity = Parity(CASES["gpt"], tmp_path, 64 << 10)
    with pytest.raises(offload.BudgetError, match=r"blocks\.0\.up.*memory\.ram to at least") as caught:
        parity.run()
    parity.ram = caught.value.smallest_bytes
    parity.run()
    parity.ram -= 64 << 10
    with pytest.raises(offload.BudgetError):
        parity.run()


def test_a_step_that_changes_is_followed_and_traced_anew(tmp_path: Path) -> None:
    class Sometimes(nn.Module):
        """Skips a layer on odd batches."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
            self.out = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            skip = int(y[0]) % 3 == 0
            for number, layer in enumerate(self.layers):
                if not (skip and number % 2):
                    x = torch.tanh(layer(x))
            return nn.functional.cross_entropy(self.out(x), y)

    case = dataclasses.replace(CASES["borrower"], build=Sometimes)
    stats = Parity(case, tmp_path, 320 << 10, steps=14, each_step=False, extra={"start": "step"}).run()
    assert stats.deviations > 0
    assert stats.planned_steps > 0


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_bf16_keeps_an_fp32_master(clip_norm: float | None, tmp_path: Path) -> None:
    torch.manual_seed(7)
    case = CASES["gpt"]
    plain = case.build()
    masters = [nn.Parameter(p.detach().clone()) for p in plain.parameters()]
    config = {
        "memory": {"ram": "2MiB", "page": "64KiB"},
        "ssd": {"paths": [str(tmp_path / "pages")]},
        "update": {"clip_norm": clip_norm},
        "model": {"factory": "unused:unused", "dtype": "bf16"},
    }
    torch.manual_seed(7)
    model, optimizer = offload.prepare(case.build(), lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True), config)
    plain = plain.bfloat16()
    plain_optimizer = torch.optim.AdamW(masters, lr=1e-2, fused=True)
    generator = torch.Generator().manual_seed(11)
    for step in range(5):
        batch = case.batch(generator)
        losses = [m(*batch) for m in (plain, model)]
        assert torch.equal(*losses), f"step {step}"
        for loss in losses:
            loss.backward()
        for master, parameter in zip(masters, plain.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(masters, clip_norm)
        plain_optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, plain.parameters(), strict=True):
                parameter.copy_(master)
    ours = model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in plain.state_dict().items())
    expected, found = plain_optimizer.state_dict()["state"], optimizer.state_dict()["state"]
    assert all(torch.equal(v, found[n][k]) for n, state in expected.items() for k, v in state.items())
    optimizer.engine.close()
