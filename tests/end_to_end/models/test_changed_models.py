"""What users do to a model after it was given to an engine: it is as in plain PyTorch, or refused before anything is
written."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw
from safetensors.torch import load_file
from small_runs import (
    assert_closed,
    assert_equal,
    assert_untouched,
    batches,
    built,
    config,
    engine_of,
    train,
    train_plain,
)  # fmt: skip
from tiny_models import GPT
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters

import offload
from offload.modules.structure import Structure


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[offload.Engine]:
    """A running engine; afterwards all is consistent and everything is given back."""
    with engine_of(built(), tmp_path) as engine:
        yield engine
    assert_closed(engine)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last write of every file of a run."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# ---- conversions ---------------------------------------------------------------------------------------------------


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


# ---- other parameters ----------------------------------------------------------------------------------------------


def assigned(model: GPT) -> None:
    """All at once."""
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)


CHANGES: dict[str, tuple[Callable[[GPT], object], str]] = {
    "layer replaced": (
        lambda m: setattr(m, "head", nn.Linear(128, 7)),
        r"head\.weight: this parameter was replaced by another one, of shape \(7, 128\)",
    ),
    "parameter replaced": (
        lambda m: setattr(m.norm, "bias", nn.Parameter(torch.ones(128))),
        r"norm\.bias: this parameter was replaced",
    ),
    "registered": (
        lambda m: m.norm.register_parameter("extra", nn.Parameter(torch.ones(2))),
        r"norm\.extra: this parameter was added to the model",
    ),
    "layer added": (lambda m: m.blocks.append(nn.Linear(2, 2)), r"blocks\.2\.weight: this parameter was added"),
    "deleted": (lambda m: delattr(m, "head"), r"head\.weight: this parameter was removed"),
    "none": (lambda m: setattr(m.norm, "bias", None), r"norm\.bias: this parameter was removed"),
    "assigned": (assigned, r"tok\.weight: this parameter was replaced"),
    "tied": (lambda m: setattr(m.head, "weight", m.tok.weight), r"head\.weight: this parameter was removed"),
    "swapped": (
        lambda m: torch.utils.swap_tensors(m.tok.weight, nn.Parameter(torch.ones(128, 128))),
        r"tok\.weight: this parameter was swapped",
    ),
    "in the dict": (
        lambda m: m.norm._parameters.update(bias=nn.Parameter(torch.ones(128))),
        r"norm\.bias: this parameter was replaced",
    ),
}


@pytest.mark.parametrize("at", ["step", "save", "export", "resume"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_model_with_other_parameters_is_refused_before_a_byte_is_written(name: str, at: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    with engine_of(built(), tmp_path, start="step") as engine:
        model = engine.model
        assert isinstance(model, GPT)
        train(engine, 2)
        engine.save()
        if at == "step":
            engine.backward(engine(*batches(1)[0]))
        engine.drain()
        change(model)
        engine.drain()
        before = files(tmp_path)
        uses: dict[str, Callable[[], object]] = {
            "step": engine.step,
            "save": engine.save,
            "export": lambda: engine.export(tmp_path / "weights"),
            "resume": engine.resume,
        }
        with pytest.raises(RuntimeError, match=message) as caught:
            uses[at]()
        assert "\n" not in str(caught.value) and "close this engine" in str(caught.value)
        assert files(tmp_path) == before and not (tmp_path / "weights").exists()


@pytest.mark.parametrize("name", ["parameter replaced", "registered", "tied"])
def test_no_update_is_made_in_the_backward_pass_of_a_model_with_other_parameters(
    name: str, engine: offload.Engine
) -> None:
    change, message = CHANGES[name]
    assert isinstance(engine.model, GPT)
    train(engine, 3)
    before = engine.model.blocks.state_dict()
    change(engine.model)
    loss = engine(*batches(1)[0])
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
    assert all(torch.equal(value, before[key]) for key, value in engine.model.blocks.state_dict().items())


def test_modules_without_parameters_and_buffers_come_and_go_freely_and_the_export_has_them(tmp_path: Path) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    with engine_of(built(), tmp_path) as engine:
        for step, model in enumerate((engine.model, plain) * 2):
            assert isinstance(model, GPT)
            model.blocks[1].register_buffer("count", torch.tensor(step // 2))
            model.norm.register_buffer("shift", torch.full((3,), 2.0 + step // 2))
            model.add_module("dropout", nn.Dropout())
            if step % 2:
                train(engine, 2)
                train_plain(plain, optimizer, 2)
        folder = engine.export(tmp_path / "weights")
        exported, expected = load_file(folder / "model.safetensors"), plain.state_dict()
        assert set(exported) == set(expected) == set(engine.model.state_dict())
        assert all(torch.equal(exported[name], value) for name, value in expected.items())
    assert_closed(engine)


def wrapped(model: GPT) -> None:
    """A block in a list of its own, the last layer moved."""
    model.blocks[0] = nn.Sequential(model.blocks[0])
    model.out, model.head = model.head, nn.Identity()
    model.head = model._modules.pop("out")


def pruned(model: GPT) -> None:
    """A weight with a mask."""
    prune.l1_unstructured(model.blocks[1].get_submodule("up"), "weight", 0.5)


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized(model: GPT) -> None:
    """A weight that is computed."""
    parametrize.register_parametrization(model.blocks[1].get_submodule("up"), "weight", Twice())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (wrapped, "blocks.0.0.up.weight"),
        (pruned, "blocks.1.up.weight_orig"),
        (parametrized, "blocks.1.up.parametrizations.weight.original"),
    ],
)
def test_parameters_under_other_names_are_followed(change: Callable[[GPT], None], name: str, tmp_path: Path) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    with engine_of(built(), tmp_path) as engine:
        for model in (engine.model, plain):
            assert isinstance(model, GPT)
            change(model)
        train(engine, 3)
        train_plain(plain, optimizer, 3)
        assert_equal(engine.model, plain)
        exported = load_file(engine.export(tmp_path / "weights") / "model.safetensors")
        assert name in exported and set(exported) == set(plain.state_dict())
        assert all(torch.equal(exported[key], value) for key, value in plain.state_dict().items())
        train(engine, 1)
        assert engine.resume() is not None
        assert_equal(engine.model, plain)
    assert_closed(engine)


def test_a_check_of_the_structure_asks_no_tensor_for_anything(engine: offload.Engine) -> None:
    structure = Structure(engine.model)

    class NoCalls(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{func} was called")

    with NoCalls():
        structure.check()


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


# ---- optimizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda model: torch.optim.AdamW(model.parameters(), fused=True), "the optimizer is a AdamW; give a factory"),
        (
            lambda model: lambda parameters: None,
            "the optimizer's factory returns a NoneType, not a torch.optim.Optimizer",
        ),
        (
            lambda model: lambda: adamw(model.parameters()),
            "factory cannot be called with the model's parameters: too many positional arguments; give a",
        ),
        (lambda model: torch.optim.AdamW, "AdamW: fused=None rounds otherwise"),
        (
            lambda model: lambda p: torch.optim.AdamW(built().parameters(), fused=True),
            r"the optimizer has a parameter of shape \(128, 128\) that is not the model's",
        ),
        (lambda model: lambda p: torch.optim.LBFGS(p), "LBFGS does not run on pages"),
    ],
)
def test_an_optimizer_that_is_not_what_runs_on_pages_is_refused(
    optimizer: Callable[[nn.Module], Any], message: str, tmp_path: Path
) -> None:
    model = built()
    with pytest.raises(ValueError, match=message) as caught:
        offload.prepare(model, optimizer(model), config(tmp_path))
    assert "\n" not in str(caught.value)
    assert_untouched(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.param_groups[0].update(amsgrad=True), "AdamW: amsgrad=True is not supported"),
        (lambda o: o.param_groups[1].update(lr=torch.tensor(0.1)), "AdamW: a tensor lr is not supported"),
        (
            lambda o: o.param_groups[0]["params"].append(nn.Parameter(torch.zeros(2))),
            "parameters of a paged optimizer cannot be added",
        ),
        (lambda o: o.param_groups.pop(), "parameters of a paged optimizer cannot be added or taken out"),
    ],
)
def test_groups_that_become_what_does_not_run_on_pages_are_refused_at_the_step(
    change: Callable[[Any], object], message: str, engine: offload.Engine
) -> None:
    train(engine, 1)
    engine.backward(engine(*batches(1)[0]))
    change(engine.optimizer)
    with pytest.raises(ValueError, match=message):
        engine.optimizer.step()


def test_states_of_an_optimizer_that_is_not_fused_are_refused_whole(engine: offload.Engine) -> None:
    plain = built()
    optimizer = torch.optim.AdamW(adamw(plain.parameters()).param_groups, fused=False)
    train_plain(plain, optimizer, 1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["fused"] = False
    with pytest.raises(ValueError, match="AdamW: fused=False rounds otherwise"):
        engine.optimizer.load_state_dict(saved)
    assert not engine.optimizer.state_dict()["state"] and engine.optimizer.param_groups[0]["fused"]


def test_an_engine_that_fails_after_it_has_rounded_the_model_says_so(tmp_path: Path) -> None:
    raw = config(tmp_path, mode="lock-free") | {"model": {"factory": "unused:unused", "dtype": "bf16"}}
    model = built()
    with pytest.raises(offload.BudgetError, match="lock-free") as caught:
        offload.initialize(model, raw)
    assert caught.value.__notes__ == [
        "the model's parameters have been rounded to torch.bfloat16, as model.dtype asks for; build it anew"
    ]
    model = built()
    with pytest.raises(offload.BudgetError, match="lock-free") as caught:
        offload.initialize(model, config(tmp_path, mode="lock-free"))
    assert not hasattr(caught.value, "__notes__")
    assert_untouched(model)


def test_a_commit_that_does_not_say_fused_goes_on(tmp_path: Path) -> None:
    with offload.initialize(built(), config(tmp_path)) as engine:
        train(engine, 2)
        for group in engine.optimizer.param_groups:
            group["fused"] = None
        engine.save()
        expected = engine.model.state_dict()
    with offload.initialize(built(), config(tmp_path)) as engine:
        resumed = engine.resume()
        assert resumed is not None and not resumed.changed
        assert all(torch.equal(value, expected[name]) for name, value in engine.model.state_dict().items())
        assert engine.optimizer.param_groups[0]["fused"] is True
        train(engine, 1)
    assert_closed(engine)


@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps])
def test_an_optimizer_over_pages_is_not_copied(copying: Callable[[Any], object], engine: offload.Engine) -> None:
    with pytest.raises(
        RuntimeError, match=r"an optimizer over pages cannot be copied or pickled; use optimizer.state_dict\(\)"
    ):
        copying(engine.optimizer)


def test_hooks_of_the_optimizer_and_batch_norms_of_an_average_are_those_of_plain_torch(tmp_path: Path) -> None:
    called: list[str] = []
    plain, model = (nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    data = [torch.randn(8, 16) for _ in range(3)]
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        engine.optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        engine.optimizer.register_step_post_hook(lambda *_: called.append("after"))
        optimizer = adamw(plain.parameters())
        engine.backward(model(data[0]).square().mean())
        engine.step()
        plain(data[0]).square().mean().backward()
        optimizer.step()
        for one in (model, plain):
            torch.optim.swa_utils.update_bn(data, one)
        assert called == ["before", "after"]
        assert_equal(model, plain)
    assert_closed(engine)
