"""What several tests of changed models start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import assert_closed, built, engine_of

import offload


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[offload.Engine]:
    """A running engine; afterwards all is consistent and everything is given back."""
    with engine_of(built(), tmp_path) as engine:
        yield engine
    assert_closed(engine)
