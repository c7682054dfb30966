"""Ways to put a value into a parameter, each as a user would."""

from __future__ import annotations

import torch
from torch import nn

import offload


def by_gathered(model: nn.Module, value: float) -> None:
    """In place, as whole values."""
    with offload.gathered(model.get_submodule("tok")), torch.no_grad():
        model.get_parameter("tok.weight").fill_(value)


def by_no_grad(model: nn.Module, value: float) -> None:
    """In place, as torch's own functions do."""
    nn.init.constant_(model.get_parameter("tok.weight"), value)


def by_data(model: nn.Module, value: float) -> None:
    """By other values in its place."""
    weight = model.get_parameter("tok.weight")
    weight.data = torch.full(weight.shape, value, dtype=weight.dtype)


def by_state_dict(model: nn.Module, value: float) -> None:
    """With all the others."""
    saved = model.state_dict()
    model.load_state_dict(saved | {"tok.weight": torch.full_like(saved["tok.weight"], value)})


EDITS = [by_gathered, by_no_grad, by_data, by_state_dict]
