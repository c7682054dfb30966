"""Blocks are computed again where that is cheaper than pages for what they save; the bits are plain PyTorch's before,
while and after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forecast_runs
import pytest
import torch
from cross_references import check_mover
from forecast_runs import gpt_config, trained
from parity import adamw, compare
from small_runs import assert_closed
from tiny_models import GPT, VOCAB
from torch import Tensor, nn

import offload
from offload import knobs
from offload.forecast import report as forecast_report
from offload.forecast.forecast import forecast
from offload.forecast.rates import Rates
from scheduler.planning.durations import Durations
from scheduler.planning.trace import Trace

TOKENS, ROWS, BLOCKS = 16, 8, 4
#: One step on demand, one traced, four by its plan; then one that is not yet like the later ones, one traced, four by
#: its plan.
DECIDING_STEPS, CHECKING_STEPS = 6, 6


#: What an op takes by the plan that the choice is made with, far less than what it saves takes on the disk.
#: As measured it is more on a busy machine, and fewer blocks, or none, are then worth recomputing.
OP_S = 3e-5


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)


@pytest.fixture
def ops_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops take `OP_S`, whatever was measured."""
    measured = Durations.add

    def add(self: Durations, planned: Trace, performed: Trace) -> Trace | None:
        found = measured(self, planned, performed)
        return None if found is None else Trace(tuple(replace(op, duration_s=OP_S) for op in found.ops))

    monkeypatch.setattr(Durations, "add", add)


def config_of(folder: Path, **memory: Any) -> dict[str, Any]:
    """A budget in which saved tensors have to go to a disk that is far slower than computing them."""
    return {
        "memory": {"ram": "8MiB", "page": "64KiB", "activations": "1536KiB", **memory},
        "ssd": {"paths": [str(folder / "pages")], "limit_mb_per_s": 120, "threads": 2},
    }


class Pair:
    """An engine and the same model without one, trained side by side."""

    def __init__(self, config: dict[str, Any], build: Callable[[], nn.Module] = lambda: GPT(blocks=BLOCKS)) -> None:
        torch.manual_seed(7)
        self.plain = build()
        self.engine = offload.initialize(copy.deepcopy(self.plain), config, adamw)
        self._optimizer = adamw(self.plain.parameters())
        self._clip_norm = config.get("update", {}).get("clip_norm")
        self._passes = config.get("update", {}).get("accumulation", 1)
        choice = self.engine.debug.recompute_choice
        assert choice is not None
        self.choice = choice

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, VOCAB, (ROWS, TOKENS + 1))
        return x[:, :-1].contiguous(), x[:, 1:].contiguous()

    def train(self, steps: int) -> None:
        """Make steps; the losses are equal."""
        for _ in range(steps):
            for _ in range(self._passes):
                batch = self.batch()
                state = torch.get_rng_state()
                loss = self.plain(*batch)
                (loss / self._passes).backward()
                after = torch.get_rng_state()
                torch.set_rng_state(state)
                same = self.engine(*batch)
                assert torch.equal(loss, same)
                self.engine.backward(same)
                assert torch.equal(torch.get_rng_state(), after), "recomputation drew random numbers of its own"
            if self._clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.plain.parameters(), self._clip_norm)
            self._optimizer.step()
            self._optimizer.zero_grad()
            assert self.engine.step()

    def end(self) -> offload.Stats:
        """Compare every bit and close; returns the engine's counters."""
        compare(self.plain, self._optimizer, self.engine.model, self.engine.optimizer, "at the end")
        check_mover(self.engine.debug.mover)
        stats = self.engine.stats()
        assert stats.deviations == 0
        assert_closed(self.engine)
        assert not any("forward" in module.__dict__ for module in self.engine.model.modules())
        return stats


@pytest.mark.usefixtures("ops_of_one_length")
@pytest.mark.parametrize(
    ("device", "update"),
    [
        pytest.param(False, {}, id="eager"),
        pytest.param(False, {"clip_norm": 0.5}, id="clipped", marks=pytest.mark.long),
        pytest.param(False, {"accumulation": 2}, id="accumulated", marks=pytest.mark.long),
        pytest.param(True, {}, id="three tiers", marks=pytest.mark.long),
        pytest.param(True, {"accumulation": 2}, id="three tiers, accumulated", marks=pytest.mark.long),
    ],
)
def test_where_the_disk_is_slow_blocks_are_computed_again(device: bool, update: dict[str, Any], tmp_path: Path) -> None:
    config = {**config_of(tmp_path), "update": update}
    if device:
        config = {**config, "device": "cpu-emulated"}
        config["memory"] |= {"device": "1MiB"}
    pair = Pair(config)
    while pair.choice.open and not pair.choice.tried:
        pair.train(1)
        assert pair.engine.steps <= DECIDING_STEPS + 2 * device
    assert pair.choice.open and pair.choice.tried and pair.engine.planned_step_s is None
    paged_before = len(pair.engine.debug.driver.mover.tensors)
    n_recomputed = pair.engine.stats().recomputed_blocks
    assert n_recomputed >= BLOCKS // 2
    while pair.choice.open:
        pair.train(1)
        assert pair.engine.steps <= DECIDING_STEPS + CHECKING_STEPS + 4 * device
    assert pair.engine.stats().recomputed_blocks == n_recomputed, "a plan that is cheaper was taken back"
    before = pair.engine.stats()
    pair.train(3)
    assert pair.engine.stats().since(before).planned_steps == 3
    assert len(pair.engine.debug.driver.mover.tensors) == paged_before
    assert pair.end().recomputed_blocks == n_recomputed


