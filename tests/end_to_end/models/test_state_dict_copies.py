"""Writing to a tensor of `state_dict()`: plain PyTorch changes the parameter; here it is an error, as it is a copy."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity import adamw
from small_runs import assert_equal, batches, built, engine_of, train, train_plain
from torch import nn


def _write(model: nn.Module) -> None:
    model.state_dict()["head.weight"].mul_(0.5)


def _load_by_name(model: nn.Module) -> None:
    own = model.state_dict()
    for name, value in built().state_dict().items():
        own[name].copy_(value)


def _write_to_a_view(model: nn.Module) -> None:
    model.state_dict()["head.weight"][0, 0] = 1.0


@pytest.mark.parametrize("write", [_write, _load_by_name, _write_to_a_view])
@pytest.mark.parametrize("then", ["forward", "state_dict"])
def test_a_write_to_a_copy_is_an_error_at_the_next_use(
    write: Callable[[nn.Module], None], then: str, tmp_path: Path
) -> None:
    plain = built()
    train_plain(plain, adamw(plain.parameters()), 2)
    with engine_of(built(), tmp_path) as engine:
        train(engine, 2)
        write(engine.model)
        gc.collect()
        with pytest.raises(RuntimeError, match=r"a tensor of state_dict\(\) was written to, .* the model has its old"):
            engine(*batches(1)[0]) if then == "forward" else engine.model.state_dict()
        assert_equal(engine.model, plain)


def test_a_changed_copy_that_is_loaded_and_a_clone_have_plain_bits(tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        mean = {name: value.clone() for name, value in model.state_dict().items()}
        values = model.state_dict()
        for name, value in values.items():
            value.mul_(0.9)
            mean[name].add_(1.0)
        model.load_state_dict(values)

    plain = built()
    optimizer = adamw(plain.parameters())
    train_plain(plain, optimizer, 2)
    change(plain)
    train_plain(plain, optimizer, 2)
    with engine_of(built(), tmp_path) as engine:
        train(engine, 2)
        change(engine.model)
        train(engine, 2)
        assert_equal(engine.model, plain)


def test_copies_that_nobody_has_are_forgotten_and_weigh_nothing(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        kept = engine.model.state_dict()
        copies = engine.debug.store.binder.state_copies
        assert len(copies._copies) == len(kept)
        assert all(one.counter.untyped_storage().nbytes() == 0 for one in copies._copies)
        for _ in range(3):
            engine.model.state_dict()
        assert len(copies._copies) == 2 * len(kept), "the last one's are not looked at yet"
        del kept
        train(engine, 1)
        assert copies._copies == []
        with torch.inference_mode():
            engine.model.state_dict()
        assert copies._copies == []
