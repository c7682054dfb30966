"""RAM of the whole process, kernels, and what fits: the parts of `offload plan` beside pages and plan."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forecast_runs import CASES, HERE, LITTLE_RAM, PAGE_BYTES, RATES, ROWS, STEPS, TOKENS, gpt_config
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import offload
from offload.budget.verdict import Available
from offload.cli import main
from offload.config import ConfigError
from offload.factories import factory_of
from offload.forecast.fit import Taken, advice, taken_by
from offload.forecast.forecast import forecast
from offload.forecast.meta_tier import AttentionOfCpu
from offload.forecast.rates import rates_of
from offload.forecast.report import fit_rows, forecast_rows, shown
from offload.profiling.live_storages import Holder, LiveStorages


@pytest.mark.parametrize("case", ["plain", "bf16", "clipped", "tied", "views", "recomputed"])
def test_tensors_outside_of_the_pages_are_those_of_a_real_step(case: str, tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM, **CASES[case])
    assert config.model is not None
    with offload.deferred_init(config):
        model = factory_of("model.factory", config.model.factory, config.model.arguments)()
    now = peak = 0

    def changed(_holder: Holder, more_bytes: int) -> None:
        nonlocal now, peak
        now += more_bytes
        peak = max(peak, now)

    with offload.initialize(model, config) as engine:
        x = torch.randint(0, 256, (ROWS, TOKENS))
        with LiveStorages(changed):
            for _ in range(STEPS):
                engine.backward(engine(x, x))
                engine.optimizer.step()
                engine.optimizer.zero_grad()
    found = forecast(config, RATES)
    assert found.tensor_bytes == pytest.approx(peak, rel=0.02)
    assert found.process_bytes > found.tensor_bytes + found.step.host_pages * PAGE_BYTES + (50 << 20)


def test_attention_is_one_kernel_as_on_a_cpu() -> None:
    def attention(query: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)

    def kernels(device: str, recompute: bool) -> list[str]:
        with torch.device(device), AttentionOfCpu(), Kernels() as seen:
            query = torch.zeros(2, 4, 16, 8, requires_grad=True)
            result = (
                torch.utils.checkpoint.checkpoint(attention, query, use_reentrant=False)
                if recompute
                else attention(query)
            )
            result.sum().backward()
        return [name for name in seen.names if "attention" in name or "mm" in name]

    forward, backward = (
        f"aten._scaled_dot_product_flash_attention_for_cpu{which}.default" for which in ("", "_backward")
    )
    assert kernels("meta", recompute=False) == kernels("cpu", recompute=False) == [forward, backward]
    assert kernels("meta", recompute=True) == kernels("cpu", recompute=True) == [forward, forward, backward]


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which kernels are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One kernel."""
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_without_rates_kernels_are_timed_here(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM)
    found = forecast(config, rates_of(config))
    assert (
        (found.rates.flops, found.rates.ram) == (None, None) and found.kernels_timed > 20 and found.kernels_rated == 0
    )
    assert found.times.step_s >= found.times.compute_s > 0
    assert f"{found.kernels_timed} kernels timed here in " in dict(forecast_rows(found))["at these rates"]


def test_what_does_not_fit_says_what_to_change(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, 64 << 20, commit={"every_steps": 10, "keep": 3})
    taken, mib = Taken(100 << 20, 50 << 20), 1 << 20
    assert advice(config, Available(100 * mib, 50 * mib), taken, 10 * mib, mib) == ()
    assert advice(config, Available(98 * mib, 50 * mib), taken, 10 * mib, mib) == (
        "set memory.ram to 8388608 (8.0 MiB) or less",
    )
    far = advice(config, Available(50 * mib, 49 * mib), taken, 10 * mib, mib)
    assert far[0].startswith(
        "lower memory.ram (the smallest that works is 1048576) is not enough by itself: 50.0 MiB are missing"
    )
    assert "memory.activations" in far[1] and "train.batch" in far[1]
    assert (
        far[2]
        == "free 1.0 MiB in the file systems of ssd.paths, name another disk there or keep fewer commits (commit.keep)"
    )


@pytest.mark.long
def test_a_device_of_its_own_is_another_thing_to_fit_in(tmp_path: Path) -> None:
    config = gpt_config(
        tmp_path, LITTLE_RAM, device="cpu-emulated", memory={"ram": LITTLE_RAM, "page": PAGE_BYTES, "device": 1 << 20}
    )
    much = 1 << 40
    shared = forecast(config, RATES, Available(much, much))
    own = forecast(config, RATES, Available(much, much, much), largest=True)
    in_device = shared.step.device_bytes + shared.tensor_bytes
    assert own.process_bytes == own.base_bytes + own.step.host_bytes, "copies of the device's gradients are in RAM"
    assert own.step.host_bytes > own.step.host_pages * own.page_bytes
    assert shared.fit.taken.device_bytes == 0 and own.fit.taken.device_bytes == pytest.approx(in_device, rel=0.01)
    assert "device, in a step" in dict(forecast_rows(own)) and "device, in a step" not in dict(forecast_rows(shared))
    largest = own.fit.largest_batch
    assert largest is not None and largest > 1000
    small = forecast(config, RATES, Available(much, much, own.fit.taken.device_bytes + (1 << 20)), largest=True).fit
    assert small.fits and small.largest_batch is not None and ROWS < small.largest_batch < largest
    none = forecast(config, RATES, Available(much, much, 1 << 16), largest=True).fit
    assert not none.fits and none.advice[0].startswith("the device lacks ") and none.largest_batch == 0
    assert dict(fit_rows(none))["fits"].startswith("no: device ")


