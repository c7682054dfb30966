"""Runs of the small model whose steps are recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_runs import batches, built, engine_of

import offload
from offload.profiling.profile import Profile

WARM_UP = 3  # Two steps on demand, and the first by plan.


def steps(engine: offload.Engine, first: int, count: int) -> None:
    """Some of the steps that `train` makes."""
    for batch in batches(first + count)[first:]:
        engine.backward(engine(*batch))
        engine.step()


def recorded(tmp_path: Path, count: int = 4, **update: Any) -> tuple[Profile, offload.Stats, offload.Engine]:
    """A profile of steps by plan, at rest before and after, what the engine counted meanwhile, and the closed
    engine."""
    with engine_of(built(), tmp_path, **update) as engine:
        steps(engine, 0, WARM_UP)
        engine.drain()
        before = engine.stats()
        with engine.profile(tmp_path / "profile") as profile:
            steps(engine, WARM_UP, count)
            engine.drain()
        return profile, engine.stats().since(before), engine
