"""What a manifest says of tensors in files of others: read back as written, and refused where it cannot be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pagemem.durable.manifest import Manifest
from pagemem.durable.references import ReferencedFile, ReferencedTensor, refer_to
from pagemem.errors import CommitError, StorageError
from pagemem.sources.source_files import Origin, SourceFile, SourcePiece

EMPTY = Manifest(1, None, "today", 3, 1 << 16, ("run",), True, (), {})
FILE = ReferencedFile("/a/model.safetensors", 4096, 10**18, 7, "0" * 32)
PIECE = (0, 8, 64, 0, "bfloat16", "float32")
TENSOR = ReferencedTensor("w", "parameter", 4096, (PIECE,))


def written(tmp_path: Path, name: str = "file") -> SourceFile:
    """A file of 10,000 random bytes."""
    (tmp_path / name).write_bytes(os.urandom(10_000))
    return SourceFile.of(tmp_path / name)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    file, other = written(tmp_path), written(tmp_path, "other")
    origins = {
        ("a", "parameter", 4096): Origin.of(
            [SourcePiece(file, 9, 64, 128, torch.float32, torch.bfloat16),
             SourcePiece(other, 1, 128, 0, torch.bfloat16, torch.bfloat16)], 4096,
        ),
        ("a", "master", 8192): Origin.of([SourcePiece(other, 1, 128, 0, torch.bfloat16, torch.float32)], 8192),
    }  # fmt: skip
    files, tensors = refer_to(origins.items())
    manifest = replace(EMPTY, files=files, referenced=tensors)
    again = Manifest.decode(manifest.encode())
    assert again == manifest and again.sizes == {"parameter: a": 4096, "master: a": 8192}
    found = [one.find() for one in again.files]
    assert [tensor.origin(found) for tensor in again.referenced] == list(origins.values())


def test_manifests_from_before_have_no_files() -> None:
    body = EMPTY.encode().partition(b"\n")[2]
    assert b'"files":[],"referenced":[]' in body and Manifest.decode(EMPTY.encode()) == EMPTY


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"files": ()}, "parameter: w: it is said to be in file 0 of 0"),
        ({"files": (replace(FILE, n_bytes=71),)}, "parameter: w: bytes 8 to 72 lie beyond"),
        ({"files": (replace(FILE, digest="0"),)}, "digest"),
        ({"files": (replace(FILE, path="a\0b"),)}, "path"),
        ({"files": (replace(FILE, inode=-1),)}, "inode"),
        ({"referenced": (TENSOR, TENSOR)}, "tensors: parameter: w is there twice"),
        ({"referenced": (replace(TENSOR, n_bytes=64),)}, "pieces reach to byte 128 of a tensor of 64"),
        ({"referenced": (replace(TENSOR, pieces=()),)}, "parameter: w: an origin has at least one piece"),
        ({"referenced": (replace(TENSOR, pieces=(PIECE, PIECE)),)}, "bytes from 0 on are another piece's"),
        ({"referenced": (replace(TENSOR, pieces=((0, 8, 64, 0, "int8", "float32"),)),)}, "referenced"),
        ({"referenced": (replace(TENSOR, pieces=((0, -8, 64, 0, "float32", "float32"),)),)}, "referenced"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changed: dict[str, Any], message: str) -> None:
    good = replace(EMPTY, files=(FILE,), referenced=(TENSOR,))
    assert Manifest.decode(good.encode()) == good
    with pytest.raises(CommitError, match=message) as caught:
        Manifest.decode(replace(good, **changed).encode())
    assert "\n" not in str(caught.value)


def test_a_file_is_found_where_it_was_or_among_those_known(tmp_path: Path) -> None:
    file = written(tmp_path)
    told = ReferencedFile.of(file)
    assert told.find() == file
    moved = SourceFile.of((tmp_path / "file").rename(tmp_path / "moved"))
    with pytest.raises(
        CommitError, match=rf"left in {file.path}, 10000 bytes.* cannot be found: opening .*No such file"
    ):
        told.find([written(tmp_path, "other")])
    assert told.find([written(tmp_path, "other"), moved]) == moved
    written(tmp_path)
    with pytest.raises(CommitError, match="there is another file now"):
        told.find()
    with pytest.raises(StorageError, match="was replaced"):
        ReferencedFile.of(file)


def test_a_file_that_lies_as_it_did_is_not_read_unless_it_is_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ReferencedFile.of(written(tmp_path))
    monkeypatch.setattr("pagemem.sources.source_digest._known", {})
    monkeypatch.setattr("pagemem.durable.references.digest_of", lambda file: "f" * 32)
    assert told.find().path == tmp_path / "file"
    with pytest.raises(CommitError, match="cannot be found: there is another file now"):
        told.find(reads=True)
    os.utime(tmp_path / "file", ns=(1, 1))
    with pytest.raises(CommitError, match="cannot be found: there is another file now"):
        told.find()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_values_of_8_bits_in_files_are_referred_to(dtype: str, tmp_path: Path) -> None:
    piece = SourcePiece(written(tmp_path), 9, 64, 0, getattr(torch, dtype), torch.float32)
    files, tensors = refer_to([(("a", "parameter", 4096), Origin.of([piece], 4096))])
    again = Manifest.decode(replace(EMPTY, files=files, referenced=tensors).encode())
    assert again.referenced[0].origin([piece.file]).pieces == (piece,)