def test_this_machine_is_what_a_run_is_to_fit_in_unless_another_is_given(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM)
    here = forecast(config, RATES)
    assert here.fit.fits and here.fit.room.disk_bytes > 1 << 30 and here.fit.taken.ram_bytes == here.process_bytes
    assert here.fit.taken.disk_bytes == here.step.ssd_bytes
    other = forecast(config, RATES, Available(1 << 20, 1 << 40)).fit
    assert not other.fits and other.advice and dict(fit_rows(other))["fits"].startswith("no: RAM ")
    committing = forecast(gpt_config(tmp_path, LITTLE_RAM, commit={"every_s": 60}), RATES)
    assert committing.fit.taken.disk_bytes == committing.commit.ssd_bytes > committing.step.ssd_bytes


def test_a_run_that_goes_on_has_nothing_in_ram_at_first_and_its_export_is_as_large_as_forecast(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM, commit={"every_steps": 100, "keep": 1}, dtype="bf16")
    found = forecast(config, RATES)
    for going_on in (False, True):
        assert config.model is not None
        with offload.deferred_init(config):
            model = factory_of("model.factory", config.model.factory, config.model.arguments)()
        with offload.initialize(model, config) as engine:
            if going_on:
                engine.resume()
                assert engine.debug.mover.host.used_frames == found.resume.host_pages == 0
                assert engine.debug.mover.ssd.used_frames <= found.resume.ssd_pages
                continue
            for _ in range(2):
                x = torch.randint(0, 256, (ROWS, TOKENS))
                engine.backward(engine(x, x))
                engine.step()
            engine.save("last")
    assert main(["export", str(tmp_path / "pages"), "--to", str(tmp_path / "weights")]) == 0
    written = sum(file.stat().st_size for file in (tmp_path / "weights").glob("*.safetensors"))
    assert written == pytest.approx(found.export_bytes, rel=0.02)


def test_the_largest_batch_fits_and_one_row_more_does_not(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM)
    taken = forecast(config, RATES).fit.taken
    room = Available(taken.ram_bytes + (16 << 20), taken.disk_bytes)
    found = forecast(config, RATES, room, largest=True)
    largest = found.fit.largest_batch
    assert largest is not None and largest > ROWS and config.train is not None
    for rows, fits in ((largest, True), (largest + 1, False)):
        larger = config.model_copy(update={"train": config.train.model_copy(update={"batch": rows})})
        assert (taken_by(larger, found.base_bytes, room).ram_bytes <= room.ram_bytes) == fits


@pytest.mark.long
def test_the_largest_depth_is_what_memory_and_disk_allow(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM)
    taken = forecast(config, RATES).fit.taken
    much = 1 << 40
    by_disk = forecast(config, RATES, Available(much, 2 * taken.disk_bytes), largest=True).fit
    assert by_disk.depth_argument == "n_layer" and by_disk.largest_depth is not None and 6 <= by_disk.largest_depth <= 9
    none = forecast(config, RATES, Available(1, 1), largest=True).fit
    assert (none.largest_batch, none.largest_depth) == (0, 0)
    unnamed = forecast(
        gpt_config(tmp_path, LITTLE_RAM, model=f"{HERE}:Viewed"), RATES, Available(much, much), largest=True
    ).fit
    assert (unnamed.depth_argument, unnamed.largest_depth) == ("", None)
    with pytest.raises(ConfigError, match="--depth width: model.arguments has"):
        forecast(config, RATES, depth="width")


def test_timings_on_a_busy_machine_are_said_to_be_disturbed(tmp_path: Path) -> None:
    found = forecast(gpt_config(tmp_path, LITTLE_RAM), RATES)
    assert found.undisturbed_share == 1.0 and "disturbed" not in dict(forecast_rows(found))
    assert "disturbed" not in dict(forecast_rows(replace(found, undisturbed_share=0.95)))
    said = dict(forecast_rows(replace(found, undisturbed_share=0.71)))["disturbed"]
    assert said.startswith(
        "kernels had a processor for 71% of the time in which they were timed: something else computes on this machine"
    )


def test_progress_is_shown_on_a_terminal_alone(tmp_path: Path) -> None:
    config, stages = gpt_config(tmp_path, LITTLE_RAM), []
    forecast(config, RATES, Available(1 << 40, 1 << 40), largest=True, progress=stages.append)
    assert stages == [
        "the model without bytes",
        "a step without bytes",
        "the plan, followed on paper",
        "the largest batch and depth",
    ]
    for terminal in (False, True):
        out = io.StringIO()
        with shown(Console(file=out, force_terminal=terminal, width=80)) as heard:
            heard("a step without bytes")
        assert ("a step without bytes" in out.getvalue()) == terminal and bool(out.getvalue()) == terminal
