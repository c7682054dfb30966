"""Batches drawn from two long rows of tokens, which are usually memory-mapped: what language models train on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Token ids in a row, of an unsigned dtype.
Tokens = npt.NDArray[Any]


class TokenBatches:
    """What ``data.factory`` may return, see `offload.launch.batches`. Any thread.

    Args:
        seed: batches depend on it and on the step alone, so a resumed run reads on where it stopped.
        unit: of what losses are a mean over.
    """

    def __init__(self, train: Tokens, validation: Tokens, seed: int, unit: str = "token") -> None:
        self.train = train
        self.validation = validation
        self.seed = seed
        self.unit = unit

    def batch(self, step: int, rows: int, seq: int) -> tuple[Tensor, Tensor]:
        """Training batch number ``step``: tokens and the ones after them, int64, (rows, seq) each.

        Raises:
            ValueError: there are fewer tokens than a row takes.
        """
        self._check_length("training", self.train, seq)
        drawn = np.random.default_rng((self.seed, step)).integers(0, len(self.train) - seq, size=rows)
        return _rows(self.train, drawn, seq)

    def validation_batches(self, count: int, rows: int, seq: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``count`` validation batches, spread evenly over the validation tokens; the same ones every time. Raises as
        `batch`."""
        self._check_length("validation", self.validation, seq)
        starts = np.linspace(0, len(self.validation) - seq - 1, count * rows).astype(np.int64)
        for number in range(count):
            yield _rows(self.validation, starts[number * rows : (number + 1) * rows], seq)

    def unigram_entropy_bits(self) -> float:
        """Entropy of the validation tokens' frequencies: bits for each of the best model without context."""
        counts = np.unique(self.validation, return_counts=True)[1].astype(np.float64)
        shares = counts / counts.sum()
        return float(-(shares * np.log2(shares)).sum())

    def _check_length(self, what: str, tokens: Tokens, seq: int) -> None:
        if len(tokens) <= seq:
            raise ValueError(
                f"the {what} text has {len(tokens)} {self.unit}s, a row needs {seq + 1}; take a smaller train.seq or "
                "more text"
            )


def _rows(tokens: Tokens, starts: npt.NDArray[Any], seq: int) -> tuple[Tensor, Tensor]:
    cut = torch.from_numpy(np.stack([tokens[start : start + seq + 1] for start in starts]).astype(np.int64))
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()
