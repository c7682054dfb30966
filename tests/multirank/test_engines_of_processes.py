"""Engines of several processes: the bits of one that accumulates, for meshes that threads do not have."""

from __future__ import annotations

from pathlib import Path

import engine_bodies as bodies
import pytest
from engine_ranks import trained_plainly
from rank_processes import on_processes
from tied_model import ADAMW, loss_of, steps_of, tied_model

import offload


def plain(n_ranks: int, n_steps: int) -> str:
    model = tied_model()
    trained_plainly(model, ADAMW, steps_of(n_steps, n_ranks), loss_of)
    return bodies.digest(model)


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("n_ranks", "shard", "degree"),
    [
        (2, 2, "all"),
        (4, 2, "all"),
        pytest.param(3, 1, "none", marks=LONG),
        pytest.param(4, 2, "states", marks=LONG),
        pytest.param(4, 4, "all", marks=LONG),
    ],
)
@pytest.mark.parametrize("ram", ["16MiB", pytest.param("768KiB", marks=LONG)])
def test_bits_are_those_of_one_process(n_ranks: int, shard: int, degree: str, ram: str, tmp_path: Path) -> None:
    found = on_processes(n_ranks, bodies.trains, str(tmp_path), ram, degree, str(shard))
    assert found == [plain(n_ranks, 5)] * n_ranks


def test_a_loop_of_ones_own_has_the_sums_divided(tmp_path: Path) -> None:
    # Halves are exact, whether losses or sums are divided.
    assert on_processes(2, bodies.prepared, str(tmp_path)) == [plain(2, 4)] * 2


def test_numbers_of_ranks_that_do_not_make_a_mesh_are_refused() -> None:
    from offload.config import ParallelConfig
    from offload.parallel.shareable import shards_of

    assert [shards_of(ParallelConfig(**given), 8) for given in ({}, {"shard": 4}, {"replicate": 4})] == [8, 4, 2]
    with pytest.raises(offload.ConfigError, match=r"parallel.shard = 3 and parallel.replicate = None do not make up 8"):
        shards_of(ParallelConfig(shard=3), 8)
