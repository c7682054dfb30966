"""Models whose steps are not all alike: a mixture of experts, and two networks that are trained in turns."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import offload
from benchmarks import common
from benchmarks.common import VOCAB, Embedding, Linear

#: Of the mixture: width, width of an expert, layers, experts of a layer, experts of a token.
WIDTH: Final = 384
EXPERT_WIDTH: Final = 1024
LAYERS: Final = 8
EXPERTS: Final = 16
TOP: Final = 2
#: Weight of the loss that balances gates, as in that paper.
BALANCE: Final = 0.01
#: Of the two networks: width, and layers of the first and of the second.
GAN_WIDTH: Final = 1024
GENERATOR_LAYERS: Final = 8
DISCRIMINATOR_LAYERS: Final = 6


class Expert(nn.Module):
    """Feed-forward network of some tokens, (tokens, C) -> (tokens, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = Linear(WIDTH, EXPERT_WIDTH), Linear(EXPERT_WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = self.out(F.gelu(self.fc(x)))
        return grown


class Experts(nn.Module):
    """Each token goes to `TOP` experts, as its gate says; those that no token goes to are not used.

    Returns what comes of the tokens, and the loss that is to keep experts equally busy (W. Fedus et al., Switch
    Transformers, 2021, section 2.2).

    Args:
        announces: whether `offload.announce` is told of the experts once the gate has chosen.
    """

    def __init__(self, announces: bool) -> None:
        super().__init__()
        self.gate = Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.announces = announces

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.gate(x).softmax(-1)
        weights, chosen = shares.topk(TOP)
        busy = chosen.flatten().bincount(minlength=EXPERTS) / chosen.numel()
        weights = weights / weights.sum(-1, keepdim=True)
        used = chosen.unique().tolist()
        if self.announces:
            offload.announce([self.experts[number] for number in used])
        out = torch.zeros_like(x)
        for number in used:
            token, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, self.experts[number](x[token]) * weights[token, place].unsqueeze(-1))
        return out, EXPERTS * (busy * shares.mean(0)).sum()


class MixtureBlock(nn.Module):
    """Pre-norm transformer block with experts, (B, T, C) -> (B, T, C) and the loss of its gate."""

    def __init__(self, announces: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = Linear(WIDTH, 3 * WIDTH), Linear(WIDTH, WIDTH)
        self.experts = Experts(announces)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, tokens, channels = x.shape
        heads = self.qkv(self.ln1(x)).view(rows, tokens, 3, channels // 64, 64).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(rows, tokens, channels))
        grown, balance = self.experts(self.ln2(x).flatten(0, 1))
        return x + grown.view_as(x), balance


class Mixture(nn.Module):
    """Mixture of experts of 112 million parameters; forward returns the mean cross entropy, and `BALANCE` times the
    losses of the gates."""

    def __init__(self, seq: int, announces: bool) -> None:
        super().__init__()
        common.restart_draws()
        self.tok, self.pos = Embedding(VOCAB, WIDTH), Embedding(seq, WIDTH)
        self.blocks = nn.ModuleList(MixtureBlock(announces) for _ in range(LAYERS))
        self.lnf, self.head = nn.LayerNorm(WIDTH), Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.tok(x) + self.pos(torch.arange(x.shape[1]))
        balances: list[Tensor] = []
        for block in self.blocks:
            hidden, balance = block(hidden)
            balances.append(balance)
        loss = F.cross_entropy(self.head(self.lnf(hidden)).flatten(0, 1), y.flatten())
        return loss + BALANCE * torch.stack(balances).sum()


def _chain(width: int, n_layers: int, *last: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(n_layers):
        layers += [Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers, *last)


class Adversaries(nn.Module):
    """A generator and a discriminator of 15 million parameters; each step trains one of them.

    `forward` returns the loss of the one that is trained: without real rows that of the generator, whose gradients pass
    through the discriminator and change nothing there.
    """

    def __init__(self) -> None:
        super().__init__()
        common.restart_draws()
        self.generator = _chain(GAN_WIDTH, GENERATOR_LAYERS)
        self.discriminator = _chain(GAN_WIDTH, DISCRIMINATOR_LAYERS, Linear(GAN_WIDTH, 1))

    def forward(self, noise: Tensor, real: Tensor | None) -> Tensor:
        self.discriminator.requires_grad_(real is not None)
        if real is None:
            fooled: Tensor = F.softplus(-self.discriminator(torch.tanh(self.generator(noise)))).mean()
            return fooled
        with torch.no_grad():
            made = torch.tanh(self.generator(noise))
        loss: Tensor = F.softplus(self.discriminator(made)).mean() + F.softplus(-self.discriminator(real)).mean()
        return loss
