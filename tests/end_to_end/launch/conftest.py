"""What several tests of launched runs start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launched_runs import STEPS, small_launch, threads_put_back


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A run with a schedule and validation."""
    made = small_launch(tmp_path, STEPS, optimizer={"lr": 3e-3, "no_decay": ["1d"]})
    made["train"] |= {"evaluate_batches": 2, "schedule": "cosine", "warmup_steps": 2, "log_every": 5}
    with threads_put_back():
        yield made
