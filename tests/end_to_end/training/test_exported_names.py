"""An export is what ``model.state_dict()`` is, bit for bit, or an error; what modules keep beside tensors is in
commits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import assert_closed, built, config, engine_of, train
from tiny_models import GPT
from torch import nn

import offload
from offload.cli import main


class Counting(nn.Module):
    """Counts in a plain number, which it has in its state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


def counting() -> GPT:
    """With such a module."""
    model = built()
    model.add_module("counting", Counting())
    return model


def renamed(model: GPT) -> object:
    """A hook that gives a weight another name, as for checkpoints of another version."""
    return model.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({"old": state.pop("head.weight")})
    )


def doubled(model: GPT) -> object:
    """A hook that changes values."""
    return model.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({"head.weight": state["head.weight"] * 2})
    )


def left_out(model: GPT) -> object:
    """A hook that leaves a weight out."""

    def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        del state[f"{prefix}weight"]

    return model.get_submodule("head").register_state_dict_post_hook(leave_out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "old is made by a hook"),
        (doubled, "head.weight is made by a hook"),
        (left_out, "head.weight is left out by a hook"),
        (lambda model: model.add_module("late", Counting()), "late._extra_state is made by .* get_extra_state"),
    ],
)
def test_an_export_that_would_not_be_the_state_dict_is_refused_now_and_from_the_commit(
    change: Callable[[GPT], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine_of(built(), tmp_path) as engine:
        assert isinstance(engine.model, GPT)
        train(engine, 2)
        change(engine.model)
        with pytest.raises(offload.ExportError, match=message) as caught:
            engine.export(tmp_path / "weights")
        assert (
            "\n" not in str(caught.value)
            and not list((tmp_path / "pages").glob("commit*"))
            and not (tmp_path / "weights").exists()
        )
        engine.save()
    assert_closed(engine)
    assert main(["export", str(tmp_path / "pages"), "--to", str(tmp_path / "weights")]) == 1
    assert message.partition(" ")[0] in capsys.readouterr().err and not (tmp_path / "weights").exists()


def test_extra_states_of_modules_are_in_commits(tmp_path: Path) -> None:
    with engine_of(counting(), tmp_path) as engine:
        engine.model.get_submodule("counting").count = 5  # type: ignore[assignment]
        engine.save()
    with engine_of(counting(), tmp_path) as engine:
        assert engine.resume() is not None
        assert engine.model.get_submodule("counting").count == 5
    assert_closed(engine)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_buffers_of_every_kind_are_exported_as_the_state_dict_has_them(dtype: str, tmp_path: Path) -> None:
    model = built()
    model.register_buffer("angles", torch.linspace(0, 1, 5), persistent=False)
    model.register_buffer("mean", torch.linspace(0, 1, 5))
    model.register_buffer("number", torch.tensor(3))
    model.blocks[0].register_buffer("again", model.mean)
    raw = config(tmp_path) | {"model": {"factory": "unused:unused", "dtype": dtype}}
    with offload.initialize(model, raw) as engine:
        wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
        assert model.angles.dtype is torch.float32 and torch.equal(model.angles, torch.linspace(0, 1, 5))
        assert (
            model.mean.dtype is wanted
            and model.number.dtype is torch.int64
            and model.get_buffer("blocks.0.again") is model.mean
        )
        exported, shown = load_file(engine.export(tmp_path / "weights") / "model.safetensors"), model.state_dict()
        assert set(exported) == set(shown) - {"blocks.0.again"} and "angles" not in shown
        assert all(
            exported[name].dtype == shown[name].dtype and torch.equal(exported[name], shown[name]) for name in exported
        )
    assert_closed(engine)
