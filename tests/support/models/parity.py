"""Trains a model by plain PyTorch and by the engine side by side and compares every bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cross_references import check_mover
from tiny_models import Case
from torch import Tensor, nn

import offload

STEPS = 6
Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Fused AdamW with a group that decays and one that does not."""
    every = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in every if p.ndim > 1]},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A learning rate that changes every step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.3 * step))


@dataclass
class Parity:
    """One comparison: a case, a budget and an update mode."""

    case: Case
    folder: Path
    ram: int
    clip_norm: float | None = None
    accumulation: int = 1
    factory: Factory = adamw
    each_step: bool = True
    steps: int = STEPS
    extra: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    ssd: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The engine's configuration."""
        update = {"clip_norm": self.clip_norm, **self.extra}
        return {
            "device": "cpu-emulated" if "device" in self.memory else "cpu",
            "memory": {"ram": self.ram, "page": "64KiB", **self.memory},
            "ssd": {"paths": [str(self.folder / "pages")], "threads": 2, **self.ssd},
            "update": update,
        }

    def run(self) -> offload.Stats:
        """Train both; returns the engine's counters.

        Raises:
            AssertionError: a loss, parameter, buffer or optimizer state differs in any bit.
            BudgetError: the budget is too small.
        """
        torch.manual_seed(7)
        plain = self.case.build()
        model, optimizer = offload.prepare(copy.deepcopy(plain), self.factory, self.config())
        engine = optimizer.engine
        try:
            self._train(plain, model, optimizer)
            store = engine.debug.store
            check_mover(store.mover)
            return engine.stats()
        finally:
            engine.close()
            engine.debug.store.budget.close()

    def _train(self, plain: nn.Module, model: nn.Module, optimizer: Any) -> None:
        plain_optimizer = self.factory(plain.parameters())
        schedules = schedule(plain_optimizer), schedule(optimizer)
        generator = torch.Generator().manual_seed(11)
        for step in range(self.steps):
            for _ in range(self.accumulation):
                batch = self.case.batch(generator)
                for _ in range(self.case.passes):
                    losses = [self._loss(m, batch) for m in (plain, model)]
                    assert torch.equal(*losses), f"step {step}: losses {losses}"
                    for loss in losses:
                        (loss / self.accumulation).backward()
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), self.clip_norm)
            for one, scheduled in zip((plain_optimizer, optimizer), schedules, strict=True):
                one.step()
                one.zero_grad()
                scheduled.step()
            if self.case.evaluates:
                evaluated = [self._evaluate(m, batch) for m in (plain, model)]
                assert torch.equal(*evaluated), f"step {step}: evaluations {evaluated}"
            if self.each_step or step == self.steps - 1:
                compare(plain, plain_optimizer, model, optimizer, f"step {step}")

    def _loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = model(*batch)
        return loss

    def _evaluate(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        model.eval()
        with torch.no_grad():
            loss: Tensor = model(*batch)
        model.train()
        return loss


def compare(
    plain: nn.Module,
    plain_optimizer: torch.optim.Optimizer,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    when: str,
) -> None:
    """All parameters, buffers and optimizer states equal, bit for bit."""
    ours = model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours[name]), f"{when}: {name} differs"
    expected, found = plain_optimizer.state_dict()["state"], optimizer.state_dict()["state"]
    assert {k for k, v in expected.items() if v} == {k for k, v in found.items() if v}, (
        f"{when}: not the same parameters have states"
    )
    for number, state in expected.items():
        for name, value in state.items():
            if value is not None:
                assert torch.equal(value, found[number][name]), f"{when}: {name} of parameter {number} differs"


def state_bytes(case: Case) -> int:
    """Bytes of the model's fp32 parameters and two moments."""
    return 12 * sum(p.numel() for p in case.build().parameters())


def smallest_ram(parity: Parity, tries: int = 8) -> int:
    """The smallest budget that works, found as a user finds it: by doing what the error says."""
    ram = 64 * 1024
    for _ in range(tries):
        parity.ram = ram
        try:
            parity.run()
            return ram
        except offload.BudgetError as error:
            assert error.smallest_bytes > ram, str(error)
            ram = error.smallest_bytes
    raise AssertionError(f"no budget works after {tries} tries, the last was {ram}")
