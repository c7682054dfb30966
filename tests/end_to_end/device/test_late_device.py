"""A device that does what it is given later: nobody waits for it but compute itself, and results are plain PyTorch's,
bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from late_device import LateMark, late_device
from parity import Parity, adamw, state_bytes
from small_runs import assert_closed, assert_equal, batches, built, config, train, train_plain
from tiny_models import CASES

import offload
from offload.activations import saved as activations
from offload.budget import checks as budget_checks


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("limit", [0, "64KiB"])
@pytest.mark.parametrize("name", CASES)
def test_saved_tensors_go_down_and_come_back_late(
    name: str, limit: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "LEAST_BYTES", 1024)
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
    monkeypatch.setattr(activations, "LEAST_BYTES", 1024)
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
    monkeypatch.setattr(activations, "LEAST_BYTES", 1024)
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
        expected = engine.debug.updater._loss
        assert not expected.there.reached()
        device.late_s = 0.0
        loss.backward()
        engine.optimizer.step()
        assert expected.checked and engine.debug.updater._loss is None


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
                    engine.debug.updater._updater,
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


# ---- a device that has failed, and what is held for one -------------------------------------------------------------


def on_late(tmp_path: Path, **memory: object) -> dict[str, object]:
    """The small run, with a device of its own memory."""
    made = config(tmp_path, ram=4 << 20)
    return made | {"device": "cpu-emulated", "memory": made["memory"] | {"device": "1MiB"} | memory}


@pytest.mark.parametrize("memory", [{}, {"activations": 0}, {"device": "8MiB"}], ids=str)
@pytest.mark.parametrize("asked", ["reached", "wait"])
def test_close_ends_after_the_device_failed_and_the_first_error_is_told(
    asked: str, memory: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an assertion in a kernel every call of CUDA raises, the question whether a copy is made included."""
    monkeypatch.setattr(activations, "LEAST_BYTES", 1024)

    def raises(_: LateMark) -> bool:
        raise RuntimeError(f"device-side assert, seen by {asked}")

    with late_device(monkeypatch) as device:
        with (
            pytest.raises(RuntimeError, match="device-side assert") as caught,
            offload.initialize(built(), on_late(tmp_path, **memory), adamw) as engine,
        ):
            train(engine, 3)
            device.die()
            with monkeypatch.context() as patched:
                for name in {"reached", "wait"} if asked == "reached" else {"wait"}:
                    patched.setattr(LateMark, name, raises)
                patched.setattr(device, "follow", lambda mark: mark.wait())
                try:
                    train(engine, 2)
                finally:
                    with suppress(RuntimeError):
                        engine.close()
        assert "device-side assert" in str(caught.value)
        assert_closed(engine)


