"""What several tests of launched runs start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launched_runs import HERE, MODEL, ROWS, SEQ, STEPS


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A run whose states do not fit in its RAM, on one compute thread: threads cost a model this small more than they
    bring."""
    threads = torch.get_num_threads()
    yield {
        "seed": 5,
        "memory": {"ram": "768KiB", "page": "64KiB"},
        "ssd": {"paths": [str(tmp_path / "pages")], "threads": 1},
        "optimizer": {"lr": 3e-3, "no_decay": ["1d"]},
        "model": {"factory": "examples.byte_gpt:byte_gpt", "arguments": MODEL},
        "data": {"factory": f"{HERE}:sentence_text"},
        "train": {
            "steps": STEPS, "batch": ROWS, "seq": SEQ, "evaluate_batches": 2, "schedule": "cosine", "warmup_steps": 2,
            "log_every": 5, "threads": 1,
        },
        "output": {"run": str(tmp_path / "run")},
    }  # fmt: skip
    torch.set_num_threads(threads)
