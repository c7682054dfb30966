"""`offload plan` of lock-free configurations against the engine: the same ops, units and pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forecast_runs import RATES, gpt_config, trained
from pairwise import each_value

from offload.forecast.explained import explained_rows
from offload.forecast.forecast import forecast
from pagemem.telemetry.events import EventKind


@each_value(ram=[6 << 20, 8 << 20, 64 << 20], clip_norm=[None, 0.5], on_time=["auto", "never"])
def test_lock_free_units_and_pages_are_those_of_the_engine(
    ram: int, clip_norm: float | None, on_time: str, tmp_path: Path
) -> None:
    update = {"mode": "lock-free", "exact_steps": 0, "clip_norm": clip_norm, "on_time": on_time}
    config = gpt_config(tmp_path, ram, update=update)
    report, start_pages, plan = trained(config)
    found = forecast(config, RATES)
    assert found.start.ssd_pages == start_pages
    assert found.ops == plan.ops_per_step
    assert found.step.host_pages == report.tiers["host"].planned_peak_pages
    assert found.step.host_bytes <= ram
    assert found.times.step_s >= found.times.compute_s > 0
    if ram == 64 << 20:
        assert found.times.waits_s["update"] == 0.0
        assert (found.times.busy["update"] > 0) is (on_time == "never") and found.times.read_bytes == 0.0


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_gradients_on_their_way_are_memory_of_the_process(clip_norm: float | None, tmp_path: Path) -> None:
    exact, late = (
        forecast(gpt_config(tmp_path, 64 << 20, update={"mode": mode, "clip_norm": clip_norm}), RATES)
        for mode in ("exact", "lock-free")
    )
    assert late.process_bytes - late.base_bytes == late.step.host_pages * late.page_bytes + late.tensor_bytes
    assert late.tensor_bytes >= exact.tensor_bytes + 4 * late.parameters


def test_the_plan_file_and_the_explanation_have_the_tasks_of_both_threads(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, 6 << 20, update={"mode": "lock-free", "exact_steps": 0})
    _, _, plan = trained(config)
    assert plan.updates is not None
    kept = json.loads((Path(config.ssd.paths[0]) / "plan.json").read_text())["updates"]
    assert len(kept["tasks"]) == len(plan.updates.tasks) and kept["rounds"] == plan.updates.n_steps
    assert {task["lane"] for task in kept["tasks"]} == {"ssd_read", "update", "ssd_write"}
    assert all(task["frame"] >= kept["first_frame"] for task in kept["tasks"] if task["kind"] == "load")
    assert [op for unit in kept["units"] for op in unit["ops"]] == list(range(len(kept["ops"])))
    explained = forecast(config, RATES, explained=True).explained
    assert explained is not None
    beside = [task for task in explained.tasks if task.beside]
    assert {task.kind for task in beside} == {"load", "update", "store"}
    rows = [row for row in explained_rows(explained) if any(text.startswith("beside: ") for text in row)]
    assert len(rows) == len(beside)
    assert [event for event in explained.recording.events if event.kind is EventKind.UPDATE]
