"""The run that is profiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from profile_runs import MODEL


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A run whose states do not fit in its RAM, with commits, on one compute thread."""
    threads = torch.get_num_threads()
    yield {
        "seed": 5,
        "memory": {"ram": "768KiB", "page": "64KiB"},
        "ssd": {"paths": [str(tmp_path / "runs" / "pages")], "threads": 1},
        "commit": {"every_steps": 2},
        "model": {"factory": "examples.byte_gpt:byte_gpt", "arguments": MODEL},
        "data": {"factory": "launch_data:sentence_text"},
        "train": {"steps": 4, "batch": 2, "seq": 32, "evaluate_batches": 0, "threads": 1},
        "output": {"run": str(tmp_path / "runs" / "log")},
    }
    torch.set_num_threads(threads)
