"""Steps that use different parts of a model: the bits of plain PyTorch, whatever is clipped, accumulated, kept in RAM
or on SSD."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import compare
from small_runs import assert_closed
from torch import Tensor, nn

import offload

WIDTH = 96


class Branches(nn.Module):
    """A trunk, three experts of which each batch uses one, blocks that are left out at random, and small layers that
    share a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(3)
        )
        self.small = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.outside = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, branch: int) -> Tensor:
        x = torch.tanh(self.trunk(x))
        x = x + self.experts[branch % 3](x)
        for number, norm in enumerate(self.small):
            if (branch >> number) % 2 == 0:
                x = norm(x)
        if branch % 4 == 0:
            x = x + self.outside(x)
        result: Tensor = self.last(x).square().mean()
        return result


def built() -> Branches:
    torch.manual_seed(3)
    return Branches()


def optimizer_of(model: nn.Module) -> Callable[[Any], torch.optim.Optimizer]:
    """All but one layer, which requires gradients, too: `clip_grad_norm_(model.parameters())` counts it, and nobody
    clears it."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        left_out = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("outside")}
        chosen = [parameter for parameter in parameters if id(parameter) not in left_out]
        return torch.optim.AdamW(chosen, lr=1e-2, eps=1e-2, fused=True)

    return make


PLACES: dict[str, dict[str, Any]] = {
    "all in RAM": {"memory": {"ram": "16MiB", "page": "64KiB"}},
    "mostly on SSD": {"memory": {"ram": "512KiB", "page": "64KiB"}},
    "device": {"device": "cpu-emulated", "memory": {"ram": "1MiB", "page": "64KiB", "device": "448KiB"}},
}
CLIPS = (None, 1e-2, 1e6)
#: Micro-batches of each step. The first step has as many as any: where updates start early it foretells them.
ACCUMULATION: dict[str, tuple[int, ...]] = {"1": (1,), "2": (2,), "uneven": (3, 1, 2, 3, 1)}
STARTS = ("auto", "step")
PRODUCT = list(itertools.product(PLACES, CLIPS, ACCUMULATION, STARTS))


def train(
    folder: Path, place: str, clip: float | None, micro_batches: Sequence[int], start: str, *, seed: int, steps: int
) -> None:
    """Train both models, comparing everything after each step.

    Raises:
        AssertionError: a bit differs.
    """
    plain = built()
    model = copy.deepcopy(plain)
    settings = {
        **PLACES[place],
        "ssd": {"paths": [str(folder / "pages")], "threads": 2},
        "update": {"clip_norm": clip, "start": start},
    }
    model, optimizer = offload.prepare(model, optimizer_of(model), settings)
    plain_optimizer = optimizer_of(plain)(plain.parameters())
    engine: offload.Engine = optimizer.engine  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed)
    try:
        for step, passes in zip(range(steps), itertools.cycle(micro_batches)):
            branch = int(torch.randint(0, 16, (1,), generator=generator))
            for _ in range(passes):
                x = torch.randn(8, WIDTH, generator=generator)
                losses = [one(x, branch) for one in (plain, model)]
                assert torch.equal(*losses), f"step {step}: losses"
                for loss in losses:
                    (loss / passes).backward()
            if clip is not None:
                norm = nn.utils.clip_grad_norm_(plain.parameters(), clip)
            plain_optimizer.step()
            optimizer.step()
            assert engine.grad_norm == (None if clip is None else float(norm)), f"step {step}: norm"
            plain_optimizer.zero_grad()
            optimizer.zero_grad()
            compare(plain, plain_optimizer, model, optimizer, f"step {step}")
            outside = [one.outside.weight.grad for one in (plain, model)]  # type: ignore[union-attr]
            assert (outside[0] is None) == (outside[1] is None)
            assert outside[0] is None or torch.equal(outside[0], outside[1].clone())  # type: ignore[arg-type,union-attr]
    finally:
        assert_closed(engine)


@pytest.mark.parametrize(("place", "clip", "accumulation", "start"), PRODUCT[::5])
def test_alternating_branches(place: str, clip: float | None, accumulation: str, start: str, tmp_path: Path) -> None:
    train(tmp_path, place, clip, ACCUMULATION[accumulation], start, seed=1, steps=6)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_the_whole_product_of_branches(tmp_path: Path, tally: Callable[..., None]) -> None:
    failed: list[str] = []
    trials = [(combination, seed) for combination in PRODUCT for seed in range(4)]
    for number, ((place, clip, accumulation, start), seed) in enumerate(trials):
        try:
            train(tmp_path / str(number), place, clip, ACCUMULATION[accumulation], start, seed=seed, steps=10)
        except (AssertionError, offload.OffloadError, RuntimeError) as error:
            failed.append(f"{place}, clip {clip}, accumulation {accumulation}, {start}, seed {seed}: {error}")
    tally(
        "alternating branches x clip x accumulation x residency x start, every bit of each step",
        trials=len(trials), failures=len(failed), detail="; ".join(failed[:3]),
    )  # fmt: skip
    assert not failed
