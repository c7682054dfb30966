"""The run that is profiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launched_runs import small_launch, threads_put_back


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A run with commits."""
    made = small_launch(tmp_path / "runs", 4, commit={"every_steps": 2})
    made["output"] = {"run": str(tmp_path / "runs" / "log")}
    with threads_put_back():
        yield made
