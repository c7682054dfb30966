"""Parameters without dimensions or elements, of integers or truth values, and ones that cannot be paged at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw, compare
from safetensors.torch import load_file
from small_runs import assert_closed, assert_equal, config
from torch import Tensor, nn

import offload


class Odd(nn.Module):
    """A scale without dimensions (CLIP's), an empty parameter, one with a single element, and frozen numbers of other
    kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 256), nn.Linear(256, 64)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        self.nothing, self.one = nn.Parameter(torch.empty(0, 8)), nn.Parameter(torch.ones(1))
        self.table = nn.Parameter(torch.arange(64).flip(0), requires_grad=False)
        self.mask = nn.Parameter(torch.arange(64) % 3 != 0, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) * self.logit_scale.exp()
        hidden = self.last(hidden)[:, self.table] * self.mask
        return (
            torch.cat([hidden, self.nothing.expand(0, 8).new_zeros(len(x), 1)], 1) * self.one
        ).square().mean() + self.nothing.sum()


class OnlyScale(nn.Module):
    """Nothing but a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).square().mean()


class OnlyEmpty(OnlyScale):
    """A parameter without dimensions, and a module with an empty one alone in a unit, as what follows fills a page."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Module()
        self.empty.nothing = nn.Parameter(torch.empty(0))
        self.large = nn.Linear(64, 1024)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x * self.scale).square().mean() + self.empty.nothing.sum()


