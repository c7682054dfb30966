"""Data for launched runs: a small text, and what happens to a run while a batch of it is made."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.byte_corpus import ByteCorpus
from examples.byte_gpt import ByteGPT
from offload import Callback
from offload.callbacks import Evaluation

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


class SignalledValidation(ByteCorpus):
    """Sends its own process a signal in the middle of validation number ``at``, counted from 0."""

    at, number, made = 0, 0, 0

    def validation_batches(self, count: int, rows: int, seq: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As any corpus, and a signal after the first batch."""
        batches = super().validation_batches(count, rows, seq)
        yield next(batches)
        if self.made == self.at:
            os.kill(os.getpid(), self.number)
        self.made += 1
        yield from batches


def signalled_validation(folder: Path, seed: int, at: int, name: str) -> ByteCorpus:
    """The sentence, with a signal in its validation."""
    sentence_text(folder, seed)
    corpus = SignalledValidation(folder, seed=seed)
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


class InterruptingText(ByteCorpus):
    """Presses Ctrl-C while the batch of step number ``at`` is made, ``times`` times."""

    at, times, number = 3, 1, signal.SIGINT

    def batch(self, step: int, rows: int, seq: int) -> tuple[Tensor, Tensor]:
        """As any corpus, and a signal."""
        if step == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return super().batch(step, rows, seq)


def interrupting_text(folder: Path, seed: int, times: int, name: str = "SIGINT") -> ByteCorpus:
    """The small text with Ctrl-C, or another signal, in it."""
    sentence_text(folder, seed)
    corpus = InterruptingText(folder, seed=seed)
    corpus.times, corpus.number = times, signal.Signals[name]
    return corpus


class Poisoned(ByteGPT):
    """Its loss is NaN from the fourth training batch on."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """As any byte GPT, until it is not."""
        loss = super().forward(x, y)
        if self.training:
            self.batches = getattr(self, "batches", 0) + 1
            loss = loss * (float("nan") if self.batches > 3 else 1.0)
        return loss


def poisoned(d_model: int, n_layer: int, n_head: int, seq: int) -> ByteGPT:
    """The model that fails."""
    return Poisoned(d_model, n_layer, n_head, seq, tied=False)


def poisoned_at_once(d_model: int, n_layer: int, n_head: int, seq: int) -> ByteGPT:
    """The model that fails in its first step."""
    model = Poisoned(d_model, n_layer, n_head, seq, tied=False)
    model.batches = 3
    return model


class Interrupting(Callback):
    """Presses Ctrl-C when it hears of the last evaluation."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Of step 4."""
        if evaluation.step == 4:
            os.kill(os.getpid(), signal.SIGINT)


class Drawing(ByteGPT):
    """Initialised with all kinds of random numbers."""

    def __init__(self, *args: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with torch.no_grad():
            self.norm.weight.fill_(random.random())
            self.norm.bias.fill_(float(np.random.rand()))


def drawing(d_model: int, n_layer: int, n_head: int, seq: int) -> ByteGPT:
    """The model that draws."""
    return Drawing(d_model, n_layer, n_head, seq, tied=False)


class Measured(ByteGPT):
    """Looks at its values while it is built."""

    def __init__(self, *args: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spread = float(self.tokens.weight.detach().std())


def measured(d_model: int, n_layer: int, n_head: int, seq: int) -> ByteGPT:
    """The model that cannot be built without values."""
    return Measured(d_model, n_layer, n_head, seq, tied=False)


not_callable = 3
