"""A device that has failed, and what is held for one: close() ends, and the first error is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from late_device import LateEvent, late_device
from parity import adamw
from small_runs import assert_closed, assert_equal, batches, built, config, train

import offload
from offload import knobs
from offload.budget import need as budget_need


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
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)

    def raises(_: LateEvent) -> bool:
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
                    patched.setattr(LateEvent, name, raises)
                patched.setattr(device, "wait_for", lambda event: event.wait())
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
        driver = engine.debug.driver
        calls = 0

        def fails() -> None:
            nonlocal calls
            calls += 1
            if calls > done:
                raise RuntimeError("the device is lost")

        monkeypatch.setattr(driver._edits, "write_back", fails)
        with pytest.raises(RuntimeError, match="the device is lost"):
            train(engine, 1)
        assert driver.follower.planned_steps
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
            waiting_bytes = largest_bytes + made["memory"]["ram"] // 32  # for the worker
            assert pinned.ever == [
                store.mover.arena.n_bytes,
                largest_bytes + (waiting_bytes if clip_norm is None else 0),
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
            waiting = list(engine.debug.updater._downloads._waiting)
            assert waiting and not waiting[-1].there.reached()
            assert all(one.source is not None for one in waiting if not one.there.reached()), (
                "the device is still reading them"
            )
            device.late_s = 0.0
        assert all(one.there.reached() for one in waiting) and not pinned.now
        del waiting
        assert_closed(engine)


def test_a_budget_that_cannot_be_locked_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_need, "usable_bytes", lambda: (4 << 20) - 1)
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