def of_all(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Everything in one list, frozen and not, as most training loops have it."""
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "at the step": {"start": "step"},
    "clipped": {"clip_norm": 0.1},
    "lock-free": {"mode": "lock-free", "max_staleness": 0},
    "lock-free, clipped": {"mode": "lock-free", "max_staleness": 0, "clip_norm": 0.1},
    "emulated": {},
    "emulated, clipped": {"clip_norm": 0.1},
}


def settings_of(name: str, folder: Path, **update: Any) -> dict[str, Any]:
    made = config(folder, ram=2 << 20, **SETTINGS[name], **update)
    if name.startswith("emulated"):
        made["device"], made["memory"]["device"] = "cpu-emulated", 512 << 10
    return made


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("build", [Odd, OnlyScale, OnlyEmpty])
def test_training_has_plain_bits_whatever_the_parameters_are(
    build: Callable[[], nn.Module], name: str, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    plain = build()
    clip_norm = SETTINGS[name].get("clip_norm")
    model, optimizer = offload.prepare(copy.deepcopy(plain), of_all, settings_of(name, tmp_path))
    plain_optimizer = of_all(plain.parameters())
    for step in range(5):
        x = torch.randn(8, 64)
        for each, its in ((plain, plain_optimizer), (model, optimizer)):
            loss = each(x)
            loss.backward()
            if clip_norm is not None and each is plain:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
            its.step()
            its.zero_grad()
        compare(plain, plain_optimizer, model, optimizer, f"step {step}")
    optimizer.load_state_dict(plain_optimizer.state_dict())
    compare(plain, plain_optimizer, model, optimizer, "loaded")
    optimizer.engine.close()
    assert_closed(optimizer.engine)


@pytest.mark.parametrize("name", ["exact", "lock-free", "emulated"])
def test_commits_and_exports_have_all_of_them(name: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain = Odd()
    x = torch.randn(8, 64)
    with offload.initialize(copy.deepcopy(plain), settings_of(name, tmp_path), of_all) as engine:
        for _ in range(3):
            engine.backward(engine(x))
            engine.step()
        with torch.no_grad():
            engine.model.table.copy_(torch.arange(64))
        engine.save()
        expected, states = engine.model.state_dict(), engine.optimizer.state_dict()
        engine.export(tmp_path / "weights")
    found = load_file(tmp_path / "weights" / "model.safetensors")
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value) and found[key].dtype is value.dtype, key
    with offload.initialize(copy.deepcopy(plain), settings_of(name, tmp_path), of_all) as engine:
        assert engine.resume() is not None
        values = engine.model.state_dict()
        assert all(torch.equal(values[key], value) for key, value in expected.items())
        for number, state in states["state"].items():
            for key, value in state.items():
                assert torch.equal(engine.optimizer.state_dict()["state"][number][key], value)
    assert_closed(engine)


def test_they_may_be_built_out_of_pages(tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain = nn.Sequential(Odd())
    torch.manual_seed(7)
    with offload.deferred_init(config(tmp_path)):
        model = nn.Sequential(Odd())
    with offload.initialize(model, config(tmp_path), of_all) as engine:
        assert_equal(model, plain)
    assert_closed(engine)


def test_after_an_error_a_plain_model_has_them_as_before(tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain, model = Odd(), None
    model = copy.deepcopy(plain)
    with pytest.raises(offload.BudgetError):
        offload.prepare(model, adamw, config(tmp_path, ram=2 * (64 << 10), mode="lock-free"))
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert_equal(model, plain)


# ---- what cannot be paged -------------------------------------------------------------------------------------------


def shared_storage() -> nn.Module:
    """Two parameters over the same memory."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data)
    return model


def shared_with_a_buffer() -> nn.Module:
    """A buffer over a part of a parameter."""
    model = nn.Linear(8, 8)
    model.register_buffer("row", model.weight.detach()[2])
    return model


def on_meta() -> nn.Module:
    """A model without values."""
    with torch.device("meta"):
        return nn.Linear(8, 8)


def buffer_on_meta() -> nn.Module:
    """Buffers without values, too."""
    with torch.device("meta"):
        return nn.BatchNorm1d(8)


def complex_numbers() -> nn.Module:
    """A complex parameter beside others."""
    model = nn.Linear(8, 8)
    model.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "storage": (
        shared_storage,
        r"0\.weight and 1\.weight are different tensors over the same memory, .* tie them as one nn\.Parameter",
    ),
    "buffer": (shared_with_a_buffer, "weight and row are different tensors over the same memory"),
    "meta": (buffer_on_meta, "the buffer running_mean is on meta and has no values, .* build it on the CPU"),
    "complex": (complex_numbers, "phase is torch.complex64, which pages cannot hold"),
    "lazy": (lambda: nn.LazyLinear(4), "weight is not initialised yet .* run the model's forward once"),
    "integers": (lambda: nn.Embedding.from_pretrained(torch.ones(2, 2).int()), "no floating-point parameters to page"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_paged_is_refused_in_one_line_and_left_alone(name: str, tmp_path: Path) -> None:
    build, message = REFUSED[name]
    model = build()
    before = {key: (parameter, type(parameter)) for key, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message) as caught:
        offload.prepare(model, lambda ps: torch.optim.SGD(ps, lr=0.1), config(tmp_path))
    assert "\n" not in str(caught.value)
    assert all(
        parameter is before[key][0] and type(parameter) is before[key][1] for key, parameter in model.named_parameters()
    )


def test_lazy_modules_may_be_built_out_of_pages_and_are_paged_once_they_have_a_shape(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(nn.LazyLinear(32), nn.Tanh(), nn.Linear(32, 4))

    x = torch.randn(3, 16)
    plain = make()
    plain(x)
    with offload.deferred_init(config(tmp_path)):
        model = make()
        model(x)
    with offload.initialize(model, config(tmp_path), of_all) as engine:
        assert all(isinstance(parameter, offload.PagedParameter) for parameter in model.parameters())
        assert_equal(model, plain)
    assert_closed(engine)


def test_modules_on_meta_wait_for_their_values_inside_the_block(tmp_path: Path) -> None:
    with offload.deferred_init(config(tmp_path)):
        model = nn.Sequential(on_meta(), nn.Linear(8, 8))
        model[0].weight = nn.Parameter(torch.ones(model[0].weight.shape))
        model[0].bias = nn.Parameter(torch.zeros(model[0].bias.shape))
    assert all(isinstance(parameter, offload.PagedParameter) for parameter in model.parameters())
    assert model[0].weight.sum() == model[0].weight.numel()
    offload.initialize(model, config(tmp_path), adamw).close()
