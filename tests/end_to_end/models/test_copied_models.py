"""A copy of a model in pages is an ordinary model with the same values, which lives on its own."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from attention_models import Encoding
from parity import adamw
from small_runs import assert_closed, assert_equal, batches, built, config, engine_of, train, train_plain
from tiny_models import GPT
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import offload


@pytest.mark.parametrize("memory", [{}, {"activations": "8MiB"}])
@pytest.mark.parametrize("start", ["auto", "step"])
def test_a_copy_has_the_values_and_trains_without_the_engine(
    start: str, memory: dict[str, str], tmp_path: Path
) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    raw = config(tmp_path, start=start)
    raw["memory"].update(memory)
    with offload.initialize(built(), raw, adamw) as engine:
        train(engine, 3)
        train_plain(plain, optimizer, 3)
        engine.model.norm.requires_grad_(False)  # type: ignore[union-attr]
        copied = copy.deepcopy(engine.model)
        engine.model.norm.requires_grad_(True)  # type: ignore[union-attr]
        assert isinstance(copied, GPT) and not copied.norm.weight.requires_grad
        assert all(type(parameter) is nn.Parameter for parameter in copied.parameters())
        assert_equal(copied, plain)
        copied.norm.requires_grad_(True)
        train_plain(copied, adamw(copied.parameters()), 2)
        train(engine, 2)
        train_plain(plain, optimizer, 2)
        assert_equal(engine.model, plain)
    assert_closed(engine)
    again = pickle.loads(pickle.dumps(copied))
    file = io.BytesIO()
    torch.save(copied, file)
    assert_equal(again, copied)
    assert torch.equal(again(*batches(1)[0]), copied(*batches(1)[0]))
    assert copied.half().tok.weight.dtype is torch.float16


def test_a_copy_of_a_part_and_of_one_parameter(tmp_path: Path) -> None:
    plain = built()
    with engine_of(built(), tmp_path) as engine:
        assert isinstance(engine.model, GPT)
        part = copy.deepcopy(engine.model.blocks[0])
        assert_equal(part, plain.blocks[0])
        assert type(part.get_parameter("up.weight")) is nn.Parameter
        assert torch.equal(copy.deepcopy(engine.model.tok.weight), plain.tok.weight)
        one, other = copy.deepcopy([engine.model.tok.weight, engine.model.tok.weight])
        assert one is other
    assert_closed(engine)


@pytest.mark.parametrize("averaging", ["mean", "ema"])
def test_averaged_models_are_those_of_plain_torch(averaging: str, tmp_path: Path) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    average = None if averaging == "mean" else get_ema_multi_avg_fn(0.9)
    with offload.initialize(built(), config(tmp_path, ram=8 << 20), adamw) as engine:
        ours, expected = (AveragedModel(model, multi_avg_fn=average) for model in (engine.model, plain))
        for _ in range(3):
            train(engine, 1)
            train_plain(plain, optimizer, 1)
            ours.update_parameters(engine.model)
            expected.update_parameters(plain)
        assert_equal(ours, expected)
        with torch.no_grad():
            assert torch.equal(ours(*batches(1)[0]), expected(*batches(1)[0]))
        assert_equal(engine.model, plain)
    assert_closed(engine)


def test_layers_that_a_constructor_copies_may_be_built_out_of_pages(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = Encoding()
    torch.manual_seed(3)
    with offload.deferred_init(config(tmp_path)):
        model = Encoding()
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        assert_equal(model, plain)
        optimizer = adamw(plain.parameters())
        for _ in range(3):
            x = torch.randn(4, 12, 64)
            engine.backward(engine(x).square().mean())
            engine.step()
            plain(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_equal(model, plain)
    assert_closed(engine)


def test_a_copy_of_attention_layers_has_their_own_methods(tmp_path: Path) -> None:
    with offload.initialize(Encoding(), config(tmp_path), adamw) as engine:
        copied = copy.deepcopy(engine.model)
        x = torch.randn(4, 12, 64)
        with torch.no_grad():
            assert torch.equal(copied.eval()(x), engine.model.eval()(x))
    assert_closed(engine)
    assert torch.isfinite(copied(x)).all() and torch.equal(
        copied.double().encoder.layers[0].norm1.weight, torch.ones(64).double()
    )  # type: ignore[union-attr, index]


def test_a_closed_engines_model_cannot_be_copied_any_more(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        pass
    with pytest.raises(RuntimeError, match="tok.weight: the engine that holds this is closed"):
        copy.deepcopy(engine.model)
