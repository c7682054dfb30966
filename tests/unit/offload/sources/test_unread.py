"""Tensors that are not read yet: what leaves them so, and that everything else gives the values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from offload.sources import safetensors_file
from offload.sources.safetensors_file import read_header
from offload.sources.unread import Source, UnreadTensor

VALUES = torch.randn(3, 4)


@pytest.fixture
def unread(tmp_path: Path) -> UnreadTensor:
    save_file({"a": VALUES}, tmp_path / "x.safetensors")
    return UnreadTensor(Source(read_header(tmp_path / "x.safetensors").tensors["a"], torch.float32))


def test_what_does_not_read(unread: UnreadTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "SourceReader", None)
    assert (unread.shape, unread.dtype, unread.device.type) == (VALUES.shape, torch.float32, "cpu")
    assert unread.to("cpu") is unread
    parameter = nn.Parameter(unread.to(device="cpu", dtype=torch.bfloat16))
    assert isinstance(parameter, UnreadTensor) and parameter.requires_grad
    assert parameter.source == Source(unread.source.stored, torch.bfloat16)


def test_everything_else_reads(unread: UnreadTensor) -> None:
    narrow = unread.to(torch.bfloat16)
    found: list[Tensor] = [torch.stack([unread, unread])[1], unread[:], unread.t().t(), unread + 0, unread.clone()]
    assert all(type(one) is Tensor and torch.equal(one, VALUES) for one in found)
    assert torch.equal(narrow + 0, VALUES.bfloat16())
    assert torch.equal(narrow.float(), VALUES.bfloat16().float())


def test_cannot_be_written_to(unread: UnreadTensor) -> None:
    with pytest.raises(RuntimeError, match="a is to be written to, and has not been read yet"):
        unread.zero_()
