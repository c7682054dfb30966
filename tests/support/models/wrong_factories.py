"""Factories of models and data that return something else than they should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

PAIR = (torch.zeros(2, 16), torch.zeros(2, 16))


class Returns(nn.Module):
    """Its forward returns what it is told to."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.made = made

    def forward(self, x: Tensor, y: Tensor) -> Any:
        """Anything."""
        return self.made(self.layer(x.float()))


def fails(*_: Any, **__: Any) -> Any:
    """Code of a user that is wrong."""
    raise KeyError("nowhere")


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "returns None; it must return a torch.nn.Module"),
    "a_class": (lambda: nn.Linear, "returns the class Linear itself; it must return a torch.nn.Module"),
    "a_pair": (lambda: (nn.Linear(2, 2), 3), "returns a tuple of 2 (Linear, int); it must return a torch.nn.Module"),
    "empty": (lambda: nn.ReLU(), "returns a ReLU without parameters"),
    "frozen": (lambda: nn.Linear(16, 16).requires_grad_(False), "without trainable parameters (none requires grad)"),
    "failing": (fails, "fails: KeyError: 'nowhere'"),
    "failing_forward": (lambda: Returns(fails), "fails: KeyError: 'nowhere'"),
    "vector": (
        lambda: Returns(lambda h: h.mean(1)),
        "forward(x, y) returns a tensor of shape (2,), float32; it must return the loss of a batch",
    ),
    "no_loss": (lambda: Returns(lambda h: None), "forward(x, y) returns None; it must return the loss"),
    "number": (lambda: Returns(lambda h: 0.5), "forward(x, y) returns a float; it must return the loss"),
    "dictionary": (
        lambda: Returns(lambda h: {"loss": h.mean()}),
        "forward(x, y) returns a dict; it must return the loss",
    ),
    "whole": (
        lambda: Returns(lambda h: h.argmax()),
        "forward(x, y) returns a tensor of shape (), int64; it must return the loss",
    ),
}


def _data(**changed: Any) -> Any:
    methods = {"batch": lambda step, rows, seq: PAIR, "validation_batches": lambda count, rows, seq: [PAIR] * count}
    return SimpleNamespace(**{name: method for name, method in {**methods, **changed}.items() if method is not None})


DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "returns None, which has no method batch(step, rows, seq)"),
    "list": (lambda: [PAIR], "returns a list of 1 (tuple), which has no method batch(step, rows, seq)"),
    "no_batch": (lambda: _data(batch=None), "which has no method batch(step, rows, seq)"),
    "no_validation": (
        lambda: _data(validation_batches=None),
        "which has no method validation_batches(count, rows, seq)",
    ),
    "other_arguments": (
        lambda: _data(batch=lambda step: PAIR),
        "batch is called as batch(step, rows, seq): too many positional arguments",
    ),
    "unit": (lambda: _data(unit=8), 'unit of what it returns is 8; it must be text such as "byte"'),
    "tokens": (
        lambda: _data(tokens_per_sample=1.5),
        "tokens_per_sample of what it returns is 1.5; it must be a whole number above 0",
    ),
    "failing": (fails, "fails: KeyError: 'nowhere'"),
    "no_validation_batch": (lambda: _data(validation_batches=lambda *_: []), "validation_batches gives no batch"),
    "validation_of_none": (
        lambda: _data(validation_batches=lambda *_: None),
        "validation_batches gives None; it must give pairs",
    ),
    "validation_of_tensors": (
        lambda: _data(validation_batches=lambda *_: PAIR),
        "validation_batches gives a tensor of shape (2, 16), float32",
    ),
    "failing_validation": (lambda: _data(validation_batches=fails), "validation_batches fails: KeyError: 'nowhere'"),
    "one_tensor": (
        lambda: _data(batch=lambda *_: PAIR[0]),
        "batch gives a tensor of shape (2, 16), float32; it must give a pair of tensors",
    ),
    "failing_batch": (lambda: _data(batch=fails), "batch 0 fails: KeyError: 'nowhere'"),
}


def model(name: str) -> Any:
    """What the factory of this name returns."""
    return MODELS[name][0]()


def data(folder: Path, seed: int, name: str) -> Any:
    """What the factory of this name returns."""
    return DATA[name][0]()


def regression() -> nn.Module:
    """A model that takes these pairs."""
    return Returns(lambda hidden: hidden.square().mean())
