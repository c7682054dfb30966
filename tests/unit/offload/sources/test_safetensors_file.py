"""Headers of safetensors files: what the library writes is found, and a crafted one is refused in a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from offload.sources.safetensors_file import DTYPES, MAX_HEADER_BYTES, read_header
from pagemem.errors import StorageError

ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def written(folder: Path, header: Any, body: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


@pytest.mark.parametrize("kind", DTYPES)
def test_reads_what_the_library_writes(kind: str, tmp_path: Path) -> None:
    dtype = DTYPES[kind]
    values = torch.arange(12).to(dtype).reshape(3, 4)
    tensors = {"b": values, "a": torch.tensor(1.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert found.tensors.keys() == tensors.keys() and found.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        stored = found.tensors[name]
        assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
        read = stored.read(stored.dtype)
        assert read.numel() == tensor.numel()
        if read.numel():
            assert torch.equal(read.view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_reads_parts_and_converts_them(tmp_path: Path) -> None:
    values = torch.randn(1000)
    save_file({"pad": torch.zeros(3, dtype=torch.int8), "a": values}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors").tensors["a"]
    assert torch.equal(stored.read(torch.bfloat16, 7, 500), values[7:500].to(torch.bfloat16))


CRAFTED: dict[str, tuple[Any, str]] = {
    "no object": ([1], "not an object"),
    "no JSON": (b"{nothing", "is no safetensors file"),
    "a key twice": (b'{"a": 1, "a": 2}', "there twice"),
    "deep": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "deep in each other"),
    "no entry": ({"a": 3}, "a: "),
    "a field more": ({"a": ONE["a"] | {"more": 1}}, "a.more"),
    "unknown dtype": ({"a": ONE["a"] | {"dtype": "F7"}}, "F7"),
    "shape of text": ({"a": ONE["a"] | {"shape": "2"}}, "a.shape"),
    "negative": ({"a": ONE["a"] | {"shape": [-2]}}, "a.shape"),
    "huge": ({"a": ONE["a"] | {"shape": [2**50, 2**50]}}, "shape and dtype make"),
    "another size": ({"a": ONE["a"] | {"shape": [3]}}, "shape and dtype make 12"),
    "backwards": ({"a": ONE["a"] | {"data_offsets": [8, 0]}}, "has -8 bytes"),
    "a gap": ({"a": ONE["a"] | {"data_offsets": [4, 12]}}, "begins at byte 4"),
    "overlap": (ONE | {"b": ONE["a"]}, "begins at byte 0, where the one before ends at 8"),
    "too short": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "its tensors end at byte"),
    "beyond the end": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "its tensors end at byte"),
    "metadata of numbers": (ONE | {"__metadata__": {"a": 1}}, "a: "),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_refuses_crafted_headers(name: str, tmp_path: Path) -> None:
    header, message = CRAFTED[name]
    with pytest.raises(StorageError, match=r"x\.safetensors is no safetensors file: ") as caught:
        read_header(written(tmp_path, header))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 10**6, MAX_HEADER_BYTES + 1, 2**64 - 1])
def test_refuses_lengths_that_cannot_be(length: int, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"its header has {length} bytes"):
        read_header(written(tmp_path, ONE, length=length))


def _make_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, _make_link_to_nothing, Path.touch, lambda path: None])
def test_refuses_what_is_no_file_of_tensors(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x.safetensors")
    with pytest.raises(StorageError) as caught:
        read_header(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value)


WHOLE = save({"a": torch.arange(6.0), "b": torch.arange(4)}, {"format": "pt"})


@given(place=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_leaves_every_tensor_inside_the_file(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(WHOLE[:place] + bytes([value]) + WHOLE[place + 1 :])
    try:
        found = read_header(path)
    except StorageError as error:
        assert "\n" not in str(error)
        return
    assert all(tensor.offset_bytes + tensor.n_bytes <= len(WHOLE) for tensor in found.tensors.values())


def test_a_file_that_was_changed_since_is_not_read(tmp_path: Path) -> None:
    stored = read_header(written(tmp_path, ONE)).tensors["a"]
    written(tmp_path, ONE, bytes(7))
    with pytest.raises(StorageError, match="was cut or lengthened"):
        stored.read(torch.float32)
