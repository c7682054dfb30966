"""A small model whose units have several sizes, two of its parameters tied, and steps to train it."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

ADAMW: Final = partial(torch.optim.AdamW, lr=1e-2, fused=True)
VOCABULARY: Final = 96


class TiedModel(nn.Module):
    """Norms and biases among its parameters; forward(tokens) is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 40)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 130), nn.GELU(), nn.Linear(130, 40)) for _ in range(3)
        )
        self.head = nn.Linear(40, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


def tied_model() -> TiedModel:
    """The same one each time."""
    torch.manual_seed(1)
    return TiedModel()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Of a micro-batch."""
    loss: Tensor = model(batch)
    return loss


def steps_of(n_steps: int, n_batches: int) -> list[list[Tensor]]:
    """So many micro-batches of uneven shapes for each step."""
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randint(0, VOCABULARY, (2 + i % 3, 7 + i), generator=generator) for i in range(n_batches)]
        for _ in range(n_steps)
    ]
