"""Updates that a worker makes beside compute: the training thread goes on, and results are plain PyTorch's."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from late_device import late_device
from parity import Parity, adamw, state_bytes
from small_runs import assert_closed, assert_equal, batches, built, config, train, train_plain
from tiny_models import CASES

import offload
from scheduler.planning.task import Lane, TaskKind
from scheduler.tiers.update_lane import UpdateLane

#: Whose updates are waited for at their end, since a plan wants to know how long they take.
TIMED_STEPS = 6


def on_device(folder: Path, *, ram: int = 16 << 20, device: str = "1MiB", **update: Any) -> dict[str, Any]:
    made = config(folder, ram=ram, **update)
    memory = made["memory"] | {"device": device, "device_states": "never"}
    return made | {"device": "cpu-emulated", "memory": memory}


def lane_of(engine: offload.Engine) -> UpdateLane:
    lane = engine.debug.driver.memories.updates
    assert lane is not None
    return lane


def test_backward_goes_on_while_an_update_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, over = built(), threading.Event()
    optimizer = adamw(plain.parameters())
    with late_device(monkeypatch), offload.initialize(built(), on_device(tmp_path), adamw) as engine:
        train(engine, TIMED_STEPS)
        lane, held = lane_of(engine), []

        def hold(name: str) -> None:
            held.append(name)
            assert over.wait(30), "backward and step wait for an update that nothing uses"

        lane._hold = hold
        batch = batches(TIMED_STEPS + 1)[-1]
        engine.backward(engine(*batch))
        engine.step()
        assert held and lane.busy and not over.is_set()
        over.set()
        train_plain(plain, optimizer, TIMED_STEPS)
        plain(*batch).backward()
        optimizer.step()
        assert_equal(engine.model, plain)
        assert engine.stats().deviations == 0
    assert_closed(engine)


def test_the_next_use_of_a_unit_waits_for_its_update_alone(tmp_path: Path) -> None:
    """The last layer is updated first: its copy goes up while the first one's update is held."""
    over = threading.Event()
    with offload.initialize(built(), on_device(tmp_path), adamw) as engine:
        train(engine, TIMED_STEPS)
        lane, units = lane_of(engine), engine.debug.units
        first = units[0].parameters

        def hold(name: str) -> None:
            if name == f"update of {units[0].name}":
                assert over.wait(30)

        lane._hold = hold
        train(engine, 1)
        lane.finish(units[-1].parameters)
        assert first.updates and not first.readable and units[-1].parameters.readable
        over.set()
        engine.drain()
        assert not lane.busy and first.readable


def test_the_first_error_is_raised_by_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with offload.initialize(built(), on_device(tmp_path), adamw) as engine:
        train(engine, 3)
        apply = engine.debug.updater._update._apply

        def failing(one: Any) -> None:
            if one.unit is engine.debug.units[2]:
                raise ArithmeticError("the worker fails")
            apply(one)

        monkeypatch.setattr(engine.debug.updater._update, "_apply", failing)
        with pytest.raises(ArithmeticError, match="the worker fails"):
            train(engine, 2)
        with pytest.raises(RuntimeError, match=r"the update of .* was cut off half-way by an error before"):
            engine.abandon_step()
            engine.save()
    assert_closed(engine)


def test_closing_in_the_midst_of_updates_gives_everything_back(tmp_path: Path) -> None:
    over = threading.Event()
    engine = offload.initialize(built(), on_device(tmp_path), adamw)
    train(engine, TIMED_STEPS)
    lane = lane_of(engine)
    lane._hold = lambda name: over.wait(30) or None  # type: ignore[func-returns-value]
    train(engine, 1)
    assert lane.busy
    threading.Timer(0.05, over.set).start()
    engine.close()
    assert not lane.busy and not lane._thread.is_alive()
    assert_closed(engine)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tied", "plain"), ("partly_trained", "clipped"), ("two_backwards", "accumulated"), ("evaluating", "step")],
)
def test_bits_are_plain_pytorchs_on_the_cpu_too(name: str, kind: str, tmp_path: Path) -> None:
    case = CASES[name]
    extra: dict[str, Any] = {"worker": True}
    if kind == "step":
        extra["start"] = "step"
    accumulation = 3 if kind == "accumulated" else 1
    ram = state_bytes(case) // 2 + (1 << 20)
    parity = Parity(case, tmp_path, ram, 0.5 if kind == "clipped" else None, accumulation, steps=7, extra=extra)
    assert parity.run().planned_steps >= 3


