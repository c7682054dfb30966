"""A model whose parameters are no longer those that were paged is refused before a byte is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import each_value
from parity import adamw
from safetensors.torch import load_file
from small_runs import (
    assert_closed,
    assert_equal,
    batches,
    built,
    engine_of,
    train,
    train_plain,
)  # fmt: skip
from tiny_models import GPT
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import offload
from offload.modules.structure import Structure
from pagemem.errors import CommitError


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last write of every file of a run."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


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


@each_value(name=tuple(CHANGES), at=["step", "save", "export", "resume"])
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


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.complex128])
def test_a_buffer_that_could_not_be_read_back_is_not_committed(dtype: torch.dtype, tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        engine.model.register_buffer("odd", torch.ones(4).to(dtype))
        with pytest.raises(CommitError, match=f"odd has {dtype}, which cannot be committed"):
            engine.save()
        engine.model.register_buffer("odd", torch.ones(4).to(dtype), persistent=False)
        engine.save()
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
