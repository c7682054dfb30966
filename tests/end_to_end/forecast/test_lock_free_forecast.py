"""`offload plan` of lock-free configurations against the engine: the same ops, units and pages."""

from __future__ import annotations

from pathlib import Path

from forecast_runs import RATES, gpt_config, trained
from pairwise import each_value

from offload.forecast.forecast import forecast


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