@pytest.mark.parametrize(("dtype", "loss_scale"), [("bf16", "auto"), ("fp16", 256.0)])
def test_sixteen_bits_and_loss_scaling(
    dtype: str, loss_scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits with a worker and without."""
    found = []
    with late_device(monkeypatch):
        for worker in (True, False):
            made = on_device(tmp_path / str(worker), worker=worker, loss_scale=loss_scale) | {"model": {"dtype": dtype}}
            with offload.initialize(built(), made, adamw) as engine:
                train(engine, 5)
                found.append((engine.model.state_dict(), engine.optimizer.state_dict()["state"]))
    (model, states), (other, other_states) = found
    assert all(torch.equal(model[name], other[name]) for name in other)
    assert all(torch.equal(states[i][key], other_states[i][key]) for i in other_states for key in other_states[i])


def test_a_forked_child_has_no_worker_and_the_parent_goes_on(tmp_path: Path) -> None:
    plain = built()
    train_plain(plain, adamw(plain.parameters()), 3)
    with offload.initialize(built(), on_device(tmp_path), adamw) as engine:
        train(engine, 3)
        child = os.fork()
        if not child:
            with suppress(RuntimeError):  # refused
                engine.drain()
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert_equal(engine.model, plain)
    assert_closed(engine)


def test_what_is_read_between_steps_has_every_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """state_dict, optimizer states, commits and drain, each right after a step."""
    plain = built()
    optimizer = adamw(plain.parameters())
    with late_device(monkeypatch), offload.initialize(built(), on_device(tmp_path), adamw) as engine:
        for number, batch in enumerate(batches(6)):
            engine.backward(engine(*batch))
            engine.step()
            plain(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number % 2:
                assert_equal(engine.model, plain)
            else:
                ours, expected = engine.optimizer.state_dict()["state"], optimizer.state_dict()["state"]
                assert all(torch.equal(ours[i][key], expected[i][key]) for i in expected for key in expected[i])
            if number == 4:
                engine.save()
        engine.drain()
    assert_closed(engine)
    with offload.initialize(built(), on_device(tmp_path), adamw) as engine:
        engine.resume()
        engine.backward(engine(*batches(6)[5]))
        engine.step()
        assert_equal(engine.model, plain)
    assert_closed(engine)


def test_the_plan_has_updates_as_tasks_of_their_lane(tmp_path: Path) -> None:
    made = config(tmp_path, worker=True)
    with offload.initialize(built(), made, adamw) as engine:
        train(engine, 4)
        plan, trace = engine.debug.driver.follower.plan, engine.debug.driver.follower.trace
        assert plan is not None
        tasks = [task for task in plan.tasks if task.kind is TaskKind.UPDATE]
        assert len(tasks) == plan.n_steps * sum(op.lane is Lane.UPDATE for op in trace.ops) > 0
        assert all(op.duration_s > 0 for op in trace.ops if op.lane is Lane.UPDATE)


@pytest.mark.parametrize(("worker", "device", "there"), [("auto", "cpu", False), (False, "cpu-emulated", False)])
def test_there_is_no_worker_where_none_is_wanted(worker: Any, device: str, there: bool, tmp_path: Path) -> None:
    made = on_device(tmp_path, worker=worker) if device != "cpu" else config(tmp_path, worker=worker)
    with offload.initialize(built(), made, adamw) as engine:
        assert (engine.debug.driver.memories.updates is not None) is there
        train(engine, 1)
