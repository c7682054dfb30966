"""What several tests of commits start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from finished_runs import FinishedRun, finished, settings
from small_runs import built


@pytest.fixture
def run(tmp_path: Path) -> FinishedRun:
    """A run with two commits, of which the first has a name."""
    return finished(built(), settings(tmp_path), names=["first", None])
