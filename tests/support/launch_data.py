"""Data for launched runs: a small text, and what happens to a run while a batch of it is made."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from torch import Tensor

from offload.data import ByteCorpus

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
