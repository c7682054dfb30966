"""Models of torch's own attention layers. Shapes: (ROWS, TOKENS, WIDTH)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, TOKENS, ROWS = 64, 12, 4


class Attending(nn.Module):
    """Attention over itself, with or without a mask of padding."""

    def __init__(self, *, padded: bool = False) -> None:
        super().__init__()
        self.padded = padded
        self.first = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mask = padding() if self.padded else None
        attended: Tensor = self.first(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return self.last(attended)


class Encoding(nn.Module):
    """A stack of layers, with or without a mask of padding, for which it makes a nested tensor."""

    def __init__(self, *, padded: bool = False, norm_first: bool = False) -> None:
        super().__init__()
        self.padded = padded
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        encoded = self.encoder(x, src_key_padding_mask=padding() if self.padded else None)
        return torch.as_tensor(self.last(encoded))


def padding() -> Tensor:
    """The second half of the last row is padding."""
    mask = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    mask[-1, TOKENS // 2 :] = True
    return mask
