"""transformers' loader reads through us, or not at all: versions that do it otherwise, and other ways to load, are
refused in one line before a checkpoint is in RAM."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import config
from torch import nn
from transformers_models import built, library

import offload


def loader() -> Any:
    library()
    return importlib.import_module("transformers.modeling_utils")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    modeling = loader()
    theirs = dict(vars(modeling))
    built("Llama").save_pretrained(tmp_path / "weights")  # type: ignore[operator]
    yield tmp_path / "weights"
    assert all(modeling.__dict__[name] is theirs[name] for name in theirs if name in modeling.__dict__)
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    assert not [*tmp_path.rglob("*.lock")]


def ours(folder: Path, settings: dict[str, Any]) -> nn.Module:
    return offload.from_pretrained(folder, settings)


def theirs(folder: Path, settings: dict[str, Any], **options: Any) -> nn.Module:
    with offload.deferred_init(settings):
        return library().AutoModelForCausalLM.from_pretrained(folder, **options)  # type: ignore[no-any-return]


Load = Callable[[Path, dict[str, Any]], nn.Module]


@pytest.mark.parametrize("load", [ours, theirs])
@pytest.mark.parametrize("name", ["safe_open", "load_state_dict", "WeightTransform", "materialize_tensors"])
def test_a_version_without_a_name_is_refused_before_anything_is_read(
    name: str, load: Load, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library(), "__version__", "5.99.0")
    conversions = importlib.import_module("transformers.core_model_loading")
    owner = {"WeightTransform": conversions, "materialize_tensors": conversions.WeightTransform}.get(name, loader())
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=rf"^transformers 5\.99\.0 has no transformers\..*{name}") as caught:
        load(folder, config(tmp_path))
    assert "pip install 'transformers<=5." in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [ours, theirs])
def test_a_version_that_opens_files_by_another_name_is_refused(
    load: Load, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    its_own = loader().PreTrainedModel._load_pretrained_model

    def otherwise(model: Any, state_dict: Any, checkpoint_files: Any, *arguments: Any, **options: Any) -> Any:
        return its_own(model, load_file(checkpoint_files[0]), None, *arguments, **options)

    monkeypatch.setattr(loader().PreTrainedModel, "_load_pretrained_model", staticmethod(otherwise))
    monkeypatch.setattr(library(), "__version__", "5.99.0")
    with pytest.raises(offload.StorageError, match=r"transformers 5\.99\.0 gives .* values without opening") as caught:
        load(folder, config(tmp_path))
    assert "\n" not in str(caught.value)


def test_each_load_of_a_block_is_looked_at(folder: Path, tmp_path: Path) -> None:
    values = load_file(folder / "model.safetensors")
    model_class, settings = library().LlamaForCausalLM, library().LlamaConfig.from_pretrained(folder)
    with pytest.raises(offload.StorageError, match="without state_dict"), offload.deferred_init(config(tmp_path)):
        model_class.from_pretrained(folder)
        model_class.from_pretrained(None, config=settings, state_dict=values)


def test_pickles_are_not_read(folder: Path, tmp_path: Path) -> None:
    torch.save(built("Llama").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(offload.StorageError, match=r"pytorch_model\.bin .*runs the code in it.*save_pretrained"):
        theirs(folder, config(tmp_path))


def test_files_are_not_read_whole(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(offload.StorageError, match="whole safetensors files into RAM.*leave disable_mmap out"):
        theirs(folder, config(tmp_path), disable_mmap=True)


def test_what_users_set_in_a_block_is_theirs(folder: Path, tmp_path: Path) -> None:
    with offload.deferred_init(config(tmp_path)) as store:
        model = library().AutoModelForCausalLM.from_pretrained(folder)
        with torch.device("meta"):
            model.more = nn.Sequential(nn.Linear(4, 4))
        model.more[0].weight = nn.Parameter(torch.ones(4, 4))
        model.more[0].bias = nn.Parameter(torch.ones(4))
    assert isinstance(model.more[0].weight, offload.PagedParameter)
    store.close()


def test_other_threads_load_and_build_as_ever(folder: Path, tmp_path: Path) -> None:
    made: list[nn.Module] = []
    errors: list[BaseException] = []

    def other() -> None:
        try:
            made.append(library().AutoModelForCausalLM.from_pretrained(folder))
            made.append(nn.Sequential(nn.Linear(4, 4)))
        except BaseException as error:  # for the test to see
            errors.append(error)

    class Slow(nn.Module):
        """Another thread works while it is built."""

        def __init__(self) -> None:
            super().__init__()
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    with offload.deferred_init(config(tmp_path)) as store:
        model = library().AutoModelForCausalLM.from_pretrained(folder)
        model.slow = Slow()
    assert not errors and len(made) == 2
    for parameter in [parameter for module in made for parameter in module.parameters()]:
        assert type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
    expected = dict(built("Llama").named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in made[0].named_parameters())
    assert all(isinstance(parameter, offload.PagedParameter) for parameter in model.parameters())
    store.close()
