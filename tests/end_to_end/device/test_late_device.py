"""A device that does what it is given later: nobody waits for it but compute itself, and results are plain PyTorch's,
bit for bit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from late_device import late_device
from pairwise import every_third
from parity import Parity, adamw, state_bytes
from small_runs import assert_closed, assert_equal, batches, built, config, train, train_plain
from tiny_models import CASES

import offload
from offload import knobs


@every_third(0, name=tuple(CASES), clip_norm=[None, 0.5])
def test_every_step_equals_plain_torch(
    name: str, clip_norm: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulation = 3 if name == "gpt" else 1
    parity = Parity(CASES[name], tmp_path, state_bytes(CASES[name]) // 2 + (1 << 20), clip_norm, accumulation, steps=8)
    parity.memory = {"device": "1MiB"}
    with late_device(monkeypatch) as device:
        stats = parity.run()
        assert device.followed and device.brought
    assert stats.deviations == 0 and stats.planned_steps >= parity.steps - 4


@every_third(1, name=tuple(CASES), limit=[0, "64KiB"])
def test_saved_tensors_go_down_and_come_back_late(
    name: str, limit: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)
    accumulation = 3 if name == "gpt" else 1
    parity = Parity(CASES[name], tmp_path, state_bytes(CASES[name]) // 2 + (1 << 20), None, accumulation, steps=9)
    parity.memory = {"device": "1MiB", "activations": limit}
    with late_device(monkeypatch, late_s=0.0005) as device:
        stats = parity.run()
        assert device.saved or name == "recompute_reentrant" or limit
    assert stats.deviations == 0 and stats.planned_steps >= parity.steps - 5


def test_compute_goes_on_behind_what_is_on_its_way_down_only_for_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the limit may be on its way; what is older is waited for by the device, before its memory is used
    again."""
    made = config(tmp_path, ram=4 << 20)
    made |= {
        "device": "cpu-emulated",
        "memory": made["memory"] | {"device": "8MiB", "activations": "128KiB", "recompute": "never"},
    }
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)
    most_bytes = 0
    with late_device(monkeypatch, late_s=0.002) as device, offload.initialize(built(), made, adamw) as engine:
        saved = engine.debug.binder.activations
        assert saved is not None

        def look(*_: object) -> None:
            nonlocal most_bytes
            most_bytes = max(most_bytes, sum(leaving.n_bytes for leaving in saved._leaving))

        for module in engine.model.modules():
            module.register_forward_hook(look)
        train(engine, 4)
        assert device.saved and 0 < most_bytes <= saved._leaving_limit_bytes == 32 << 10
        assert not saved._leaving, "the backward pass needs what it asks for, and the memory"
    assert_closed(engine)


def test_a_device_that_fails_to_copy_a_saved_tensor_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path, ram=4 << 20)
    made |= {"device": "cpu-emulated", "memory": made["memory"] | {"device": "8MiB", "activations": 0}}
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)
    with late_device(monkeypatch) as device, offload.initialize(built(), made, adamw) as engine:
        train(engine, 1)
        copy_out = device.copy_out

        def failing(source: torch.Tensor, into: torch.Tensor) -> object:
            device.fails = RuntimeError("the device is lost")
            return copy_out(source, into)

        monkeypatch.setattr(device, "copy_out", failing)
        with pytest.raises(RuntimeError, match="the device is lost"):
            train(engine, 2)
        monkeypatch.undo()
        with suppress(RuntimeError):
            engine.close()
    assert_closed(engine)


def test_the_device_is_asked_for_times_only_until_the_plan_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking means waiting for it: the step that is traced and three by the first plan are timed, no later one."""
    made = config(tmp_path)
    made |= {"device": "cpu-emulated", "memory": made["memory"] | {"device": "1MiB"}}
    with late_device(monkeypatch) as device, offload.initialize(built(), made, adamw) as engine:
        timed, marked = [], []
        for _ in range(9):
            before = device.timed, device.stamped
            train(engine, 1)
            timed.append(device.timed > before[0])
            marked.append(device.stamped > before[1])
        assert timed == [False, True, False, True, True, True, False, False, False]
        assert marked == [True, True, False, True, True, True, False, False, False], (
            "nobody is to ask for the times of the others"
        )
        assert engine.stats().deviations == 0


@pytest.mark.parametrize("device_bytes", ["1MiB", "8MiB"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_changes_nothing_and_training_goes_on(
    value: float, device_bytes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, made = built(), config(tmp_path, ram=4 << 20)
    made |= {"device": "cpu-emulated", "memory": made["memory"] | {"device": device_bytes}}
    optimizer = adamw(plain.parameters())
    with late_device(monkeypatch), offload.initialize(built(), made, adamw) as engine:
        for step, batch in enumerate(batches(6)):
            if step == 3:
                with pytest.raises(
                    offload.NonFiniteError,
                    match=f"loss of step 4 is {value}: no parameter changed by it; .*learning rate",
                ):
                    engine.backward(engine(*batch) * value)
                    engine.step()
                engine.debug.driver.updates.finish()  # of the step before
                assert engine.debug.updater.direct_bytes == 0
                assert_equal(engine.model, plain)
            plain(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(engine(*batch))
            assert engine.step()
        assert_equal(engine.model, plain)
    assert_closed(engine)


def test_gradients_of_an_earlier_loss_outlive_one_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two micro-batches the second one fails: the first one's gradients are those of a step made without it."""
    plain, made = built(), config(tmp_path, ram=4 << 20, start="step")
    made |= {"device": "cpu-emulated", "memory": made["memory"] | {"device": "8MiB"}}
    optimizer = adamw(plain.parameters())
    with late_device(monkeypatch), offload.initialize(built(), made, adamw) as engine:
        good, bad = batches(2)
        engine.backward(engine(*good))
        with pytest.raises(offload.NonFiniteError, match="loss of step 1 is nan"):
            engine.backward(engine(*bad) * float("nan"))
            engine.step()
        engine.optimizer.step()
        plain(*good).backward()
        optimizer.step()
        assert_equal(engine.model, plain)


