"""Data for launched runs: a small text, and what happens to a run while a batch of it is made."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.byte_corpus import ByteCorpus

SENTENCE = b"the quick brown fox jumps over the lazy dog. "


def sentence_text(folder: Path, seed: int) -> ByteCorpus:
    """One sentence, again and again."""
    folder.mkdir(exist_ok=True)
    (folder / "train.bin").write_bytes(SENTENCE * 200)
    (folder / "validation.bin").write_bytes(SENTENCE * 20)
    return ByteCorpus(folder, seed=seed)


class SignallingText(ByteCorpus):
    """Sends its own process a signal while the batch of step number ``at`` is made."""

    at, number = 0, 0

    def batch(self, step: int, rows: int, seq: int) -> tuple[Tensor, Tensor]:
        """As any corpus, and a signal."""
        if step == self.at:
            os.kill(os.getpid(), self.number)
        return super().batch(step, rows, seq)


def signalling_text(folder: Path, seed: int, at: int, name: str) -> ByteCorpus:
    """The sentence, with a signal in it."""
    sentence_text(folder, seed)
    corpus = SignallingText(folder, seed=seed)
    corpus.at, corpus.number = at, signal.Signals[name].value
    return corpus


class Vectors:
    """Vectors and what is to become of them: no text, no tokens, rows of one kind."""

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """Depends on the step alone."""
        x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(step))
        return x, x.roll(1, -1).sin()

    def validation_batches(self, count: int, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Steps that are not trained on."""
        return [self.batch(10**6 + number, rows) for number in range(count)]


def vectors(folder: Path, seed: int) -> Vectors:
    """The vectors."""
    return Vectors()


class Regression(nn.Module):
    """An MLP with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 192), nn.GELU(), nn.Linear(192, 192), nn.GELU(), nn.Linear(192, 16))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error."""
        return nn.functional.mse_loss(self.layers(x), y)


class EndingText(ByteCorpus):
    """There is no batch from number ``at`` on."""

    at = 0

    def batch(self, step: int, rows: int, seq: int) -> tuple[Tensor, Tensor]:
        """As any corpus, for a while."""
        if step >= self.at:
            raise LookupError(f"there are {self.at} batches")
        return super().batch(step, rows, seq)


def ending_text(folder: Path, seed: int, at: int) -> EndingText:
    """The sentence, of which so many batches can be had."""
    sentence_text(folder, seed)
    corpus = EndingText(folder, seed=seed)
    corpus.at = at
    return corpus


def raising() -> None:
    """A factory that fails."""
    raise KeyError("nowhere")


def raising_step() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """Training whose step fails."""
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters()), raising


def kept_text(folder: Path, seed: int, source: str) -> ByteCorpus:
    """The files of a folder, which the corpus keeps in its own."""
    files = sorted(Path(source).iterdir())
    return ByteCorpus.of_files(folder, Path(source), files, seed=seed, validation_share=0.5)
