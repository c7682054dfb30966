"""The main job's recipe: a byte-level GPT, and the text it reads. Both are ordinary `module:callable` factories.

Shapes: B rows, T tokens a row, C channels (d_model), V = 256 byte values.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.byte_corpus import ByteCorpus

N_BYTES: Final = 256
_STD: Final = 0.02


class _Linear(nn.Linear):
    """A linear layer with GPT-2's initialisation, made inside the constructor: normal weights, zero bias.

    Args:
        std: standard deviation of the weights.
    """

    def __init__(self, n_in: int, n_out: int, *, bias: bool = True, std: float = _STD) -> None:
        self.std = std  # Before the base constructor, which draws the weights.
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weights with the global generator."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Embedding(nn.Embedding):
    """An embedding with GPT-2's initialisation."""

    def reset_parameters(self) -> None:
        """Draw the weights with the global generator."""
        nn.init.normal_(self.weight, std=_STD)


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals. (B, T, C) -> (B, T, C).

    What adds to the residual stream starts smaller, so that the sum over all ``n_layer`` blocks does not grow with
    their number (GPT-2, section 2.3).
    """

    def __init__(self, d_model: int, n_head: int, n_layer: int) -> None:
        super().__init__()
        residual_std = _STD / math.sqrt(2 * n_layer)
        self.n_head = n_head
        self.attention_norm = nn.LayerNorm(d_model)
        self.qkv = _Linear(d_model, 3 * d_model)
        self.out = _Linear(d_model, d_model, std=residual_std)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.up = _Linear(d_model, 4 * d_model)
        self.down = _Linear(4 * d_model, d_model, std=residual_std)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        rows, tokens, channels = x.shape
        heads = self.qkv(self.attention_norm(x)).view(rows, tokens, 3, self.n_head, channels // self.n_head)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, tokens, channels))
        grown: Tensor = self.down(F.gelu(self.up(self.mlp_norm(x))))
        return x + grown


class ByteGPT(nn.Module):
    """A GPT over bytes.

    Args:
        d_model: channels. n_layer: blocks. n_head: attention heads. seq: longest row.
        tied: use the token embedding as the output layer.
    """

    def __init__(self, d_model: int, n_layer: int, n_head: int, seq: int, *, tied: bool) -> None:
        super().__init__()
        if d_model % n_head:
            raise ValueError(f"d_model ({d_model}) is not a multiple of n_head ({n_head})")
        self.seq = seq
        self.tokens = _Embedding(N_BYTES, d_model)
        self.positions = _Embedding(seq, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_head, n_layer) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model)
        self.head = None if tied else _Linear(d_model, N_BYTES, bias=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Mean cross entropy in nats of the next bytes ``y`` (B, T) after ``x`` (B, T); logits (B, T, V) without
        ``y``."""
        if x.shape[1] > self.seq:
            raise ValueError(f"{x.shape[1]} tokens a row, the model was built for {self.seq}")
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden)
        logits: Tensor = F.linear(hidden, self.tokens.weight) if self.head is None else self.head(hidden)
        if y is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


def byte_gpt(d_model: int = 512, n_layer: int = 8, n_head: int = 8, seq: int = 256, tied: bool = False) -> ByteGPT:
    """The byte-level GPT; about 25.6 million parameters as it stands."""
    return ByteGPT(d_model, n_layer, n_head, seq, tied=tied)


def python_source_text(folder: str | Path, seed: int = 1, validation_share: float = 0.05) -> ByteCorpus:
    """The source files of the running Python's standard library, split into training and validation by file."""
    return ByteCorpus.of_standard_library(Path(folder), seed=seed, validation_share=validation_share)
