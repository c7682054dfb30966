"""Models and configurations that forecasts are made of, and the real engine they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from offload.config import Config
from offload.config_loading import load_config
from offload.factories import factory_of
from offload.forecast.rates import Rates
from scheduler.planning.plan import Plan

HERE = __name__
PAGE_BYTES = 64 << 10
ROWS, TOKENS = 2, 16
#: Slow enough for the plan to matter: a step computes for about as long as its moves take.
RATES = Rates(flops=2e9, ram=2e9, ssd_read=4e8, ssd_write=4e8)
STEPS = 4


class Block(nn.Module):
    """A layer whose weight is also used cut in two, through views."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Residual."""
        first, second = self.up.weight.chunk(2)
        bias = self.up.bias.chunk(2)
        h = self.norm(x)
        hidden = torch.cat([nn.functional.linear(h, first, bias[0]), nn.functional.linear(h, second, bias[1])], -1)
        return x + self.down(hidden.relu())


class Viewed(nn.Module):
    """A tied language model of such blocks, some recomputed in backward."""

    def __init__(self, width: int = 64, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.tokens = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss."""
        hidden = self.tokens(x)
        for block in self.blocks:
            if self.recompute:
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        logits = nn.functional.linear(hidden, self.tokens.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


class Looking(nn.Module):
    """Its forward depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Asks for a number."""
        hidden: Tensor = self.layer(torch.ones(4, 16))
        return hidden.sum() if float(hidden.detach().sum()) > 0 else -hidden.sum()


def gpt_config(
    folder: Path, ram: int, *, model: str = "examples.byte_gpt:byte_gpt", dtype: str = "fp32", **sections: Any
) -> Config:
    """A small GPT, or another model."""
    arguments = (
        {"d_model": 96, "n_layer": 3, "n_head": 4, "seq": TOKENS} if model == "examples.byte_gpt:byte_gpt" else {}
    )
    arguments |= sections.pop("arguments", {})
    return load_config(
        {
            "memory": {"ram": ram, "page": PAGE_BYTES},
            "ssd": {"paths": [str(folder / "pages")]},
            "model": {"factory": model, "arguments": arguments, "dtype": dtype},
            "train": {"steps": 1, "batch": ROWS, "seq": TOKENS},
            **sections,
        }
    )


def trained(config: Config, steps: int = STEPS) -> tuple[offload.MemoryReport, int, Plan]:
    """What a real engine reports after some steps; the page-file pages when it was made; and its plan."""
    assert config.model is not None
    torch.manual_seed(1)
    with offload.deferred_init(config):
        model = factory_of("model.factory", config.model.factory, config.model.arguments)()
    with offload.initialize(model, config) as engine:
        start = engine.debug.mover.ssd.used_frames
        for _ in range(steps):
            for _ in range(config.update.accumulation):
                x = torch.randint(0, 256, (ROWS, TOKENS))
                engine.backward(engine(x, x))
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        engine.debug.driver.quiesce()
        plan = engine.debug.driver.follower.plan
        assert plan is not None and engine.stats().deviations == 0
        return engine.memory_report(), start, plan


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"dtype": "bf16"},
    "fp16": {"dtype": "fp16"},
    "clipped": {"update": {"clip_norm": 1.0}},
    "accumulated": {"update": {"accumulation": 2}},
    "at the step": {"update": {"start": "step"}},
    "sgd": {"optimizer": {"name": "sgd"}},
    "tied": {"arguments": {"tied": True}},
    "views": {"model": f"{HERE}:Viewed"},
    "recomputed": {"model": f"{HERE}:Viewed", "arguments": {"recompute": True}},
    "commits": {"commit": {"every_steps": 100, "keep": 3}},
}


LITTLE_RAM = 2 << 20
