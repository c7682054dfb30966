"""Small models, each with something about its parameters that an engine can get wrong. Shapes: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, TOKENS, ROWS = 128, 128, 16, 2


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, width: int = WIDTH, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).view(rows, tokens, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(rows, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A GPT; ``tied`` shares the embedding with the output, ``recompute`` checkpoints each block."""

    def __init__(self, *, tied: bool = False, recompute: str | None = None, blocks: int = 2) -> None:
        super().__init__()
        self.recompute = recompute
        self.tok, self.pos = nn.Embedding(VOCAB, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = None if tied else nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.tok(x) + self.pos(torch.arange(x.shape[1]))
        for block in self.blocks:
            if self.recompute is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.recompute == "reentrant")
        hidden = self.norm(hidden)
        logits = F.linear(hidden, self.tok.weight) if self.head is None else self.head(hidden)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


class ConvNet(nn.Module):
    """Convolutions with batch norm: buffers beside parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.second, self.norm2 = nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)
        self.third = nn.Conv2d(128, 64, 3, stride=2)
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.first(x)))
        hidden = F.relu(self.norm2(self.second(hidden)))
        return F.cross_entropy(self.out(self.third(hidden).mean((2, 3))), y)


class PartlyTrained(nn.Module):
    """An MLP with a layer that is never used and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused = nn.Linear(64, 128), nn.Linear(64, 256)
        self.middle = nn.ModuleList(nn.Linear(128, 128) for _ in range(4))
        self.frozen, self.last = nn.Linear(128, 128), nn.Linear(128, 10)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.gelu(self.first(x))
        for layer in self.middle:
            hidden = F.gelu(layer(hidden))
        return F.cross_entropy(self.last(F.gelu(self.frozen(hidden))), y)


class Borrower(nn.Module):
    """A parameter of one module used by another, as a view taken before its use, and in a penalty of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)
        self.more = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(3))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 256))
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight = self.second.weight.t()
        for part in self.more:
            x = x + part(x)
        hidden = F.gelu(self.first(x)) * self.scale
        hidden = self.second(hidden) + F.linear(hidden, self.first.weight.t()) + hidden @ weight
        return F.cross_entropy(self.last(hidden), y) + 1e-3 * self.second.weight.pow(2).mean()


@dataclass(frozen=True)
class Case:
    """A model and the batches it eats; ``passes`` is how many backward passes one batch takes."""

    build: Callable[[], nn.Module]
    kind: str
    passes: int = 1
    evaluates: bool = False

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.kind == "tokens":
            cut = torch.randint(0, VOCAB, (ROWS, TOKENS + 1), generator=generator)
            return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()
        shape = (4, 3, 8, 8) if self.kind == "images" else (8, 64)
        return torch.randn(shape, generator=generator), torch.randint(0, 10, (shape[0],), generator=generator)


CASES: dict[str, Case] = {
    "gpt": Case(GPT, "tokens"),
    "tied": Case(lambda: GPT(tied=True), "tokens"),
    "conv": Case(ConvNet, "images"),
    "partly_trained": Case(PartlyTrained, "vectors"),
    "borrower": Case(Borrower, "vectors"),
    "recompute": Case(lambda: GPT(recompute="non-reentrant"), "tokens"),
    "recompute_reentrant": Case(lambda: GPT(recompute="reentrant"), "tokens"),
    "two_backwards": Case(GPT, "tokens", passes=2),
    "evaluating": Case(GPT, "tokens", evaluates=True),
}
