"""What users do to a model after it was given to an engine: it is as in plain PyTorch, or refused before anything is
written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw
from small_runs import (
    assert_closed,
    assert_equal,
    batches,
    built,
    config,
    engine_of,
    train,
    train_plain,
)  # fmt: skip
from tiny_models import GPT
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import offload

# ---- one parameter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: setattr(w, "data", w.data.half()),
            r"tok\.weight: \.data of torch.float16 on cpu for a paged parameter of torch.float32 on cpu",
        ),
        (lambda w: setattr(w, "data", w.data.to("meta")), r"tok\.weight: \.data of torch.float32 on meta"),
        (lambda w: w.t_(), r"tok\.weight: a paged parameter keeps its shape and its memory"),
        (lambda w: w.unsqueeze_(0), r"tok\.weight: a paged parameter keeps its shape"),
        (lambda w: w.set_(torch.zeros(3)), r"tok\.weight: \.data of shape \(3,\)"),
        (lambda w: w.set_(torch.zeros(3).untyped_storage()), r"tok\.weight: a paged parameter keeps its memory"),
        (lambda w: w.share_memory_(), r"tok\.weight: a paged parameter cannot be shared"),
    ],
)
def test_a_parameter_keeps_its_kind_and_says_so(
    change: Callable[[Tensor], object], message: str, engine: offload.Engine
) -> None:
    with pytest.raises(RuntimeError, match=message), torch.no_grad():
        change(engine.model.get_parameter("tok.weight"))
    plain = built()
    train(engine, 2)
    train_plain(plain, adamw(plain.parameters()), 2)
    assert_equal(engine.model, plain)


def average(model: nn.Module, other: nn.Module) -> None:
    """Towards another model, by one call for all parameters."""
    for part in (model.get_submodule("blocks.0"), model.get_submodule("blocks.1")):
        torch._foreach_lerp_(list(part.parameters()), list(other.get_submodule("blocks.0").parameters()), 0.25)


def by_vector(model: nn.Module, other: nn.Module) -> None:
    """As one vector and back."""
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(vector * 0.5 + parameters_to_vector(other.parameters()), model.parameters())


def decay(model: nn.Module, other: nn.Module) -> None:
    """By hand."""
    for parameter, towards in zip(model.parameters(), other.parameters(), strict=True):
        parameter.mul_(0.9).add_(towards, alpha=0.1)


def through_data(model: nn.Module, other: nn.Module) -> None:
    """By views and by numpy."""
    model.get_parameter("tok.weight").data.copy_(other.get_parameter("tok.weight") * 2)
    model.get_parameter("norm.weight").data[3:5].normal_(generator=torch.Generator().manual_seed(1))
    model.get_parameter("norm.bias").detach().numpy()[:] += 0.5
    model.get_parameter("pos.weight").data.apply_(lambda value: value * 2)
    model.get_parameter("blocks.0.up.weight").type(torch.float64).zero_()


def through_views(model: nn.Module, other: nn.Module) -> None:
    """By views taken before, of the parameters that are written to and of others of the same unit."""
    names = ("tok.weight", "blocks.0.norm1.weight", "blocks.0.up.weight")
    kept = [model.get_parameter(name).detach().clone() for name in names]
    for name, value in zip(names, kept, strict=True):
        model.get_parameter(name).detach().mul_(0.9)
        model.get_parameter(name).lerp_(value, 0.25)
        model.get_parameter(name)[:2].zero_()


@pytest.mark.parametrize("edit", [average, by_vector, decay, through_data, through_views])
@pytest.mark.parametrize("steps", [0, 3])
def test_edits_are_those_of_plain_torch(
    edit: Callable[[nn.Module, nn.Module], None], steps: int, tmp_path: Path
) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    torch.manual_seed(8)
    other = GPT()
    raw = config(tmp_path, ram=4 << 20)
    with offload.initialize(built(), raw, adamw) as engine:
        train(engine, steps)
        train_plain(plain, optimizer, steps)
        with torch.no_grad():
            edit(engine.model, other)
            edit(plain, other)
        assert_equal(engine.model, plain)
        train(engine, 3)
        train_plain(plain, optimizer, 3)
        assert_equal(engine.model, plain)
    assert_closed(engine)


# ---- freezing and thawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["auto", "step"])
def test_a_layer_frozen_at_first_trains_once_it_is_thawed_where_the_optimizer_has_it(
    start: str, tmp_path: Path
) -> None:
    def over_all(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, fused=True)

    plain, model = built(), built()
    for one in (plain, model):
        one.blocks[0].requires_grad_(False)
    optimizer = over_all(plain.parameters())
    with offload.initialize(model, config(tmp_path, start=start), over_all) as engine:
        for thawed in (False, True, False, True):
            for one in (plain, model):
                one.blocks[0].requires_grad_(thawed)
            train(engine, 3)
            train_plain(plain, optimizer, 3)
            assert_equal(model, plain)
    assert_closed(engine)


def test_a_layer_that_the_configurations_optimizer_does_not_have_cannot_be_thawed(tmp_path: Path) -> None:
    model = built()
    model.blocks[0].requires_grad_(False)
    with offload.initialize(model, config(tmp_path)) as engine:
        train(engine, 2)
        with pytest.raises(
            RuntimeError,
            match=r"blocks\.0\.norm1\.weight: this parameter was frozen when the optimizer was made .* "
            r"requires_grad_\(True\) before",
        ):
            model.requires_grad_(True)
        assert not model.get_parameter("blocks.0.norm1.weight").requires_grad
        model.head.requires_grad_(False).requires_grad_(True)  # type: ignore[union-attr]
        train(engine, 2)
    assert_closed(engine)


def test_a_layer_that_the_users_optimizer_does_not_have_gets_gradients_and_no_updates(tmp_path: Path) -> None:
    plain, model = built(), built()
    for one in (plain, model):
        one.blocks[0].requires_grad_(False)
    optimizer = adamw(plain.parameters())
    with engine_of(model, tmp_path) as engine:
        for one in (plain, model):
            one.blocks[0].requires_grad_(True)
        train(engine, 2)
        for batch in batches(2):
            plain(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_equal(model, plain)
        expected = plain.get_parameter("blocks.0.up.weight").grad
        found = model.get_parameter("blocks.0.up.weight").grad
        assert expected is not None and found is not None and torch.equal(found, expected)
    assert_closed(engine)


# ---- another engine for the same model ------------------------------------------------------------------------------


def test_a_cell_run_twice_names_the_engine_there_is_and_training_goes_on(tmp_path: Path) -> None:
    plain = built()
    with engine_of(built(), tmp_path) as engine:
        train(engine, 2)
        for raw in (config(tmp_path), config(tmp_path, ram=8 << 20)):
            with pytest.raises(
                ValueError,
                match=r"tok\.weight: this model has an engine already; .*\.engine\), or close\(\) it, "
                "build the model anew",
            ):
                offload.prepare(engine.model, adamw, raw)
        with pytest.raises(offload.RunDirectoryError, match=f"in use by process {os.getpid()}.* this one.*close"):
            offload.prepare(built(), adamw, config(tmp_path))
        train(engine, 2)
        optimizer = adamw(plain.parameters())
        train_plain(plain, optimizer, 2)
        train_plain(plain, optimizer, 2)
        assert_equal(engine.model, plain)
    assert_closed(engine)
    with pytest.raises(
        ValueError,
        match=r"the engine that held this model is closed.*build the model anew, and load a state_dict\(\) .* "
        r"or resume\(\)",
    ):
        offload.prepare(engine.model, adamw, config(tmp_path))


# ---- what cannot be paged -------------------------------------------------------------------------------------------


class Own(nn.Parameter):
    """A parameter with a class of its own."""


def models_that_cannot_be_paged() -> dict[str, tuple[Callable[[], nn.Module], str]]:
    """With what is said of each."""

    def holding(parameter: Callable[[], nn.Parameter]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            part = nn.Linear(4, 4)
            part.register_parameter("odd", parameter())
            return nn.Sequential(nn.Linear(4, 4), part)

        return make

    return {
        "float64": (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double()),
            r"1\.weight is torch.float64, but .*model.float\(\)",
        ),
        "fp8": (
            holding(lambda: nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn), requires_grad=False)),
            r"1\.odd is torch.float8_e4m3fn, but",
        ),
        "transposed": (
            holding(lambda: nn.Parameter(torch.zeros(3, 4).t())),
            r"1\.odd of shape \(4, 3\) has strides \(1, 4\).*contiguous\(\)",
        ),
        "sparse": (
            holding(lambda: nn.Parameter(torch.zeros(3, 4).to_sparse())),
            r"1\.odd is sparse_coo, which pages cannot hold",
        ),
        "subclass": (holding(lambda: Own(torch.zeros(3))), r"1\.odd is of the class Own"),
    }


@pytest.mark.parametrize("name", models_that_cannot_be_paged())
def test_what_pages_cannot_hold_is_refused_and_the_model_left_as_it_was(name: str, tmp_path: Path) -> None:
    make, message = models_that_cannot_be_paged()[name]
    model = make()
    before = dict(model.named_parameters())
    for start in (offload.initialize, lambda model, raw: offload.prepare(model, adamw, raw)):
        with pytest.raises(ValueError, match=message) as caught:
            start(model, config(tmp_path))
        assert "\n" not in str(caught.value)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(
        parameter is before[key] and not isinstance(parameter, offload.PagedParameter)
        for key, parameter in model.named_parameters()
    )
    with pytest.raises(ValueError, match=message.replace("1\\.", ".*")), offload.deferred_init(config(tmp_path)):
        offload.initialize(nn.Sequential(make()), config(tmp_path))
