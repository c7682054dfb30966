"""With a device tier above host memory results are plain PyTorch's, bit for bit, as long as every layer fits on the
device."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cross_references import check_mover
from edits import EDITS
from late_device import late_device
from pairwise import each_value, every_third, full_product
from parity import Parity, adamw, smallest_ram, state_bytes
from small_runs import assert_closed, assert_equal, batches, built, config, train, train_plain
from tiny_models import CASES
from torch import nn

import offload
from pagemem.residency.paged_tensor import Residency
from pagemem.residency.upload import Upload
from pagemem.tier import Tier

PAGE_BYTES = 64 << 10


def smallest_device(parity: Parity) -> int:
    """The smallest device budget that works, found by doing what the error says."""
    device_bytes = PAGE_BYTES
    for _ in range(8):
        parity.memory = {"device": device_bytes}
        try:
            parity.run()
            return device_bytes
        except offload.BudgetError as error:
            assert "memory.device" in str(error) and error.smallest_bytes > device_bytes
            device_bytes = error.smallest_bytes
    raise AssertionError("no device budget works")


@each_value(
    name=tuple(CASES), device=["smallest", "all parameters", "some states", "all states"], clip_norm=[None, 0.5]
)
def test_every_step_equals_plain_torch(name: str, device: str, clip_norm: float | None, tmp_path: Path) -> None:
    accumulation = 3 if name == "gpt" else 1
    parity = Parity(CASES[name], tmp_path, state_bytes(CASES[name]) // 2 + (1 << 20), clip_norm, accumulation)
    device_bytes = {"some states": 3 << 20}.get(device, 64 << 20)
    device_bytes = smallest_device(dataclasses.replace(parity, steps=2)) if device == "smallest" else device_bytes
    parity.memory = {"device": device_bytes, "device_states": "auto" if "states" in device else "never"}
    assert parity.run().steps == parity.steps


@every_third(1, name=tuple(CASES), clip_norm=[None, 0.5])
def test_host_memory_may_be_as_small_as_without_a_device(name: str, clip_norm: float | None, tmp_path: Path) -> None:
    parity = Parity(CASES[name], tmp_path, 0, clip_norm, each_step=False)
    parity.ram = smallest_ram(dataclasses.replace(parity, steps=2))
    parity.memory = {"device": "1MiB"}
    stats = parity.run()
    assert stats.bytes_read > 0 and stats.bytes_written > 0


@every_third(2, name=tuple(CASES), clip_norm=[None, 0.5])
def test_both_plans_are_followed(name: str, clip_norm: float | None, tmp_path: Path) -> None:
    parity = Parity(
        CASES[name], tmp_path, state_bytes(CASES[name]) // 2 + (1 << 20), clip_norm, each_step=False, steps=10
    )
    parity.memory = {"device": "1MiB"}
    stats = parity.run()
    assert stats.deviations == 0
    assert stats.planned_steps >= parity.steps - 4, "one more step on demand for each plan of the device"


@each_value(name=["gpt", "tied"], clip_norm=[None, 0.5], late=[False, True])
def test_tensors_that_are_read_in_many_requests_are_copied_as_they_come(
    name: str, clip_norm: float | None, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = Parity(
        CASES[name], tmp_path, state_bytes(CASES[name]) // 4 + (1 << 20), clip_norm, each_step=False, steps=8
    )
    parity.memory, parity.ssd = (
        {"device": "1MiB", "device_states": "never"},
        {"max_request": "8KiB", "limit_mb_per_s": 100.0},
    )
    taken: list[bool] = []
    take = Upload.take
    monkeypatch.setattr(Upload, "take", lambda upload: (taken.append(not upload.tensor.readable), take(upload))[1])
    with late_device(monkeypatch) if late else nullcontext():
        stats = parity.run()
    assert stats.deviations == 0 and any(taken), "some are copied while they are read"


def three_tiers(folder: Path, device: int | str = "1MiB", **update: Any) -> dict[str, Any]:
    """The small run with a device tier."""
    made = config(folder, **update)
    return made | {"device": "cpu-emulated", "memory": made["memory"] | {"device": device}}


@full_product(edit=tuple(EDITS), dtype=["fp32", "bf16"], device=["1MiB", "64MiB"])
def test_edits_reach_host_memory(edit: Any, dtype: str, device: str, tmp_path: Path) -> None:
    made = three_tiers(tmp_path, device, start="step") | {"model": {"factory": "unused:unused", "dtype": dtype}}
    with offload.initialize(built(), made, lambda ps: torch.optim.SGD(ps, lr=0.0, fused=True)) as engine:
        edit(engine.model, 2.0)
        train(engine, 4)
        edit(engine.model, 3.0)
        train(engine, 1)
        engine.drain()
        engine.debug.driver.evict_all()
        weight = engine.model.get_parameter("tok.weight")
        assert torch.equal(weight, torch.full_like(weight, 3.0))
    assert_closed(engine)


@pytest.mark.parametrize("states", ["auto", "never"])
def test_a_view_in_use_sees_the_update_as_in_plain_torch(states: str, tmp_path: Path) -> None:
    plain, made = built(), three_tiers(tmp_path, device="8MiB")
    made["memory"]["device_states"] = states
    with offload.initialize(built(), made, adamw) as engine:
        weight = engine.model.get_parameter("blocks.0.up.weight")
        view = weight.detach()[:4]
        train(engine, 3)
        train_plain(plain, adamw(plain.parameters()), 3)
        assert torch.equal(view, plain.get_parameter("blocks.0.up.weight")[:4])
        assert_equal(engine.model, plain)
        del view
    assert_closed(engine)


@each_value(device=["1MiB", "3MiB", "64MiB"], clip_norm=[None, 0.5])
def test_a_run_goes_on_from_a_commit(clip_norm: float | None, device: str, tmp_path: Path) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    for batch in batches(6):
        plain(*batch).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    made = three_tiers(tmp_path, device, clip_norm=clip_norm)
    with offload.initialize(built(), made, adamw) as engine:
        for batch in batches(6)[:3]:
            engine.backward(engine(*batch))
            engine.step()
        engine.save()
        for batch in batches(2):
            engine.backward(engine(*batch))
            engine.step()
        resumed = engine.resume()
        assert resumed is not None and resumed.step == 3
        for batch in batches(6)[3:]:
            engine.backward(engine(*batch))
            engine.step()
        assert_equal(engine.model, plain)
    with offload.initialize(built(), made, adamw) as engine:
        assert engine.resume() is not None
        for batch in batches(6)[3:]:
            engine.backward(engine(*batch))
            engine.step()
        assert_equal(engine.model, plain)
    assert_closed(engine)


def test_what_is_on_the_device_is_reported_and_within_its_budget(tmp_path: Path) -> None:
    with offload.initialize(built(), three_tiers(tmp_path), adamw) as engine:
        train(engine, 9)
        use = engine.memory_report().tiers["device"]
        assert use.budget_bytes == 1 << 20 and 0 < use.peak_bytes <= 1 << 20
        assert use.peak_pages == use.planned_peak_pages
        device = engine.debug.device_tier
        assert device is not None and device.mover.tier is Tier.DEVICE
        check_mover(device.mover)
        with torch.no_grad():
            engine(*batches(1)[0])
        n_on_device = sum(t.state is Residency.CLEAN for t in device.mover.tensors.values())
        assert 0 < n_on_device < len(device.mover.tensors)
    assert_closed(engine)
    assert device.budget.used_bytes == 0
    assert not any(thread.name == "pagemem-h2d" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu-emulated"}, "set memory.device"),
        ({"memory": {"ram": "1MiB", "device": "1MiB"}}, "leave memory.device out"),
        (
            {"device": "cpu-emulated", "memory": {"ram": "1MiB", "device": "1MiB"}, "update": {"mode": "lock-free"}},
            "update.mode",
        ),
        ({"device": "cpu-emulated", "memory": {"ram": "1MiB", "device": "1KiB"}}, "less than one page"),
    ],
)
def test_combinations_that_do_not_work_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(offload.ConfigError, match=message):
        offload.load_config({"memory": {"ram": "1MiB"}, "ssd": {"paths": [str(tmp_path)]}} | changes)


def test_a_layer_that_does_not_fit_on_the_device_is_named(tmp_path: Path) -> None:
    plain = built()
    with pytest.raises(offload.BudgetError, match=r"memory\.device is .*, but blocks\.0\.qkv.* alone takes") as caught:
        offload.initialize(plain, three_tiers(tmp_path, device=PAGE_BYTES), adamw)
    assert caught.value.smallest_bytes > PAGE_BYTES
    assert all(type(parameter) is nn.Parameter for parameter in plain.parameters())
