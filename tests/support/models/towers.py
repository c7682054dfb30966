"""A model beside the same one in pages with saved tensors in pages, too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parity import adamw
from small_runs import assert_closed
from torch import nn

import offload
from offload.activations.saved import SavedActivations


@contextmanager
def paged(plain: nn.Module, folder: Path, limit: int | None) -> Iterator[offload.Engine]:
    """An engine of a copy of ``plain``, with ``limit`` bytes of RAM for saved tensors; in the end all is given back."""
    config: dict[str, Any] = {
        "memory": {"ram": "1MiB", "page": "64KiB", "activations": limit},
        "ssd": {"paths": [str(folder / "pages")]},
    }
    engine = offload.initialize(copy.deepcopy(plain), config, adamw)
    yield engine
    assert_closed(engine)


def saved_by(engine: offload.Engine) -> SavedActivations:
    """What keeps an engine's saved tensors."""
    found = engine.debug.binder.activations
    assert found is not None
    return found