@pytest.mark.parametrize("done", range(0, 8, 2))
def test_close_ends_where_an_edit_cannot_be_written_back(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step, when copies up for later ops are asked for."""
    with late_device(monkeypatch):
        engine = offload.initialize(built(), on_late(tmp_path, device="512KiB", device_states="never"), adamw)
        train(engine, 6)
        driver = engine.debug.device_tier.driver
        calls = 0

        def fails() -> None:
            nonlocal calls
            calls += 1
            if calls > done:
                raise RuntimeError("the device is lost")

        monkeypatch.setattr(driver, "_write_back", fails)
        with pytest.raises(RuntimeError, match="the device is lost"):
            train(engine, 1)
        assert driver.planned_steps
        with pytest.raises(RuntimeError, match="the device is lost"):
            engine.close()
        assert_closed(engine)


class Pinned:
    """Pins nothing, and remembers of how much it was asked to."""

    def __init__(self) -> None:
        self.now: dict[int, int] = {}
        self.ever: list[int] = []

    def __call__(self, address: int, n_bytes: int) -> Callable[[], None]:
        self.ever.append(n_bytes)
        self.now[address] = n_bytes
        return lambda: self.now.pop(address) and None


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_all_of_the_budget_is_pinned_once_and_no_more(
    clip_norm: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages, and one buffer for gradients: once their sizes are known, within ``memory.ram``, and until the engine is
    closed."""
    made, pinned = on_late(tmp_path), Pinned()
    made["update"] = {**made.get("update", {}), "clip_norm": clip_norm}
    with late_device(monkeypatch) as device:
        monkeypatch.setattr(device, "pin", pinned, raising=False)
        with offload.deferred_init(made):
            model = built()
        assert not pinned.ever, "sizes are not known before there is an optimizer"
        with offload.initialize(model, made, adamw) as engine:
            store = engine.debug.store
            largest_bytes = max(unit.gradient_bytes for unit in store.index.units)
            assert pinned.ever == [
                store.mover.arena.n_bytes,
                (2 if clip_norm is None else 1) * largest_bytes,
                losses_bytes := 4096,
            ]
            assert 4 << 20 >= sum(pinned.ever) - losses_bytes > (4 << 20) - store.page_bytes
            assert store.budget.used_bytes == sum(pinned.ever) - losses_bytes
            train(engine, 3)
            assert (
                len(pinned.ever) == len(pinned.now) == 3
                and store.budget.used_bytes == sum(pinned.now.values()) - losses_bytes
            ), "training pins nothing"
        assert_closed(engine)
        assert not pinned.now


def test_gradients_on_their_way_when_the_engine_is_closed_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that a device is still writing to is neither unpinned nor given back."""
    made, pinned = on_late(tmp_path, device_states="never"), Pinned()
    with late_device(monkeypatch, late_s=0.01) as device:
        monkeypatch.setattr(device, "pin", pinned, raising=False)
        with offload.initialize(built(), made, adamw) as engine:
            train(engine, 2)
            ((x, y),) = batches(1)
            engine(x, y).backward()
            waiting = list(engine.debug.updater._waiting)
            assert waiting and not waiting[-1].there.reached()
            assert all(one.source is not None for one in waiting if not one.there.reached()), (
                "the device is still reading them"
            )
            device.late_s = 0.0
        assert all(one.there.reached() for one in waiting) and not pinned.now
        del waiting
        assert_closed(engine)


def test_a_budget_that_cannot_be_locked_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_checks, "usable_bytes", lambda: (4 << 20) - 1)
    plain, model = built(), built()
    with late_device(monkeypatch) as device:
        with offload.initialize(built(), on_late(tmp_path), adamw) as engine:
            train(engine, 1)  # nothing is locked for a device that asks for no such thing
        monkeypatch.setattr(device, "pin", Pinned(), raising=False)
        with pytest.raises(
            MemoryError,
            match=r"memory\.ram is 4194304 bytes .*locked in RAM.*has 4194303 bytes .* left; lower memory\.ram",
        ) as caught:
            offload.initialize(model, on_late(tmp_path), adamw)
        assert "\n" not in str(caught.value)
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    assert_equal(model, plain)


@pytest.mark.parametrize("memory", [{}, {"device": "8MiB"}], ids=["streamed", "at home"])
def test_values_are_not_brought_down_or_up_where_that_is_not_ordered_with_compute(
    memory: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit from inside another stream would have what the device had some time."""
    with late_device(monkeypatch) as device, offload.initialize(built(), on_late(tmp_path, **memory), adamw) as engine:
        train(engine, 2)
        engine.save()
        kept = {name: value.clone() for name, value in engine.model.state_dict().items()}
        train(engine, 1)
        elsewhere = offload.DeviceError("used on another stream")

        def check() -> None:
            raise elsewhere

        with monkeypatch.context() as patched:
            patched.setattr(device, "check", check)
            if engine.stats().device_units:
                with pytest.raises(offload.DeviceError, match="another stream"):
                    engine.save()
                with pytest.raises(offload.DeviceError, match="another stream"):
                    engine.resume()
            with pytest.raises(offload.DeviceError, match="another stream"):
                engine(*batches(1)[0])
        assert engine.resume() is not None
        assert all(torch.equal(value, kept[name]) for name, value in engine.model.state_dict().items()), (
            "the commit before is the last"
        )
    assert_closed(engine)


def test_a_program_that_does_not_close_its_engine_ends_in_order(tmp_path: Path) -> None:
    script = f"""
import offload, torch
made = {on_late(tmp_path)!r}
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
engine = offload.initialize(model, made, lambda parameters: torch.optim.AdamW(parameters, fused=True))
for _ in range(3):
    engine.backward(engine(torch.ones(4, 64)).square().mean())
    engine.step()
print("not closed")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "not closed\n", "")
