"""A norm that does not depend on how its elements are spread over ranks, units or pages.

Squares are summed in fp64 over blocks of `BLOCK_NUMEL` elements by a fixed tree; parameters lie at multiples of that
many elements in their units, and units are cut at multiples of it, so the blocks are the same for every number of
ranks, degree and packing. The sums of the blocks are added up exactly, as integers, so that their order does not matter
either. Rounding: that of the tree, at most 6 units in the last place of fp64, and that of the result to fp32.

Why not in block order, as a running sum: the order of blocks over ranks is not that of any one process, and an exact
sum costs a few operations a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from optim.layout import SLOT_ALIGN_NUMEL

BLOCK_NUMEL: Final = SLOT_ALIGN_NUMEL
#: Elements that are squared at a time: 512 KiB of fp64.
_CHUNK_NUMEL: Final = 1 << 16
#: A sum is a whole number of 2 ** -_POINT: the smallest square's last bit is at -1074 - 52 at least.
_POINT: Final = 1152
#: Bits of an integer that a float holds exactly, and how many such words the largest sum takes.
_WORD_BITS: Final = 48
N_WORDS: Final = 1 + -(-(_POINT + 1024 + 64) // _WORD_BITS)


class SquareSum:
    """The exact sum of blocks' squares so far."""

    def __init__(self) -> None:
        self._total = 0
        self._infinite = False

    def add(self, flat: torch.Tensor) -> None:
        """Add the squares of a flat tensor's elements, of any float dtype and device, which begins at a block."""
        for begin in range(0, flat.numel(), _CHUNK_NUMEL):
            self._add_blocks(_block_sums(flat[begin : begin + _CHUNK_NUMEL]))

    def _add_blocks(self, sums: torch.Tensor) -> None:
        found = sums.numpy()
        if not np.isfinite(found).all():
            self._infinite = True
            return
        fractions, exponents = np.frexp(found)
        mantissas = (fractions * 2.0**53).astype(np.int64)
        for exponent in np.unique(exponents):
            # The sum of at most 1024 blocks of 53 bits fits in 64.
            total = int(mantissas[exponents == exponent].sum())
            self._total += total << (int(exponent) - 53 + _POINT)

    def merge(self, other: SquareSum) -> None:
        """Add what another sum has."""
        self._total += other._total
        self._infinite |= other._infinite

    def words(self) -> list[float]:
        """The sum as `N_WORDS` floats, for `from_words`."""
        mask = (1 << _WORD_BITS) - 1
        return [float(self._infinite), *(float(self._total >> _WORD_BITS * i & mask) for i in range(N_WORDS - 1))]

    @classmethod
    def from_words(cls, words: Sequence[float]) -> SquareSum:
        """The sum that `words` has given."""
        made = cls()
        made._infinite = bool(words[0])
        made._total = sum(int(word) << _WORD_BITS * place for place, word in enumerate(words[1:]))
        return made

    def norm(self) -> torch.Tensor:
        """Its root, a scalar fp32 tensor; infinite where an element was not finite, or its square too large."""
        if self._infinite:
            return torch.tensor(math.inf)
        return torch.tensor(math.isqrt(self._total) / 2.0 ** (_POINT // 2), dtype=torch.float32)


def _block_sums(flat: torch.Tensor) -> torch.Tensor:
    """The sums of squares of each block, fp64, on the CPU, by pairs of halves."""
    squares = flat.detach().to("cpu", torch.float64, copy=True).square_()
    missing = -squares.numel() % BLOCK_NUMEL
    blocks = torch.nn.functional.pad(squares, (0, missing)).view(-1, BLOCK_NUMEL)
    width = BLOCK_NUMEL
    while width > 1:
        width //= 2
        blocks = blocks[:, :width] + blocks[:, width:]
    return blocks[:, 0]
