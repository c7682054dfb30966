"""A copy of a model without bytes, for a rehearsal of its steps."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pagemem.errors import OffloadError


class CopyError(OffloadError):
    """A model that cannot be copied without its bytes; says why."""


def copied_to_meta(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on torch's meta device. Its modules are registered in their parents anew,
    so that what watches modules being built sees them.

    Raises:
        CopyError: something in it cannot be copied.
    """
    memo: dict[int, object] = {}
    try:
        for parameter in model.parameters():
            bare = torch.empty_like(parameter, device="meta", requires_grad=False)
            memo[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # What modules hold besides tensors is their own.
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise CopyError(f"the model cannot be copied: {reason}") from error
    _register_anew(copied)
    return copied


def _register_anew(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        _register_anew(child)
        module.register_module(name, child)
