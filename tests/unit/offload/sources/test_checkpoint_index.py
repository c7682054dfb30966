"""Folders of checkpoints: one file, shards with an index, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offload.sources.checkpoint_index import INDEX_NAME, WHOLE_NAME, read_checkpoint
from pagemem.errors import StorageError


def shards(folder: Path, weight_map: Any = None) -> Path:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3), "c": torch.ones(1)}, folder / "two.safetensors")
    known = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (folder / INDEX_NAME).write_text(
        json.dumps({"metadata": {"total_size": 24}, "weight_map": known if weight_map is None else weight_map})
    )
    return folder


def test_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / WHOLE_NAME)
    assert [*read_checkpoint(tmp_path).tensors] == ["a"]


def test_shards(tmp_path: Path) -> None:
    found = read_checkpoint(str(shards(tmp_path))).tensors
    assert {name: tensor.file.path.name for name, tensor in found.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
        "c": "two.safetensors",
    }


def test_a_folder_of_links(tmp_path: Path) -> None:
    """As the cache of Hugging Face's hub is."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "1234")
    (tmp_path / "snapshot" / WHOLE_NAME).symlink_to("../blobs/1234")
    found = read_checkpoint(tmp_path / "snapshot").tensors["a"]
    assert torch.equal(found.read(torch.float32), torch.ones(2))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "weight_map"),
        ([], "weight_map"),
        ({"a": 1}, "weight_map.a"),
        ({"a": "../one.safetensors"}, "weight_map.a"),
        ({"a": "/etc/passwd"}, "weight_map.a"),
        ({"a": "one.bin"}, "weight_map.a"),
        ({"a": "three.safetensors"}, "three.safetensors"),
        ({"a": "two.safetensors", "b": "two.safetensors"}, "'a' is in two.safetensors, which lacks it"),
    ],
)
def test_crafted_indices(weight_map: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        read_checkpoint(shards(tmp_path, weight_map))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text("[]")
    with pytest.raises(StorageError, match=r"model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)


def test_pickles_are_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(StorageError, match=r"pytorch_model\.bin .*runs the code in it.*save_pretrained"):
        read_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """transformers would take the last, and readers of the index the one that it names."""
    shards(tmp_path)
    save_file({"a": torch.zeros(2), "b": torch.ones(3), "c": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(StorageError, match=r"has 'a' twice, in one\.safetensors and in two\.safetensors"):
        read_checkpoint(tmp_path)


def test_variants(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.fp16.safetensors")
    assert [*read_checkpoint(tmp_path, "fp16").tensors] == ["a"]
    with pytest.raises(
        StorageError, match=r"neither model\.bf16\.safetensors nor model\.safetensors\.index\.bf16\.json"
    ):
        read_checkpoint(tmp_path, "bf16")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", r"has adapter_config\.json .*: it is an adapter; .*peft\.PeftModel\.from_pretrained"),
        ("weights.gguf", r"has weights\.gguf .*gguf_file='weights\.gguf'\)\.save_pretrained"),
    ],
)
def test_what_else_a_folder_may_be(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(StorageError, match=message) as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"neither model\.safetensors nor"):
        read_checkpoint(tmp_path)
    with pytest.raises(StorageError, match="is not a folder"):
        read_checkpoint(tmp_path / "elsewhere")
