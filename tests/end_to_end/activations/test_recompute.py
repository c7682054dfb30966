"""Saved results of elementwise ops are computed again in the backward pass: the bits are plain PyTorch's, and nothing
is paged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from parity import adamw
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from towers import paged, saved_by

import offload
from offload import knobs

ROWS, WIDTH, DEPTH = 32, 64, 4
RESULT_BYTES = ROWS * WIDTH * 4

Between = Callable[[Tensor], Tensor]
#: What is between two linear layers; whether its result can be computed again of what is saved anyway.
BETWEEN: dict[str, tuple[Between, bool]] = {
    "gelu": (functional.gelu, True),
    "gelu tanh": (lambda x: functional.gelu(x, approximate="tanh"), True),
    "silu": (functional.silu, True),
    "mish": (functional.mish, True),
    "hardswish": (functional.hardswish, True),
    "leaky relu": (lambda x: functional.leaky_relu(x, 0.125), True),
    "cube": (lambda x: x.clamp(-1, 1).pow(3), True),
    "gated": (lambda x: functional.silu(x) * x, True),
    "seen as another shape": (lambda x: functional.gelu(x).view(ROWS // 2, 2, WIDTH), True),
    "relu, which saves its result": (functional.relu, False),
    "tanh, which saves its result": (torch.tanh, False),
    "scaled, which saves nothing": (lambda x: functional.gelu(x) * 0.5, False),
    "changed in place": (lambda x: functional.gelu(x).mul_(0.5), False),
    "made in another order": (lambda x: functional.gelu(x.t()).t(), False),
    "a part": (lambda x: functional.gelu(torch.cat([x, x]))[ROWS:], True),
}


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)


class Tower(nn.Module):
    """Linear layers with something elementwise after each."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """(ROWS, WIDTH) to the same."""
        for layer in self.layers:
            x = self.between(layer(x)).reshape(ROWS, WIDTH)
        return x


@contextmanager
def tower(folder: Path, between: Between, limit: int) -> Iterator[tuple[offload.Engine, nn.Module, Tensor]]:
    """An engine, the same model without one, and a batch."""
    torch.manual_seed(7)
    plain = Tower(between)
    with paged(plain, folder, limit) as engine:
        yield engine, plain, torch.randn(ROWS, WIDTH)


@pytest.mark.parametrize("name", BETWEEN)
def test_steps_equal_plain_torch(name: str, tmp_path: Path) -> None:
    between, repeatable = BETWEEN[name]
    with tower(tmp_path, between, 0) as (engine, plain, x):
        optimizer = adamw(plain.parameters())
        for _ in range(4):
            loss, same = engine(x).square().mean(), plain(x).square().mean()
            assert torch.equal(loss, same)
            recomputed = saved_by(engine).bytes.now.recomputed
            # The square of the end is computed of what nothing else has saved.
            assert recomputed >= (DEPTH - 1) * RESULT_BYTES if repeatable else recomputed == 0
            loss.backward()
            same.backward()
            engine.optimizer.step()
            engine.optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            del loss, same
            assert (saved_by(engine).bytes.now.saved, saved_by(engine).bytes.now.recomputed) == (0, 0)
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in engine.model.state_dict().items())
        assert engine.stats().deviations == 0


def test_what_can_be_computed_again_goes_before_what_would_be_paged(tmp_path: Path) -> None:
    # Saved: the batch, each layer's result before and after gelu; the last gelu's is nobody's input.
    everything = (1 + DEPTH + DEPTH - 1) * RESULT_BYTES
    for missing in (1, DEPTH - 1, DEPTH + 1):
        with tower(tmp_path / str(missing), functional.gelu, everything - missing * RESULT_BYTES) as (engine, _, x):
            for step in range(3):
                result = engine(x)
                saved = saved_by(engine)
                assert saved.bytes.now.saved == everything
                if step:
                    assert saved.bytes.now.recomputed == min(missing, DEPTH - 1) * RESULT_BYTES
                    assert saved.bytes.now.paged == max(0, missing - (DEPTH - 1)) * RESULT_BYTES
                result.sum().backward()
                del result
                engine.optimizer.step()
                engine.optimizer.zero_grad()


def test_nothing_is_computed_again_below_the_limit(tmp_path: Path) -> None:
    with tower(tmp_path, functional.gelu, 1 << 30) as (engine, _, x):
        for step in range(3):
            result = engine(x)
            assert step == 0 or saved_by(engine).bytes.now.recomputed == 0
            result.sum().backward()
            engine.optimizer.step()
            engine.optimizer.zero_grad()


def test_a_graph_that_is_kept_can_be_used_twice(tmp_path: Path) -> None:
    with tower(tmp_path, functional.silu, 0) as (engine, plain, x):
        loss, same = engine(x).sum(), plain(x).sum()
        for _ in range(2):
            loss.backward(retain_graph=True)
            same.backward(retain_graph=True)
        engine.optimizer.step()
        adamw(plain.parameters()).step()
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in engine.model.state_dict().items())
        del loss
        assert saved_by(engine).bytes.now.saved == 0


def test_an_input_that_was_changed_is_an_error_as_in_plain_torch(tmp_path: Path) -> None:
    def between(x: Tensor) -> Tensor:
        result = functional.gelu(x)
        with torch.no_grad():
            x.mul_(2)
        return result

    with tower(tmp_path, between, 0) as (engine, plain, x):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            plain(x).sum().backward()
        with pytest.raises(RuntimeError, match="changed by an inplace operation"):
            engine(x).sum().backward()


def test_inside_checkpointing_it_is_left_alone(tmp_path: Path) -> None:
    def between(x: Tensor) -> Tensor:
        kept: Tensor = checkpoint(lambda y: functional.gelu(y) * y, x, use_reentrant=False)
        return kept

    with tower(tmp_path, between, 0) as (engine, plain, x):
        loss, same = engine(x).sum(), plain(x).sum()
        loss.backward()
        same.backward()
        engine.optimizer.step()
        adamw(plain.parameters()).step()
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in engine.model.state_dict().items())
