"""Buffers beside a commit: read as they were written, and whatever is wrong with them is one CommitError."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from offload.commits.sidecar import Sidecar, read_sidecar
from offload.sources.safetensors_file import DTYPES
from pagemem.durable.commit_folder import CommitFolder
from pagemem.errors import CommitError

LARGE = 9 << 20
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(folder: Path, content: bytes) -> tuple[CommitFolder, dict[str, Any]]:
    """A commit's file with this content, and what its manifest says of it."""
    (folder / "commits").mkdir(exist_ok=True)
    commits = CommitFolder(folder)
    return commits, {"sidecar": commits.write_sidecar(1, content)}


def crafted(header: Any, body: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_every_dtype_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = {kind: torch.arange(12).to(dtype).reshape(3, 4) for kind, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "large": torch.arange(LARGE).to(torch.uint8)}
    commits, state = written(tmp_path, save(tensors))
    found = read_sidecar(commits, 1, state)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        if tensor.numel():
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    with Sidecar(commits, 1, state) as sidecar:
        pieces = list(sidecar.pieces("large"))
    assert len(pieces) == 3 and [offset for offset, _ in pieces] == [0, 4 << 20, 8 << 20]
    assert b"".join(bytes(piece) for _, piece in pieces) == tensors["large"].numpy().tobytes()


def test_there_may_be_none(tmp_path: Path) -> None:
    assert (
        read_sidecar(CommitFolder(tmp_path), 1, {}) == {} == read_sidecar(CommitFolder(tmp_path), 1, {"sidecar": None})
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header has 0 bytes"),
        (b"1234567", "its header has"),
        (crafted({"a": ENTRY})[:-1], "its tensors end at byte"),
        (crafted({"a": ENTRY}, bytes(9)), "its tensors end at byte"),
        (crafted(b'{"a": {}, "a": {}}'), "'a' is there twice"),
        (crafted({"a": {**ENTRY, "more": 1}}), "a.more"),
        (crafted({"a\x1b[2J\n": ENTRY}), r"a\x1b[2J"),
        (crafted({"a" * 2000: ENTRY}), "at most 1000 characters"),
        (crafted({"a": {**ENTRY, "dtype": "F8_E8M0", "shape": [8]}}), "F8_E8M0"),
        (crafted({"a": {**ENTRY, "dtype": "F4", "shape": [16]}}), "F4"),
        (crafted({"a": {**ENTRY, "shape": [2**63, 0], "data_offsets": [0, 0]}}, b""), "a.shape"),
        (crafted({"a": {**ENTRY, "shape": [2**52, 2**52, 0], "data_offsets": [0, 0]}}, b""), "larger than any tensor"),
        (crafted({"a": {**ENTRY, "shape": [2**50, 2**50]}}), "shape and dtype make"),
    ],
)
def test_what_we_did_not_write_is_refused_in_a_line(content: bytes, message: str, tmp_path: Path) -> None:
    commits, state = written(tmp_path, content)
    with pytest.raises(CommitError) as caught:
        read_sidecar(commits, 1, state)
    said = str(caught.value)
    assert said.startswith(f"{commits.sidecar(1)} is damaged: ") and message in said
    assert said.isprintable() and len(said) < 1500


@pytest.mark.parametrize("left_bytes", [0, 4, 100, LARGE])
def test_a_file_that_is_cut_after_its_checksum_was_right_is_an_error(
    left_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits, state = written(tmp_path, save({"a": torch.zeros(LARGE, dtype=torch.uint8)}))
    verify = CommitFolder.open_sidecar

    def cut(self: CommitFolder, number: int, told: Any) -> int:
        fd = verify(self, number, told)
        os.truncate(self.sidecar(number), left_bytes)
        return fd

    monkeypatch.setattr(CommitFolder, "open_sidecar", cut)
    with pytest.raises(CommitError, match="is damaged"):
        read_sidecar(commits, 1, state)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    commits, state = written(tmp_path, save({"a": torch.zeros(LARGE, dtype=torch.uint8)}))
    with Sidecar(commits, 1, state) as sidecar:
        os.truncate(commits.sidecar(1), 5 << 20)
        with pytest.raises(CommitError, match="is damaged: it ends at byte"):
            list(sidecar.pieces("a"))


@pytest.mark.parametrize("call", [0, 1])
def test_an_error_of_the_disk_is_one_of_the_commit(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits, state = written(tmp_path, save({"a": torch.zeros(1000)}))
    read, calls = os.preadv, []

    def fails(fd: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(CommitError, match="cannot be read: Input/output error"):
        read_sidecar(commits, 1, state)
