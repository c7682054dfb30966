"""A model whose largest matrices are its embedding and its output layer, by far."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH = 3001, 32


class WideVocabulary(nn.Module):
    """A small language model of 3001 words.

    Args:
        tied: the output layer has the embedding's weight. bias: of the output layer.
    """

    def __init__(self, *, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down, self.norm = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.tok.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of tokens x (rows, tokens) with targets y."""
        hidden = self.tok(x)
        hidden = self.norm(hidden + self.down(F.gelu(self.up(hidden))))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())


def built(**arguments: bool) -> WideVocabulary:
    """The model, always with the same weights."""
    torch.manual_seed(7)
    return WideVocabulary(**arguments)


def batches(count: int, rows: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Always the same batches."""
    generator = torch.Generator().manual_seed(11)
    pairs = torch.randint(VOCABULARY, (count, 2, rows, 12), generator=generator)
    return [(pair[0], pair[1]) for pair in pairs]
