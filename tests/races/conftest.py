"""What several tests of gates start from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gated_mover import Gates, opened


@pytest.fixture
def gates() -> Iterator[Gates]:
    """A mover with room for six tensors."""
    with opened(6) as made:
        yield made
