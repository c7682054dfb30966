"""Bytes that ranks send in a step, and keep, against the formulas of docs/ranks.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import engine_bodies as bodies
import pytest
from rank_processes import on_processes

LONG: Final = pytest.mark.long
#: Counted by `bodies.counts`.
STEPS: Final = 4


def counted(n_ranks: int, shard: int, degree: str, ram: str, folder: Path) -> list[dict[str, Any]]:
    return on_processes(n_ranks, bodies.counts, str(folder), ram, degree, str(shard))


@pytest.mark.parametrize(
    ("n_ranks", "shard", "degree"),
    [
        (2, 2, "all"),
        (4, 2, "all"),
        pytest.param(2, 2, "none", marks=LONG),
        pytest.param(2, 2, "states", marks=LONG),
        pytest.param(2, 2, "gradients", marks=LONG),
        pytest.param(3, 3, "all", marks=LONG),
        pytest.param(4, 2, "states", marks=LONG),
        pytest.param(4, 4, "all", marks=LONG),
    ],
)
def test_with_room_each_step_sends_what_a_sum_over_all_ranks_needs(
    n_ranks: int, shard: int, degree: str, tmp_path: Path
) -> None:
    found = counted(n_ranks, shard, degree, "16MiB", tmp_path)
    model = found[0]["model"]
    # Ranks differ by their ranges, and by what replicas do; in all it is N times 2 B (N - 1) / N.
    assert sum(rank["sent"] for rank in found) == STEPS * 2 * model * (n_ranks - 1)
    states = 3 * model  # parameters and two moments
    for rank in found:
        share = (model + 2 * model / shard) if degree in ("states", "gradients") else states / shard
        assert rank["kept"] <= (states if degree == "none" else share) + rank["page_a_unit"]


def test_without_room_what_was_gathered_is_gathered_once_more(tmp_path: Path) -> None:
    found = counted(2, 2, "all", "768KiB", tmp_path)
    model, sent = found[0]["model"], sum(rank["sent"] for rank in found)
    assert STEPS * 2 * model <= sent <= STEPS * 3 * model
