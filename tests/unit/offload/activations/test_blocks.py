"""Which modules are blocks, what is noted of their forward passes, and that wrapping them leaves nothing behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import GPT, VOCAB
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload.activations.blocks import Blocks, blocks_of


class Layer(nn.Module):
    """More than one module in it."""

    def __init__(self, *, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """(B, 8) to the same."""
        return x + scale * self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


def listed(*kinds: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(kind() for kind in kinds)


class Towers(nn.Module):
    """Two lists, one of them inside another module, and one within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = listed(Layer, Layer)
        self.inner = nn.Module()
        self.inner.second = nn.Sequential(Layer(), nn.GELU(), Layer())
        self.linears = listed(lambda: nn.Linear(8, 8), lambda: nn.Linear(8, 8))
        self.single = listed(Layer)


def test_blocks_are_entries_of_outermost_lists_with_others_of_their_class() -> None:
    model = Towers()
    assert blocks_of(model) == [*model.first, model.inner.second[0], model.inner.second[2]]
    nested = nn.Sequential(nn.Sequential(Layer(), Layer()), nn.Sequential(Layer(), Layer()))
    assert blocks_of(nested) == list(nested)
    assert blocks_of(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))) == []
    shared = Layer()
    assert blocks_of(nn.ModuleList([shared, shared])) == [shared], "one that is used twice is one block"


class Watched:
    """A tower under `Blocks`; positions and saved bytes are told by hand."""

    def __init__(self, model: nn.Module) -> None:
        self.ops = self.saved = 0
        self.blocks = Blocks(model, lambda: self.ops, lambda: self.saved)


def test_calls_are_noted_with_their_ops_and_bytes() -> None:
    model = nn.Sequential(Layer(), Layer())
    watched = Watched(model)
    first, second = watched.blocks
    inner = model[0].up.forward

    def counting(x: Tensor) -> Tensor:
        watched.ops, watched.saved = watched.ops + 3, watched.saved + 100
        return inner(x)

    model[0].up.forward = counting  # type: ignore[method-assign]
    x = torch.ones(4, 8)
    model(x)
    assert (first.calls[0].ops, first.calls[0].saved_bytes, first.calls[0].input_bytes) == (range(3), 100, 4 * 8 * 4)
    assert (second.calls[0].ops, second.calls[0].saved_bytes) == (range(3, 3), 0)
    with torch.no_grad():
        model(x)
    assert len(first.calls) == 1, "a pass that saves nothing is nobody's"
    checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert len(first.calls) == 2, "the model's own recomputation was taken for a forward pass"
    watched.blocks.step_ended()
    assert len(first.past) == 2 and not first.calls


def test_a_block_computed_again_gives_the_same_bits_also_of_random_numbers() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(*(Layer(dropout=0.5) for _ in range(3)))
    x = torch.randn(4, 8)
    results = []
    for recomputes in (False, True):
        watched = Watched(model)
        for block in watched.blocks:
            block.recomputes = recomputes
        assert watched.blocks.n_recomputed == 3 * recomputes
        torch.manual_seed(5)
        model.zero_grad()
        loss = model(x).sum()
        loss.backward()
        results.append([loss.detach(), torch.rand(()), *(p.grad.clone() for p in model.parameters())])
        watched.blocks.close()
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("norm", [False, True])
def test_a_block_that_changes_a_buffer_is_noticed(norm: bool) -> None:
    model = nn.Sequential(Layer(norm=norm), Layer(norm=norm))
    watched = Watched(model)
    model(torch.randn(4, 8))
    assert [block.has_side_effects for block in watched.blocks] == [norm, norm]
    model.eval()
    fresh = Watched(model)
    model(torch.randn(4, 8))
    assert not any(block.has_side_effects for block in fresh.blocks)


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, torch.rand, lambda *_: 0.5], ids=["python", "numpy", "torch", "none"]
)
def test_a_block_that_draws_numbers_which_are_not_the_same_again_is_noticed(draw: Callable[..., Any]) -> None:
    class Drawing(Layer):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x, float(draw(1)) if draw is torch.rand else float(draw()))

    model = nn.Sequential(Drawing(), Drawing())
    watched = Watched(model)
    model(torch.ones(2, 8))
    noticed = draw in (random.random, np.random.rand)
    assert [block.has_side_effects for block in watched.blocks] == [noticed, noticed]
    watched.blocks.watching = False
    for block in watched.blocks:
        block.has_side_effects = False
    model(torch.ones(2, 8))
    assert not any(block.has_side_effects for block in watched.blocks), (
        "it was looked for although it does not matter any more"
    )


def test_arguments_by_name_and_an_own_forward_are_kept() -> None:
    layer = Layer()
    own = layer.forward
    layer.forward = lambda *args, **named: own(*args, **named) * 2  # type: ignore[method-assign]
    replaced = layer.forward
    model = nn.ModuleList([layer, Layer()])
    watched = Watched(model)
    for block in watched.blocks:
        block.recomputes = True
    x = torch.ones(2, 8, requires_grad=True)
    again = model[0](x, scale=0.5)
    watched.blocks.close()
    watched.blocks.close()
    assert torch.equal(again, layer(x, scale=0.5)) and layer.forward is replaced
    assert "forward" not in model[1].__dict__


def test_a_gpt_has_its_blocks() -> None:
    model = GPT(blocks=3)
    watched = Watched(model)
    x = torch.randint(0, VOCAB, (2, 8))
    model(x, x).backward()
    assert [block.module for block in watched.blocks] == list(model.blocks) and all(
        len(block.calls) == 1 for block in watched.blocks
    )
