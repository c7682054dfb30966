"""Background commits in lock-free mode: training does not wait for gradients on their way, and what is committed fits
together."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CASES
from torch import nn

import offload
from offload.parameters.paged_parameter import PagedParameter
from optim.lockfree.updater import LockFreeUpdater
from optim.unit import Unit
from scheduler.planning.trace import AccessMode

TIMEOUT_S = 60.0


def settings(folder: Path, ram: str) -> dict[str, Any]:
    return {
        "memory": {"ram": ram, "page": "64KiB"},
        "ssd": {"paths": [str(folder / "pages")], "threads": 2},
        "update": {"mode": "lock-free", "max_staleness": 4, "exact_steps": 0},
        "commit": {"every_steps": 1},
    }


def built() -> nn.Module:
    torch.manual_seed(7)
    return CASES["gpt"].build()


def train(engine: offload.Engine, generator: torch.Generator, steps: int) -> None:
    for _ in range(steps):
        engine.backward(engine(*CASES["gpt"].batch(generator)))
        engine.step()


class Held:
    """Holds the updater at one point of one unit until it is let go."""

    def __init__(self, updater: LockFreeUpdater, point: str, number: int) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        thread = updater._thread

        def gate(at: str, unit: Unit) -> None:
            if at == point and unit.index == number and not self.go_on.is_set():
                self.reached.set()
                assert self.go_on.wait(TIMEOUT_S)

        thread._gate = gate


def masters_of(engine: offload.Engine, unit: Unit) -> torch.Tensor:
    """The fp32 masters of a unit, read back."""
    states, parts = engine.debug.updater._states, []  # type: ignore[attr-defined]
    for slot in unit.slots:
        whole = torch.empty(slot.numel)
        states._visit(
            unit,
            slot,
            AccessMode.READ,
            None,
            lambda view, begin, whole=whole: whole[begin : begin + view.numel()].copy_(view),
        )
        parts.append(whole)
    return torch.cat(parts)


def test_a_commit_while_a_unit_is_being_updated_waits_for_that_unit_and_no_other(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(11)
    with offload.initialize(built(), settings(tmp_path, "24MiB")) as engine:
        updater = engine.debug.updater
        assert isinstance(updater, LockFreeUpdater)
        train(engine, generator, 2)
        engine.drain()
        held = Held(updater, "slice", engine.debug.units[2].index)
        train(engine, generator, 2)
        assert held.reached.wait(TIMEOUT_S)
        assert engine.staleness >= 1
        committed: list[int | None] = []
        threading.Timer(0.05, held.go_on.set).start()
        committed.append(engine.save_if_due())
        assert committed[0] is not None
        engine.debug.committer.wait()
        # Saved without the updates that were on their way, and training goes on.
        train(engine, generator, 1)
        engine.drain()
        assert engine.staleness == 0


@pytest.mark.parametrize("ram", ["24MiB", "7MiB"], ids=["resident", "streaming"])
def test_what_is_resumed_fits_together(ram: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(11)
    with offload.initialize(built(), settings(tmp_path, ram)) as engine:
        for _ in range(8):
            train(engine, generator, 1)
            engine.save_if_due()
            assert engine.staleness <= 5, "a unit misses more than was on its way"
        engine.debug.committer.wait()
    with offload.initialize(built(), settings(tmp_path, ram)) as engine:
        resumed = engine.resume()
        assert resumed is not None and 1 <= resumed.step <= 8
        for unit in engine.debug.units:
            for slot in unit.slots:
                assert 1 <= slot.steps <= resumed.step
            assert len({(slot.steps, slot.lookahead) for slot in unit.slots}) == 1, "a unit was committed half updated"
            if unit.slices[0].master is not None:
                values = {p._place.slot: p for p in engine.model.parameters() if isinstance(p, PagedParameter)}
                with torch.no_grad():
                    mine = torch.cat([values[slot].detach().clone().reshape(-1) for slot in unit.slots])
                with engine.debug.driver.untraced():
                    assert torch.equal(mine, masters_of(engine, unit)), (
                        f"{unit.name}: parameters are not those of its masters"
                    )
        train(engine, generator, 2)


def test_save_has_every_update(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(11)
    with offload.initialize(built(), settings(tmp_path, "24MiB")) as engine:
        held = Held(engine.debug.updater, "chosen", 2)
        train(engine, generator, 4)
        held.go_on.set()
        engine.save()
        expected, optimizer = engine.model.state_dict(), engine.optimizer.state_dict()["state"]
        lookahead = {slot.name: slot.lookahead for unit in engine.debug.units for slot in unit.slots}
        assert any(lookahead.values()), "nothing was merged"
    with offload.initialize(built(), settings(tmp_path, "24MiB")) as engine:
        engine.resume()
        assert {slot.name: slot.lookahead for unit in engine.debug.units for slot in unit.slots} == lookahead
        found, states = engine.model.state_dict(), engine.optimizer.state_dict()["state"]
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert all(
            torch.equal(states[number][name], value)
            for number, state in optimizer.items()
            for name, value in state.items()
        )
