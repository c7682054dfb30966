"""A language model of Llama's shape, for plans of models that no machine here could train: `module:callable` factories.

Shapes: B rows, T tokens a row, C channels (d_model). Grouped-query attention, rotary positions, SwiGLU, RMS norms,
    untied output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_THETA = 500_000.0


class LlamaBlock(nn.Module):
    """Attention and MLP with residuals. (B, T, C) -> (B, T, C)."""

    def __init__(self, d_model: int, n_head: int, n_kv_head: int, d_ff: int) -> None:
        super().__init__()
        self.d_head = d_model // n_head
        self.attention_norm = nn.RMSNorm(d_model)
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, n_kv_head * self.d_head, bias=False)
        self.value = nn.Linear(d_model, n_kv_head * self.d_head, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = nn.RMSNorm(d_model)
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """One block; ``cosine`` and ``sine`` (T, d_head) turn queries and keys."""
        rows, tokens, _ = x.shape
        normed = self.attention_norm(x)
        query, key, value = (
            layer(normed).view(rows, tokens, -1, self.d_head).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        n_alike = query.shape[1] // key.shape[1]
        mixed = F.scaled_dot_product_attention(
            _turned(query, cosine, sine),
            _turned(key, cosine, sine).repeat_interleave(n_alike, 1),
            value.repeat_interleave(n_alike, 1),
            is_causal=True,
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, tokens, -1))
        normed = self.mlp_norm(x)
        grown: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return x + grown


def _turned(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return heads * cosine + torch.cat([-second, first], -1) * sine


class Llama(nn.Module):
    """Blocks between an embedding and an output layer; each block is recomputed in backward if ``recompute``."""

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        n_layer: int,
        n_head: int,
        n_kv_head: int,
        d_ff: int,
        *,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.d_head = d_model // n_head
        self.tokens = nn.Embedding(vocabulary, d_model)
        self.blocks = nn.ModuleList(LlamaBlock(d_model, n_head, n_kv_head, d_ff) for _ in range(n_layer))
        self.norm = nn.RMSNorm(d_model)
        self.output = nn.Linear(d_model, vocabulary, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of tokens ``x`` (B, T) against targets ``y`` (B, T)."""
        hidden = self.tokens(x)
        cosine, sine = self._angles(x.shape[1], hidden)
        for block in self.blocks:
            hidden = (
                checkpoint(block, hidden, cosine, sine, use_reentrant=False)
                if self.recompute
                else block(hidden, cosine, sine)
            )
        logits = self.output(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    def _angles(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = _THETA ** (
            -torch.arange(0, self.d_head, 2, device=like.device, dtype=torch.float32) / self.d_head
        )
        angles = torch.outer(torch.arange(tokens, device=like.device, dtype=torch.float32), frequencies)
        both = torch.cat([angles, angles], -1)
        return both.cos().to(like.dtype), both.sin().to(like.dtype)


def llama(n_layer: int = 80, *, recompute: bool = True) -> Llama:
    """The shape of Llama 3 70B: 70.6 billion parameters with 80 layers."""
    return Llama(128_256, 8192, n_layer, 64, 8, 28_672, recompute=recompute)
