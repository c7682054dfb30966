"""Lock-free mode: with no staleness allowed it is plain PyTorch, bit for bit; with some, what it says it is, bit for
bit."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from lockfree_replay import History, Replay, assert_replayed
from pairwise import each_value, every_third, full_product
from parity import Parity, adamw, schedule, smallest_ram, state_bytes
from small_runs import assert_closed
from tiny_models import CASES, Case
from torch import nn
from updater_gates import UpdaterGates

import offload

LEVEL: dict[str, Any] = {"mode": "lock-free", "max_staleness": 0, "exact_steps": 0}


def resident_ram(case: Case) -> int:
    """Enough for everything."""
    return 3 * state_bytes(case) + (8 << 20)


@every_third(
    0, name=tuple(CASES), residency=["all_in_ram", "smallest_budget"], clip_norm=[None, 0.5], accumulation=[1, 3]
)
def test_without_staleness_every_step_equals_plain_torch(
    name: str, residency: str, clip_norm: float | None, accumulation: int, tmp_path: Path
) -> None:
    parity = Parity(CASES[name], tmp_path, resident_ram(CASES[name]), clip_norm, accumulation, steps=4, extra=LEVEL)
    if residency == "smallest_budget":
        parity.ram = smallest_ram(dataclasses.replace(parity, steps=1))
    parity.run()
    planned = dataclasses.replace(parity, each_step=False, steps=6)
    stats = planned.run()
    if (
        name != "borrower" or residency == "all_in_ram"
    ):  # Its views hold pages that the plan of a tiny budget would move.
        assert stats.deviations == 0
        assert stats.planned_steps >= planned.steps - 2


def prepared(
    case: Case,
    folder: Path,
    ram: int,
    max_staleness: int,
    clip_norm: float | None,
    dtype: torch.dtype,
    exact_steps: int,
    on_time: str = "never",
) -> tuple[nn.Module, nn.Module, Any, offload.Engine]:
    """A plain model, the same in pages with its optimizer, and the engine."""
    torch.manual_seed(7)
    plain = case.build()
    config = {
        "memory": {"ram": ram, "page": "64KiB"},
        "ssd": {"paths": [str(folder / "pages")], "threads": 2},
        "update": {
            "mode": "lock-free",
            "max_staleness": max_staleness,
            "exact_steps": exact_steps,
            "clip_norm": clip_norm,
            "on_time": on_time,
        },
    }
    if dtype is torch.bfloat16:
        config["model"] = {"factory": "unused:unused", "dtype": "bf16"}
    model, optimizer = offload.prepare(copy.deepcopy(plain), adamw, config)
    engine: offload.Engine = optimizer.engine  # type: ignore[attr-defined]
    return plain, model, optimizer, engine


def replayed(
    case: Case,
    folder: Path,
    ram: int,
    max_staleness: int,
    *,
    pace: str,
    steps: int = 10,
    clip_norm: float | None = None,
    accumulation: int = 1,
    dtype: torch.dtype = torch.float32,
    exact_steps: int = 0,
    on_time: str = "never",
) -> tuple[History, offload.Engine]:
    """Train, do it again in plain PyTorch, compare everything; the engine is closed."""
    plain, model, optimizer, engine = prepared(case, folder, ram, max_staleness, clip_norm, dtype, exact_steps, on_time)
    gates = UpdaterGates(engine)
    history = History(gates, max_staleness, model)
    scheduled = schedule(optimizer)
    generator = torch.Generator().manual_seed(11)
    every = [[case.batch(generator) for _ in range(accumulation)] for _ in range(steps)]
    losses = []
    for micro_batches in every:
        if pace == "late":
            gates.hold("chosen")
        for batch in micro_batches:
            for _ in range(case.passes):
                loss = model(*batch)
                (loss / accumulation).backward()
                losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        scheduled.step()
    gates.open()
    engine.drain()
    with gates.updater._thread.paused():
        pass  # The last version is in use before the updater comes to record it.
    for channel in gates.updater._channels.values():
        assert channel.clock.produced == channel.clock.applied == channel.clock.adopted
    assert gates.updater.direct_bytes == 0
    again = Replay(plain, adamw, history, clip_norm=clip_norm, dtype=dtype)
    for mine, its in zip(losses, again.run(every), strict=True):
        assert torch.equal(mine, its), "a loss differs"
    assert_replayed(again, model, optimizer)
    assert_closed(engine)
    return history, engine


@full_product(
    max_staleness=[0, 1, 2, 4], residency=["all_in_ram", "streaming"], pace=["free", "late"], clip_norm=[None, 0.5]
)
def test_with_staleness_the_results_follow_from_the_history(
    max_staleness: int, residency: str, pace: str, clip_norm: float | None, tmp_path: Path
) -> None:
    case = CASES["gpt"]
    ram = resident_ram(case) if residency == "all_in_ram" else 6_800_000
    history, _ = replayed(case, tmp_path, ram, max_staleness, pace=pace, clip_norm=clip_norm)
    if pace == "late":
        merged = max(
            later - earlier
            for ends in map(list, history.published.values())
            for earlier, later in zip([0, *ends], ends)
        )
        assert 1 <= merged <= max_staleness + 1


#: Of 13 units, those that are late, by budget and clipping: with it, gradients of those on time wait in pages, and
#: those of the others are there twice.
LATE: dict[float | None, dict[int, int]] = {
    None: {6_800_000: 13, 8_000_000: 9, 8_500_000: 11, 9_000_000: 7, 9_500_000: 0, 11_000_000: 0},
    0.5: {6_800_000: 13, 9_500_000: 12, 10_000_000: 11, 10_500_000: 9, 11_000_000: 8, 12_500_000: 0},
}


@each_value(budget=range(6), pace=["free", "late"], clipping=[(None, 1), (None, 2), (0.5, 1), (0.5, 2)])
def test_units_on_time_beside_late_ones_follow_from_the_history(
    budget: int, pace: str, clipping: tuple[float | None, int], tmp_path: Path
) -> None:
    clip_norm, accumulation = clipping
    ram, late = list(LATE[clip_norm].items())[budget]
    history, engine = replayed(
        CASES["gpt"], tmp_path, ram, 4,
        pace=pace, clip_norm=clip_norm, accumulation=accumulation, on_time="auto", steps=8,
    )  # fmt: skip
    ends = [list(found) for found in history.published.values() if isinstance(found, list)]
    assert len(ends) == late
    assert engine.stats().planned_steps >= 2 or ram == 6_800_000


def test_the_first_steps_miss_nothing_and_later_ones_may(tmp_path: Path) -> None:
    history, _ = replayed(CASES["gpt"], tmp_path, resident_ram(CASES["gpt"]), 4, pace="late", exact_steps=4)
    missed = [max(step - adopted for adopted in used.values()) for step, used in enumerate(history.used) if used]
    assert missed[:4] == [0] * 4, "a step was not exact"
    assert max(missed) > 0, "nothing was late although the updater was held"


def test_exact_steps_are_plain_torch_whatever_staleness_is_allowed(tmp_path: Path) -> None:
    extra = {"mode": "lock-free", "max_staleness": 4, "exact_steps": 100}
    Parity(CASES["gpt"], tmp_path, resident_ram(CASES["gpt"]), 0.5, 3, extra=extra).run()
