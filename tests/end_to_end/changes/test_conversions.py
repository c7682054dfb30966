"""Conversions of a model in pages: refused before any tensor is converted, or made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity import adamw
from small_runs import (
    assert_closed,
    assert_equal,
    built,
    config,
    train,
    train_plain,
)  # fmt: skip
from torch import nn

import offload


class Mixed(nn.Module):
    """Buffers before, in and after parameters: a conversion that stops half way would have converted some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Module()
        self.table.register_buffer("angles", torch.linspace(0, 1, 8))
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
        self.rnn = nn.LSTM(8, 4)
        self.register_buffer("late", torch.ones(2))


CONVERSIONS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "bf16": (
        lambda m: m.to(torch.bfloat16),
        "norm.weight: the conversion would make this parameter torch.bfloat16, but it lives in pages as torch.float32",
    ),
    "bfloat16": (
        lambda m: m.bfloat16(),
        "would make this parameter torch.bfloat16.*set model.dtype in the configuration",
    ),
    "half": (lambda m: m.half(), "would make this parameter torch.float16"),
    "double": (lambda m: m.double(), "would make this parameter torch.float64"),
    "type": (lambda m: m.type(torch.float16), "would make this parameter torch.float16"),
    "meta": (
        lambda m: m.to("meta"),
        "would make this parameter meta, but it lives in pages as cpu; set device in the configuration",
    ),
    "empty": (lambda m: m.to_empty(device="meta"), "would make this parameter meta"),
    "layout": (
        lambda m: m.to(memory_format=torch.channels_last),
        "conv.weight: the conversion would change how this parameter lies in memory",
    ),
    "shared": (lambda m: m.share_memory(), "cannot be shared with other processes; share model.state_dict()"),
    "part": (lambda m: m.get_submodule("conv").half(), "conv.weight: .* torch.float16"),
    "by hand": (lambda m: m._apply(lambda tensor: tensor.to(torch.bfloat16)), "norm.weight: .* torch.bfloat16"),
}


@pytest.mark.parametrize("when", ["prepared", "deferred"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_that_pages_cannot_follow_is_refused_before_any_tensor_is_converted(
    name: str, when: str, tmp_path: Path
) -> None:
    convert, message = CONVERSIONS[name]
    torch.manual_seed(3)
    expected = Mixed().state_dict()

    def refused(model: nn.Module) -> None:
        with pytest.raises(
            RuntimeError, match=message.replace("norm.weight", ".*norm.weight").replace("conv.weight", ".*weight")
        ) as caught:
            convert(model)
        assert str(caught.value).endswith("Nothing was converted") and "\n" not in str(caught.value)
        found = model.state_dict()
        assert all(
            found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items()
        )
        assert all(tensor.device.type == "cpu" and not tensor.is_shared() for tensor in found.values())

    torch.manual_seed(3)
    if when == "deferred":
        with offload.deferred_init(config(tmp_path)):
            model = Mixed()
            refused(model)
        offload.initialize(model, config(tmp_path)).close()
        return
    with offload.initialize(Mixed(), config(tmp_path)) as engine:
        refused(engine.model)
    engine.model.get_submodule("table").half()  # A closed engine does not stand in the way.


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.float(),
        lambda m: m.cpu(),
        lambda m: m.to("cpu"),
        lambda m: m.to("cpu", torch.float32),
        lambda m: m.to(torch.zeros(1)),
        lambda m: m._apply(lambda tensor: tensor),
        lambda m: m.to(memory_format=torch.contiguous_format),
    ],
)
def test_a_conversion_to_what_the_model_is_changes_and_moves_nothing(
    convert: Callable[[nn.Module], nn.Module], engine: offload.Engine
) -> None:
    plain = built()
    engine.drain()
    engine.debug.driver.evict_all()
    before = engine.stats()
    assert convert(engine.model) is engine.model
    assert engine.stats().bytes_read == before.bytes_read
    train(engine, 3)
    train_plain(plain, adamw(plain.parameters()), 3)
    assert_equal(engine.model, plain)


def test_a_conversion_of_values_and_of_what_is_not_paged_is_made(tmp_path: Path) -> None:
    plain, model = Mixed(), Mixed()
    model.load_state_dict(plain.state_dict())
    with offload.initialize(model, config(tmp_path)) as engine:
        for one in (plain, model):
            one._apply(lambda tensor: tensor * 2)
            one.get_submodule("table").to(torch.float64)
        assert_equal(model, plain)
        assert model.get_buffer("table.angles").dtype is torch.float64
        model.to_empty(device="cpu")
        assert [value.shape for value in model.state_dict().values()] == [
            value.shape for value in plain.state_dict().values()
        ]
    assert_closed(engine)
