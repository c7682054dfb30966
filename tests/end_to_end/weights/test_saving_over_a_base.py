"""A checkpoint that parameters are read from is never saved over: neither by export nor by save_pretrained."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import config
from torch import nn
from transformers_models import built, library, text

import offload


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3, fused=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def train(engine: offload.Engine) -> None:
    engine.backward(engine(**text(torch.Generator().manual_seed(3))).loss)
    engine.step()


@pytest.fixture(params=["one file", "shards", "links"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    library()
    shard = {"max_shard_size": "100KB"} if request.param == "shards" else {}
    built("Llama").save_pretrained(tmp_path / "weights", **shard)  # type: ignore[operator]
    if request.param != "links":
        return tmp_path / "weights"
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "weights").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    return tmp_path / "snapshot"


@pytest.fixture
def engine(folder: Path, tmp_path: Path) -> Iterator[offload.Engine]:
    """Over a frozen base, but for its norm."""
    model = offload.from_pretrained(folder, config(tmp_path))
    model.requires_grad_(False)
    model.get_submodule("model.norm").requires_grad_(True)
    with offload.initialize(model, config(tmp_path), adamw) as made:
        train(made)
        yield made


def test_the_folder_of_the_base_is_refused_and_stays_as_it_is(
    engine: offload.Engine, folder: Path, tmp_path: Path
) -> None:
    before, model = content(folder), engine.model
    for save in (model.save_pretrained, model.model.save_pretrained):  # type: ignore[union-attr]
        for options in ({}, {"max_shard_size": "100KB"}):
            with pytest.raises(offload.StorageError, match="still lie in .*: save to another folder") as caught:
                save(folder, **options)  # type: ignore[operator]
            assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(offload.StorageError, match="still lie in"):
        model.save_pretrained(save_directory=str(folder))  # type: ignore[operator]
    with pytest.raises(offload.OffloadError, match="is not empty"):
        engine.export(folder)
    assert content(folder) == before
    engine.save()
    model.save_pretrained(tmp_path / "new")  # type: ignore[operator]
    saved, values = load_file(tmp_path / "new" / "model.safetensors"), model.state_dict()
    assert saved.keys() == values.keys() and all(torch.equal(values[name], value) for name, value in saved.items())


def test_what_has_its_own_parameters_may_be_saved_there(folder: Path, tmp_path: Path) -> None:
    """A model that was trained as a whole, and, once it is closed, any."""
    model = offload.from_pretrained(folder, config(tmp_path))
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        with pytest.raises(offload.StorageError, match="still lie in"):
            model.save_pretrained(folder)  # type: ignore[operator]
        train(engine)
        model.save_pretrained(folder)  # type: ignore[operator]
        values = model.state_dict()
        train(engine)
        engine.save()
    assert "save_pretrained" not in vars(model)
    loaded = library().AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(values[name], value) for name, value in loaded.items())


def test_copies_save_as_ever(engine: offload.Engine, folder: Path, tmp_path: Path) -> None:
    made = copy.deepcopy(engine.model)
    made.save_pretrained(tmp_path / "copy")  # type: ignore[operator]
    assert type(next(made.parameters())) is nn.Parameter and load_file(tmp_path / "copy" / "model.safetensors")
    assert "save_pretrained" not in vars(made) or "Hook" not in type(made.save_pretrained).__name__
    pickle.dumps(made.config)


def test_ctrl_c_does_not_wait_for_the_end_of_saving(
    engine: offload.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on = []

    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        went_on.append(True)

    monkeypatch.setattr(type(engine.model.config), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.model.save_pretrained(tmp_path / "new")  # type: ignore[operator]
    assert not went_on
