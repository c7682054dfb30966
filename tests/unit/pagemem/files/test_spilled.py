"""Copies whose bytes are in files without names."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pagemem.errors import DiskFullError
from pagemem.files.spilled import SMALLEST_BYTES, SpilledTensor, spilled_copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("numel", [1, SMALLEST_BYTES, 5 * SMALLEST_BYTES + 3])
def test_a_copy_has_the_bits_and_can_be_written_to(tmp_path: Path, numel: int, dtype: torch.dtype) -> None:
    values = torch.randint(0, 255, (numel,)).to(dtype)
    made = spilled_copy(tmp_path, values)
    assert torch.equal(made, values) and made.dtype is dtype and made.shape == values.shape
    made.zero_()
    assert not made.any() and torch.equal(values, values.clone())
    assert os.listdir(tmp_path) == []


def test_a_large_tensor_takes_no_anonymous_memory_and_its_file_goes_with_it(tmp_path: Path) -> None:
    chunk = torch.arange(1 << 20, dtype=torch.float32)

    def anonymous_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])

    before = anonymous_bytes()
    made = SpilledTensor(tmp_path, torch.Size([64, 1 << 20]), torch.float32)
    for row in range(64):
        made.put(row << 20, chunk + row)
    assert anonymous_bytes() - before < 32 << 20
    assert all(torch.equal(made.tensor[row], chunk + row) for row in (0, 31, 63))
    held = made.tensor[3]
    del made
    gc.collect()
    assert torch.equal(held, chunk + 3)


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"no room for a copy of .* engine\.export"):
        SpilledTensor(tmp_path, torch.Size([SMALLEST_BYTES]), torch.float32)
