"""Which I/O threads an engine has: helpers only where cores do not compute."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import offload


@pytest.mark.parametrize(("cores", "helped"), [(2, False), (3, True)])
def test_helpers_are_started_where_cores_are_idle(
    cores: int, helped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    config = {"memory": {"ram": "4MiB"}, "ssd": {"paths": [str(tmp_path / "pages")]}}
    with offload.initialize(nn.Linear(16, 16), config):
        names = {thread.name.rpartition("-")[0] for thread in threading.enumerate()}
    assert ("pagemem-finish" in names) is helped and "pagemem-read-0" in names