@pytest.mark.usefixtures("ops_of_one_length")
def test_a_choice_that_turns_out_dearer_is_taken_back(tmp_path: Path) -> None:
    pair = Pair(config_of(tmp_path))
    pair.train(DECIDING_STEPS)
    assert pair.choice.open and pair.choice.tried and pair.choice.blocks.n_recomputed
    pair.choice._cost_before_s = 0.0
    pair.train(CHECKING_STEPS)
    assert not pair.choice.open and pair.engine.stats().recomputed_blocks == 0
    pair.train(4)
    stats = pair.end()
    assert stats.planned_steps == stats.steps - 6, (
        "three times a step that differs from the next and one that is traced"
    )


@pytest.mark.parametrize(
    ("memory", "build"),
    [
        ({"activations": "512KiB"}, lambda: GPT(blocks=BLOCKS)),
        ({"ram": "64MiB", "activations": "1GiB"}, lambda: GPT(blocks=BLOCKS)),
        ({}, lambda: GPT(blocks=BLOCKS, recompute="non-reentrant")),
    ],
    ids=["no room for a block's", "nothing goes to pages", "the model recomputes"],
)
def test_where_it_saves_nothing_none_are(
    memory: dict[str, Any], build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    pair = Pair(config_of(tmp_path, **memory), build)
    pair.train(DECIDING_STEPS + 1)
    assert not pair.choice.open
    assert pair.end().recomputed_blocks == 0


class Convolutions(nn.Module):
    """Blocks with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv1d(32, 32, 3, padding=1), nn.BatchNorm1d(32), nn.GELU()) for _ in range(6))
        )
        self.head = nn.Linear(32, VOCAB)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss."""
        hidden = self.head(self.blocks(self.embed(x).mT).mT)
        return nn.functional.cross_entropy(hidden.flatten(0, 1), y.flatten())


def test_blocks_whose_forward_changes_buffers_are_left_alone(tmp_path: Path) -> None:
    pair = Pair(config_of(tmp_path, ram="1MiB", activations="128KiB"), Convolutions)
    pair.train(DECIDING_STEPS + 1)
    assert not pair.choice.open and all(block.has_side_effects for block in pair.choice.blocks)
    assert pair.end().recomputed_blocks == 0


def test_never_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = GPT(blocks=2)
    with offload.initialize(model, config_of(tmp_path, recompute="never"), adamw) as engine:
        assert engine.debug.recompute_choice is None and not any(
            "forward" in module.__dict__ for module in model.modules()
        )


def test_a_forecast_makes_the_choice_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_runs, "ROWS", 8)
    monkeypatch.setattr(forecast_runs, "TOKENS", 64)
    made = {
        "memory": {"ram": "4MiB", "page": "64KiB", "activations": "4MiB"},
        "ssd": {"paths": [str(tmp_path / "pages")], "limit_mb_per_s": 50},
    }
    config = gpt_config(tmp_path, 4 << 20, **made)
    found = forecast(config, Rates(flops=2e10, ram=1e10, ssd_read=5e7, ssd_write=5e7))
    report, _, plan = trained(config, steps=DECIDING_STEPS + CHECKING_STEPS)
    assert found.recomputed_blocks and found.ops == plan.ops_per_step
    assert found.step.host_pages == pytest.approx(report.tiers["host"].peak_pages, rel=0.02)
    assert any("blocks of the model" in value for _, value in forecast_report.forecast_rows(found))
    never = config.model_copy(update={"memory": config.memory.model_copy(update={"recompute": "never"})})
    paged = forecast(never, Rates(flops=2e10, ram=1e10, ssd_read=5e7, ssd_write=5e7))
    assert paged.recomputed_blocks == 0 and paged.ops > found.ops and paged.times.step_s > found.times.step_s
