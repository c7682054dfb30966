"""``update.mode = "auto"``: the mode that is forecast to be quicker, or exact with the reason, said in one line."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import forecast_runs
import pytest
import torch
from forecast_runs import RATES, TOKENS, gpt_config
from parity import adamw

import offload
from examples.byte_gpt import byte_gpt
from offload.choosing import update_choice
from offload.choosing.update_choice import choose_updates
from offload.config import Config
from offload.forecast import late_costs, timed_runs
from offload.forecast.forecast import forecast
from offload.forecast.rates import Rates
from offload.forecast.report import forecast_rows
from offload.forecast.timed_runs import TimedRun

#: Does not quite hold the states of all units; in exact mode those of more than in lock-free mode.
RAM = 11 << 19
#: At which no step waits for a disk, and at which each one does.
FAST, SLOW = replace(RATES, ssd_read=1e12, ssd_write=1e12), replace(RATES, ssd_read=2e7, ssd_write=2e7)
LINE = re.compile(r"^(exact|lock-free) \(auto: a step is forecast to take exact ([0-9.]+) s, lock-free ([0-9.]+) s\)$")


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one to spare, updates beside the step are quicker on any disk."""
    monkeypatch.setattr(late_costs.os, "sched_getaffinity", lambda process: {0})


def config(folder: Path, ram: int = RAM, **update: Any) -> Config:
    return gpt_config(folder, ram, update={"mode": "auto", "exact_steps": 0, **update})


def model() -> torch.nn.Module:
    return byte_gpt(96, 3, 4, TOKENS)


def chosen(asked: Config, rates: Rates) -> tuple[str, str]:
    found = choose_updates(asked, model, rates=rates).update
    return found.mode, found.said


@pytest.mark.parametrize(("rates", "mode"), [(FAST, "exact"), (SLOW, "lock-free")])
def test_the_mode_is_the_one_forecast_to_be_quicker(rates: Rates, mode: str, tmp_path: Path) -> None:
    found, said = chosen(config(tmp_path), rates)
    line = LINE.match(said)
    assert line and found == mode == line[1]
    exact_s, lock_free_s = float(line[2]), float(line[3])
    assert (lock_free_s < update_choice.WORTH_IT * exact_s) is (mode == "lock-free")
    for tried, seconds in (("exact", exact_s), ("lock-free", lock_free_s)):
        plan = forecast(config(tmp_path, mode=tried), rates)
        assert plan.times.step_s == pytest.approx(seconds, abs=0.0006)
        assert plan.updates == tried


@pytest.mark.parametrize(("rates", "mode"), [(FAST, "exact"), (SLOW, "lock-free")])
def test_plan_says_the_choice_and_forecasts_it(rates: Rates, mode: str, tmp_path: Path) -> None:
    asked = choose_updates(config(tmp_path), model, rates=rates)
    plan, chosen_plan = forecast(asked, rates), forecast(config(tmp_path, mode=mode), rates)
    assert LINE.match(dict(forecast_rows(plan))["updates"])
    assert plan.times == chosen_plan.times and plan.step == chosen_plan.step


def test_a_budget_too_small_for_lock_free_updates_leaves_exact_ones(tmp_path: Path) -> None:
    mode, said = chosen(config(tmp_path, 2 << 20), SLOW)
    assert mode == "exact" and "lock-free updates keep the gradients of the whole model in RAM" in said


def test_times_of_a_busy_machine_leave_exact_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_runs, "timed_run", lambda work: TimedRun(0.1, 0.04))
    mode, said = chosen(config(tmp_path), replace(SLOW, flops=None, ram=None))
    assert mode == "exact" and "kernels had a processor for 40% of the time in which they were timed" in said


def test_a_device_leaves_exact_updates(tmp_path: Path) -> None:
    memory = {"ram": RAM, "device": RAM}
    asked = gpt_config(tmp_path, RAM, device="cpu-emulated", update={"mode": "auto"}, memory=memory)
    assert chosen(asked, SLOW) == ("exact", 'exact (auto: device is "cpu-emulated", for which updates are exact)')


def test_without_the_shape_of_a_batch_there_is_no_forecast(tmp_path: Path) -> None:
    mode, said = chosen(config(tmp_path).model_copy(update={"train": None}), SLOW)
    assert mode == "exact" and "train.batch and train.seq" in said


def test_a_model_that_asks_for_values_has_no_forecast(tmp_path: Path) -> None:
    found = choose_updates(config(tmp_path), forecast_runs.Looking, rates=SLOW).update
    assert found.mode == "exact" and "cannot be performed without values" in found.said


@pytest.mark.parametrize("mode", ["exact", "lock-free"])
def test_a_run_goes_on_in_the_mode_of_its_commits(mode: str, tmp_path: Path) -> None:
    with offload.initialize(model(), config(tmp_path, mode=mode)) as engine:
        engine.save()
    with offload.initialize(model(), config(tmp_path)) as engine:
        assert engine.resume() is not None
        assert engine.memory_report().updates == f"{mode} (auto: as the commits in ssd.paths were made)"
        assert engine.config.update.mode == mode


@pytest.mark.parametrize("way", ["plain", "deferred"])
@pytest.mark.parametrize(("rates", "mode"), [(FAST, "exact"), (SLOW, "lock-free")])
def test_prepare_trains_in_the_mode_chosen(
    way: str, rates: Rates, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_choice, "disk_rates", lambda config: rates)
    asked = config(tmp_path)
    torch.manual_seed(1)
    if way == "plain":
        ours = model()
        values = copy.deepcopy(ours.state_dict())
    else:
        with offload.deferred_init(asked):
            ours = model()
    ours, optimizer = offload.prepare(ours, adamw, asked)
    engine: offload.Engine = optimizer.engine  # type: ignore[attr-defined]
    with engine:
        assert LINE.match(engine.memory_report().updates) and engine.config.update.mode == mode
        if way == "plain":
            assert all(torch.equal(values[name], value) for name, value in ours.state_dict().items())
        x = torch.randint(0, 256, (2, TOKENS))
        ours(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()
