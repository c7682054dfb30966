"""nn.Parameter over a paged one, and parametrizations, which make such: while a model is built and once it is in
pages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cross_references import check_mover
from parity import adamw, compare
from small_runs import assert_closed, assert_equal, config
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import offload

WIDE = 96


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


def again(layer: nn.Module) -> None:
    """The weight replaced by another parameter over the same memory."""
    weight = layer.weight
    del layer.weight
    layer.weight = nn.Parameter(weight)


def of_data(layer: nn.Module) -> None:
    """The same with ``.data``."""
    layer.weight = nn.Parameter(layer.weight.data)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parameter": again,
    "data": of_data,
}


class Changed(nn.Module):
    """A net whose layers are in it before they are changed; with ``lists``, parameters in lists and mappings as
    well."""

    def __init__(self, change: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 10)
        change(self.second)
        self.each = nn.ParameterList([nn.Parameter(torch.randn(WIDE)), torch.randn(WIDE)])
        self.named = nn.ParameterDict({"scale": nn.Parameter(torch.rand(WIDE)), "tied": self.each[0]})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) * self.named["scale"] + self.each[1] * self.named["tied"]
        return nn.functional.cross_entropy(self.last(torch.tanh(self.second(hidden))), y)


def train(*pairs: tuple[nn.Module, torch.optim.Optimizer], steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        x, y = torch.randn(8, 64, generator=generator), torch.randint(0, 10, (8,), generator=generator)
        for model, optimizer in pairs:
            model(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("how", ["deferred", "plain"])
@pytest.mark.parametrize("name", CHANGES)
def test_built_with_them_a_model_has_plain_bits(name: str, how: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain = Changed(CHANGES[name])
    expected = torch.get_rng_state()
    torch.manual_seed(7)
    if how == "deferred":
        with offload.deferred_init(config(tmp_path)):
            model = Changed(CHANGES[name])
    else:
        model = Changed(CHANGES[name])
    assert torch.equal(torch.get_rng_state(), expected)
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        assert all(isinstance(parameter, offload.PagedParameter) for parameter in model.parameters())
        assert_equal(model, plain)
        optimizer = adamw(plain.parameters())
        train((plain, optimizer), (model, engine.optimizer))
        compare(plain, optimizer, model, engine.optimizer, "in the end")
        with torch.no_grad():
            x, y = torch.randn(4, 64), torch.randint(0, 10, (4,))
            assert torch.equal(model.eval()(x, y), plain.eval()(x, y))
        check_mover(engine.debug.mover)
    assert_closed(engine)


def test_two_parameters_over_the_same_pages_are_refused(tmp_path: Path) -> None:
    for make in (lambda weight: nn.Parameter(weight), lambda weight: nn.Parameter(weight.data)):
        with offload.deferred_init(config(tmp_path)) as store:
            model = nn.Sequential(nn.Linear(8, 256), nn.Linear(8, 256))
            store.flush()
            model[1].weight = make(model[0].weight)
            again = nn.Sequential(model)
        with pytest.raises(
            ValueError, match=r"0\.weight and 1\.weight are different tensors over the same memory.*tie them as one"
        ) as caught:
            offload.initialize(again[0], config(tmp_path), adamw)
        assert "\n" not in str(caught.value)
        store.close()


def test_a_parameter_over_a_part_of_another_is_refused_while_the_model_is_built(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="weight is a view of a part of .*, which is in pages; clone the values"),
        offload.deferred_init(config(tmp_path)) as store,
    ):
        model = nn.Sequential(nn.Linear(8, 256), nn.Linear(8, 128))
        store.flush()
        model[1].weight = nn.Parameter(model[0].weight.data[:128])
        nn.Sequential(model)


def test_what_leaves_a_view_of_a_weight_behind_is_refused_with_its_name(tmp_path: Path) -> None:
    with offload.deferred_init(config(tmp_path)) as store:
        model = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE))
        store.flush()
        nn.utils.spectral_norm(model[0])
    with pytest.raises(ValueError, match=r"a view of 0\.\w+, taken while the model was built.*spectral_norm"):
        offload.initialize(model, config(tmp_path), adamw)
    store.close()


@pytest.mark.parametrize("name", ["weight_norm", "parameter"])
def test_once_the_model_is_in_pages_it_is_one_line_and_nothing_has_changed(name: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain = Changed(lambda layer: None)
    torch.manual_seed(7)
    model = Changed(lambda layer: None)
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        weight = model.second.weight
        with pytest.raises(
            RuntimeError, match=r"nn\.Parameter over second\.weight, which is paged: .* before prepare"
        ) as caught:
            parametrizations.weight_norm(model.second) if name == "weight_norm" else nn.Parameter(weight)
        assert "\n" not in str(caught.value)
        optimizer = adamw(plain.parameters())
        train((plain, optimizer), (model, engine.optimizer))
        compare(plain, optimizer, model, engine.optimizer, "in the end")
    assert_closed(engine)