def test_nobody_waits_for_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path)
    made |= {"device": "cpu-emulated", "memory": made["memory"] | {"device": "1MiB"}}
    with late_device(monkeypatch) as device, offload.initialize(built(), made, adamw) as engine:
        ((x, y),) = batches(1)
        loss = engine(x, y)
        device.late_s = 0.5
        engine.debug.updater.expect(loss, 1)
        expected = engine.debug.updater._downloads._loss
        assert not expected.there.reached()
        device.late_s = 0.0
        loss.backward()
        engine.optimizer.step()
        assert expected.checked and engine.debug.updater._downloads._loss is None


def test_gradients_go_on_when_younger_ones_need_their_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The updater is behind compute by the bytes of the largest unit's gradients, not by a step, and not by nothing."""
    made = config(tmp_path, ram=4 << 20)
    made |= {"device": "cpu-emulated", "memory": made["memory"] | {"device": "8MiB", "device_states": "never"}}
    with late_device(monkeypatch) as device:
        with offload.initialize(built(), made, adamw) as engine:
            train(engine, 4)
            largest_bytes = max(unit.gradient_bytes for unit in engine.debug.units)
            behind: list[int] = []
            updated = engine.debug.store.updated
            with monkeypatch.context() as watched:
                watched.setattr(
                    engine.debug.updater._update,
                    "_updated",
                    lambda unit: (behind.append(engine.debug.updater.direct_bytes), updated(unit)),
                )
                train(engine, 1)
            use = engine.memory_report().tiers["host"]
            assert len(behind) == len(engine.debug.units)
            assert 0 < max(behind) <= 2 * largest_bytes and behind[-1] <= largest_bytes
            assert use.budget_bytes is not None and use.peak_bytes <= use.budget_bytes
            assert engine.debug.updater.direct_bytes == 0, "the optimizer step leaves none on its way"
        assert_closed(engine)
        assert device.brought == 5 * (1 + sum(1 for _ in built().parameters())), "the loss, and every gradient"


def test_a_copy_that_fails_on_the_device_is_raised_on_the_training_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path)
    made |= {"device": "cpu-emulated", "memory": made["memory"] | {"device": "1MiB"}}
    with late_device(monkeypatch) as device:
        engine = offload.initialize(built(), made, adamw)
        train(engine, 3)
        device.fails = RuntimeError("the device is gone")
        with pytest.raises(RuntimeError, match="the device is gone"):
            train(engine, 2)
        with suppress(RuntimeError):  # who follows the copy hears of it, and once more whoever asks for failures next
            engine.close()
        assert_closed(engine)


def test_values_edited_and_saved_are_those_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made = built(), config(tmp_path)
    made |= {"device": "cpu-emulated", "memory": made["memory"] | {"device": "1MiB"}}
    with late_device(monkeypatch):
        with offload.initialize(built(), made, adamw) as engine:
            with torch.no_grad():
                for ours, theirs in zip(engine.model.parameters(), plain.parameters(), strict=True):
                    with offload.gathered([ours]):
                        ours.mul_(0.5)
                    theirs.mul_(0.5)
            optimizer = adamw(plain.parameters())
            train(engine, 3)
            train_plain(plain, optimizer, 3)
            assert_equal(engine.model, plain)
            engine.save()
            train(engine, 1)
            assert engine.resume() is not None
            assert_equal(engine.model, plain)
            assert torch.equal(engine(*batches(1)[0]), plain(*batches(1)[0]))
        assert_closed(engine)


def test_what_the_backward_pass_needs_next_is_on_its_way_up_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One storage ahead of the op that needs it, and none left behind."""
    made = config(tmp_path, ram=4 << 20)
    memory = made["memory"] | {"device": "8MiB", "activations": 0, "recompute": "never"}
    made |= {"device": "cpu-emulated", "memory": memory}
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)
    plain = built()
    optimizer = adamw(plain.parameters())
    with late_device(monkeypatch), offload.initialize(built(), made, adamw) as engine:
        saved = engine.debug.binder.activations
        assert saved is not None
        begin, read = saved._begin_read, saved._read
        begun: list[object] = []
        ahead: list[bool] = []

        def begins(storage: object) -> object:
            begun.append(storage)
            return begin(storage)

        def reads(storage: object) -> object:
            ahead.append(any(storage is other for other in begun))
            return read(storage)

        train(engine, 3)
        monkeypatch.setattr(saved, "_begin_read", begins)
        monkeypatch.setattr(saved, "_read", reads)
        train(engine, 1)
        assert ahead.count(False) == 1 and len(ahead) > 5, "all but the one that is needed first"
        assert saved._ahead is None and not saved._written
        train_plain(plain, optimizer, 3)
        train_plain(plain, optimizer, 1)
        assert_equal(engine.model, plain)
        assert engine.stats().deviations == 0
