"""offload.from_pretrained: files are read where they lie, and everything that does not fit is said."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import assert_closed, config
from torch import Tensor, nn
from transformers_models import built, library, text

import offload
from offload.sources.transformers_files import OpenedFile
from offload.weights import pretrained
from offload.weights.matching import Match


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3, fused=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    library()
    built("Llama").save_pretrained(tmp_path / "weights")  # type: ignore[operator]
    return tmp_path / "weights"


def change(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loading_moves_no_bytes_and_training_writes_none_of_a_frozen_base(
    dtype: torch.dtype | None, folder: Path, tmp_path: Path
) -> None:
    model = offload.from_pretrained(folder, config(tmp_path), dtype=dtype)
    model.requires_grad_(False)
    model.get_submodule("model.norm").requires_grad_(True)
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        # Rounded values of what is trained are read, as fp32 masters of them cannot be read from fp32 files.
        loaded = engine.stats()
        assert (loaded.bytes_read, loaded.bytes_written) == ((0, 0) if dtype is None else (64 * 4, 4096))
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            engine.backward(engine(**text(generator)).loss)
            engine.step()
        engine.debug.driver.evict_all()
        written = engine.stats().bytes_written
    # The norm and its states, in whole I/O blocks; in 16 bits what shrinks on the way is written once.
    assert written <= 3 * 4 * (64 << 10) + (
        0 if dtype is None else 2 * sum(p.numel() for p in built("Llama").parameters())
    )
    assert_closed(engine)


def test_from_pretrained_of_transformers_inside_deferred_init(folder: Path, tmp_path: Path) -> None:
    with offload.deferred_init(config(tmp_path)):
        model = library().AutoModelForCausalLM.from_pretrained(folder)
    assert all(isinstance(parameter, offload.PagedParameter) for parameter in model.parameters())
    expected = dict(built("Llama").named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    offload.initialize(model, config(tmp_path), adamw).close()
    modeling = __import__("transformers.modeling_utils", fromlist=["safe_open"])
    assert modeling.safe_open is __import__("safetensors").safe_open
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_classes_and_options(folder: Path, tmp_path: Path) -> None:
    for source in (library().LlamaForCausalLM, library().AutoModelForCausalLM):
        model = offload.from_pretrained(source, config(tmp_path), folder=folder, attn_implementation="eager")
        assert type(model).__name__ == "LlamaForCausalLM"
        assert model.config._attn_implementation == "eager"  # type: ignore[union-attr]
        offload.initialize(model, config(tmp_path), adamw).close()


def test_what_does_not_fit_is_one_error(folder: Path, tmp_path: Path) -> None:
    change(folder, model__norm__weight=None, more=torch.ones(2), lm_head__weight=torch.ones(3, 3))
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM") as caught:
        offload.from_pretrained(folder, config(tmp_path))
    assert str(caught.value).partition("; ")[2] == (
        "misfits: lm_head.weight is [3, 3] in the file and [128, 64] in the model; missing: model.norm.weight; "
        "surplus: more"
    )
    assert not [*(tmp_path / "pages").glob("*.lock")]


def test_not_strict_is_as_transformers_has_it(folder: Path, tmp_path: Path) -> None:
    change(folder, model__norm__weight=None, lm_head__weight=None, more=torch.ones(2))
    torch.manual_seed(5)
    expected = library().AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    model = offload.from_pretrained(folder, config(tmp_path), strict=False)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    offload.initialize(model, config(tmp_path), adamw).close()


def test_pages_cannot_hold_float64(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.norm\.weight is torch\.float64") as caught:
        offload.from_pretrained(folder, config(tmp_path), dtype=torch.float64)
    assert "lm_head.weight is torch.float64" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "names no architecture"),
        ({"architectures": ["NoSuchModel"]}, "'NoSuchModel', which transformers"),
        ({"architectures": ["__version__"]}, "'__version__', which transformers"),
        ({"architectures": [3]}, "names no architecture"),
    ],
)
def test_configurations_that_name_no_class(content: Any, message: str, folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        offload.from_pretrained(folder, config(tmp_path))


def test_wrong_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no device_map"):
        offload.from_pretrained(folder, config(tmp_path), device_map="auto")
    with pytest.raises(ValueError, match=r"Linear is no model class of transformers.*load_weights"):
        offload.from_pretrained(nn.Linear, config(tmp_path), folder=folder)
    with pytest.raises(ValueError, match="give folder"):
        offload.from_pretrained(library().LlamaForCausalLM, config(tmp_path))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(offload.StorageError, match="runs the code in it"):
        offload.from_pretrained(folder, config(tmp_path))
    with pytest.raises(offload.StorageError, match=r"gpt2 is not a folder; .*snapshot_download"):
        offload.from_pretrained("gpt2", config(tmp_path))


def test_a_file_that_is_changed_is_an_error_and_never_other_values(folder: Path, tmp_path: Path) -> None:
    model = offload.from_pretrained(folder, config(tmp_path))
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(bytes(4))
        with pytest.raises(offload.StorageError, match=r"model\.safetensors was changed since parameters were taken"):
            engine(**text(torch.Generator()))


@pytest.mark.parametrize("place", ["config.json", "sub/config.json"])
def test_a_subfolder(place: str, folder: Path, tmp_path: Path) -> None:
    """Also with another model beside it."""
    (tmp_path / "more").mkdir()
    folder.rename(tmp_path / "more" / "sub")
    if place == "config.json":
        built("GPT-2").save_pretrained(tmp_path / "more")  # type: ignore[operator]
    model = offload.from_pretrained(tmp_path / "more", config(tmp_path), subfolder="sub")
    expected = dict(built("Llama").named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    offload.initialize(model, config(tmp_path), adamw).close()


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_files_of_a_variant(shard: str, folder: Path, tmp_path: Path) -> None:
    built("Llama").save_pretrained(tmp_path / "fp16", variant="fp16", max_shard_size=shard)  # type: ignore[operator]
    model = offload.from_pretrained(tmp_path / "fp16", config(tmp_path), variant="fp16")
    expected = dict(built("Llama").named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    offload.initialize(model, config(tmp_path), adamw).close()
    with pytest.raises(offload.StorageError, match=r"has neither model\.fp16\.safetensors nor"):
        offload.from_pretrained(folder, config(tmp_path), variant="fp16")
    index = tmp_path / "fp16" / "model.safetensors.index.fp16.json"
    if index.exists():
        index.write_text(index.read_text().replace('"model.fp16-00001', '"../model.fp16-00001'))
        with pytest.raises(offload.StorageError, match="weight_map"):
            offload.from_pretrained(tmp_path / "fp16", config(tmp_path), variant="fp16")


def test_a_loaded_model_is_discarded_as_the_error_says(folder: Path, tmp_path: Path) -> None:
    model = offload.from_pretrained(folder, config(tmp_path))
    with pytest.raises(offload.RunDirectoryError, match=r"offload\.initialize\(model, config\)\.close\(\)"):
        offload.from_pretrained(folder, config(tmp_path))
    offload.initialize(model, config(tmp_path)).close()
    offload.initialize(offload.from_pretrained(folder, config(tmp_path)), config(tmp_path)).close()


def test_embeddings_are_resized_before(folder: Path, tmp_path: Path) -> None:
    model = offload.from_pretrained(folder, config(tmp_path))
    with pytest.raises(RuntimeError, match="resize it in plain PyTorch.*save_pretrained to a new folder"):
        model.resize_token_embeddings(150)  # type: ignore[operator]
    expected = dict(built("Llama").named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    offload.initialize(model, config(tmp_path), adamw).close()


def test_ctrl_c_ends_a_load_at_once_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    get_slice = OpenedFile.get_slice

    def interrupted(file: OpenedFile, name: str) -> Any:
        asked.append(name)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return get_slice(file, name)

    monkeypatch.setattr(OpenedFile, "get_slice", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offload.from_pretrained(folder, config(tmp_path))
    assert len(asked) == 3
    assert not [*(tmp_path / "pages").glob("*.lock")]
    offload.initialize(offload.from_pretrained(folder, config(tmp_path)), config(tmp_path), adamw).close()


def test_ctrl_c_at_the_end_of_a_load_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return Match()

    monkeypatch.setattr(pretrained, "_found", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offload.from_pretrained(folder, config(tmp_path))
    assert not [*(tmp_path / "pages").glob("*.lock")]


@pytest.mark.parametrize("equal", [True, False])
def test_both_names_of_tied_weights_in_the_file(equal: bool, tmp_path: Path) -> None:
    """transformers compares them, and ties those that are equal."""
    library()
    folder = tmp_path / "weights"
    built("Llama tied").save_pretrained(folder)  # type: ignore[operator]
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=embedding.clone() if equal else embedding + 1)
    expected = library().AutoModelForCausalLM.from_pretrained(folder)
    model = offload.from_pretrained(folder, config(tmp_path))
    names = [name for name, _ in expected.named_parameters()]
    assert ("lm_head.weight" in names) is not equal
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(parameter, expected.get_parameter(name)) for name, parameter in model.named_parameters())
    offload.initialize(model, config(tmp_path), adamw).close()


def test_a_commit_goes_on_from_the_same_files_and_is_exported_with_them(folder: Path, tmp_path: Path) -> None:
    def begun() -> offload.Engine:
        model = offload.from_pretrained(folder, config(tmp_path))
        model.requires_grad_(False)
        model.get_submodule("model.layers.1").requires_grad_(True)
        return offload.initialize(model, config(tmp_path), adamw)

    def trained(engine: offload.Engine, seed: int) -> None:
        engine.backward(engine(**text(torch.Generator().manual_seed(seed))).loss)
        engine.step()

    with begun() as engine:
        trained(engine, 1)
        engine.save()
        trained(engine, 2)
        expected = engine.model.state_dict()
    with begun() as engine:
        resumed = engine.resume()
        assert resumed is not None and resumed.step == 1
        trained(engine, 2)
        engine.export(tmp_path / "out")
        found = engine.model.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(expected[name], value) for name, value in exported.items())


def test_a_commit_does_not_go_on_from_a_file_that_differs_in_one_value(folder: Path, tmp_path: Path) -> None:
    def begun() -> offload.Engine:
        model = offload.from_pretrained(folder, config(tmp_path))
        model.requires_grad_(False)
        model.get_submodule("model.norm").requires_grad_(True)
        return offload.initialize(model, config(tmp_path), adamw)

    with begun() as engine:
        engine.save()
    values = load_file(folder / "model.safetensors")
    values["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    change(folder, **{name.replace(".", "__"): value for name, value in values.items()})
    with begun() as engine, pytest.raises(offload.CommitError, match="there is another file now") as caught:
        engine.resume()
    assert "\n" not in str(caught.value)
