"""Device-resident units: nothing of them moves in a step, and everything else about them is as
anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cross_references import check_mover
from late_device import late_device
from pairwise import each_value, every_third
from parity import Parity, adamw, state_bytes
from safetensors.torch import load_file
from small_runs import assert_closed, assert_equal, built, config, train, train_plain
from tiny_models import CASES

import offload
from offload import knobs
from pagemem.errors import StorageError
from pagemem.files.page_file import PageFiles
from pagemem.tier import Tag

ALL, SOME = "64MiB", "3MiB"


def homes(folder: Path, device: str = ALL, states: str = "auto", dtype: str = "fp32", **update: Any) -> dict[str, Any]:
    """The small run with a device that has room for states."""
    made = config(folder, **update)
    memory = made["memory"] | {"device": device, "device_states": states}
    return made | {"device": "cpu-emulated", "memory": memory, "model": {"factory": "unused:unused", "dtype": dtype}}


@every_third(0, name=tuple(CASES), clip_norm=[None, 0.5], device=[SOME, ALL])
def test_on_a_late_device_every_step_equals_plain_torch(
    name: str, clip_norm: float | None, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulation = 3 if name == "gpt" else 1
    parity = Parity(CASES[name], tmp_path, state_bytes(CASES[name]) // 2 + (1 << 20), clip_norm, accumulation, steps=8)
    parity.memory = {"device": device}
    with late_device(monkeypatch):
        stats = parity.run()
    assert stats.deviations == 0 and stats.planned_steps >= parity.steps - 4 and stats.device_units > 0


@each_value(name=["gpt", "recompute", "two_backwards"], device=[SOME, ALL])
def test_saved_tensors_go_to_host_pages_beside_units_at_home(
    name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)
    parity = Parity(CASES[name], tmp_path, state_bytes(CASES[name]) // 2 + (1 << 20), steps=10, each_step=False)
    parity.memory = {"device": device, "activations": "64KiB"}
    with late_device(monkeypatch) as late:
        stats = parity.run()
        assert late.saved and stats.deviations == 0 and stats.device_units > 0


@pytest.mark.parametrize(
    "update",
    [{}, {"clip_norm": 0.5}, {"accumulation": 2}, {"start": "step"}],
    ids=["eager", "clipped", "accumulated", "at the step"],
)
def test_where_all_are_at_home_nothing_moves(
    update: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with late_device(monkeypatch) as device, offload.initialize(built(), homes(tmp_path, **update), adamw) as engine:
        train(engine, 16)
        before, brought, followed = engine.stats(), device.brought, device.followed
        train(engine, 4)
        made = engine.stats().since(before)
        assert made.planned_steps == made.steps and made.deviations == made.bytes_read == made.bytes_written == 0
        assert made.device_units == len(engine.debug.units)
        assert device.brought - brought == 4, "the losses, and no gradient"
        assert device.followed == followed
        assert engine.planned_step_s is not None and engine.planned_step_s > 0
        tiers = engine.memory_report().tiers
        assert tiers["host"].peak_pages == tiers["host"].planned_peak_pages == 0
        assert tiers["device"].peak_pages == tiers["device"].planned_peak_pages
    assert_closed(engine)


@each_value(
    devices=[(ALL, ALL), (ALL, "1MiB"), ("1MiB", ALL), (SOME, "cpu"), ("cpu", SOME)],
    dtype=["fp32", "bf16"],
)
def test_a_commit_does_not_say_where_units_were_at_home(devices: tuple[str, str], dtype: str, tmp_path: Path) -> None:
    made_with, goes_on_with = devices

    def of(device: str) -> dict[str, Any]:
        made = homes(tmp_path, dtype=dtype)
        if device == "cpu":
            return made | {"device": "cpu", "memory": config(tmp_path)["memory"]}
        return made | {"memory": made["memory"] | {"device": device}}

    with offload.initialize(built(), of("cpu") | {"ssd": {"paths": [str(tmp_path / "whole")]}}, adamw) as whole:
        train(whole, 3)
        train(whole, 2)
        expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
        states = whole.optimizer.state_dict()["state"]
    with offload.initialize(built(), of(made_with), adamw) as engine:
        train(engine, 3)
        engine.save()
    assert_closed(engine)
    with offload.initialize(built(), of(goes_on_with), adamw) as engine:
        assert engine.resume() is not None
        train(engine, 2)
        for name, value in engine.model.state_dict().items():
            assert torch.equal(value, expected[name]), name
        for number, state in engine.optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, states[number][name]) for name, value in state.items())
    assert_closed(engine)


@pytest.mark.parametrize("device", [SOME, ALL])
def test_training_goes_on_beside_a_commit_in_the_background(device: str, tmp_path: Path) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    with offload.initialize(built(), homes(tmp_path, device), adamw) as engine:
        for _ in range(3):
            train(engine, 2)
            train_plain(plain, optimizer, 2)
            engine.save(wait=False)
        assert_equal(engine.model, plain)
        kept = {name: value.clone() for name, value in plain.state_dict().items()}
        train(engine, 2)
        assert engine.resume() is not None
        for name, value in engine.model.state_dict().items():
            assert torch.equal(value, kept[name]), "the commit is of its moment"
    assert_closed(engine)


@pytest.mark.parametrize("states", ["auto", "never"])
def test_what_is_written_through_a_view_in_use_is_in_the_next_commit(states: str, tmp_path: Path) -> None:
    with offload.initialize(built(), homes(tmp_path, states=states), adamw) as engine:
        train(engine, 2)
        view = engine.model.get_parameter("blocks.0.up.weight").detach()
        engine.save()
        view.fill_(5.0)
        engine.save()
        view.fill_(6.0)
        assert bool((engine.model.state_dict()["blocks.0.up.weight"] == 6.0).all())
        del view
        assert engine.resume() is not None
        assert bool((engine.model.state_dict()["blocks.0.up.weight"] == 5.0).all())
    assert_closed(engine)


def test_weights_are_exported_as_they_are_on_the_device(tmp_path: Path) -> None:
    with offload.initialize(built(), homes(tmp_path), adamw) as engine:
        train(engine, 3)
        folder = engine.export(tmp_path / "exported")
        expected = engine.model.state_dict()
    found = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    assert found and all(torch.equal(value, expected[name]) for name, value in found.items())


def test_states_of_an_optimizer_are_taken_over_on_the_device(tmp_path: Path) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    train_plain(plain, optimizer, 3)
    with offload.initialize(built(), homes(tmp_path), adamw) as engine:
        engine.model.load_state_dict(plain.state_dict())
        engine.optimizer.load_state_dict(optimizer.state_dict())
        train(engine, 3)
        train_plain(plain, optimizer, 3)
        assert_equal(engine.model, plain)
    assert_closed(engine)


def test_a_commit_that_finds_no_room_leaves_the_device_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    with offload.initialize(built(), homes(tmp_path), adamw) as engine:
        train(engine, 3)
        train_plain(plain, optimizer, 3)

        def full(*_: object, **__: object) -> None:
            raise StorageError("no space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(PageFiles, "write", full)
            with pytest.raises(StorageError, match="no space left"):
                engine.save()
        assert_equal(engine.model, plain)
        engine.save()
        train(engine, 1)
        assert engine.resume() is not None
        assert_equal(engine.model, plain)
    assert_closed(engine)


def test_states_are_reported_where_they_are(tmp_path: Path) -> None:
    with offload.initialize(built(), homes(tmp_path, clip_norm=1.0), adamw) as engine:
        train(engine, 4)
        device = engine.debug.device_tier
        assert device is not None
        check_mover(device.mover)
        held = {tensor.tag for tensor in device.mover.tensors.values() if tensor.frame is not None}
        assert held == {Tag.PARAM, Tag.MOMENT, Tag.GRAD}
        with engine.profile(tmp_path / "profile") as profile:
            train(engine, 2)
        assert profile.summary is not None
    assert_closed(engine)


def test_never_means_never(tmp_path: Path) -> None:
    with offload.initialize(built(), homes(tmp_path, states="never"), adamw) as engine:
        train(engine, 5)
        assert engine.stats().device_units == 0 and engine.stats().bytes_read > 0
    assert_closed(engine)
