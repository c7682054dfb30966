"""The plan that a run keeps as a file: it says what the engine follows, and is replaced with it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import adamw
from small_runs import built
from small_runs import config as small_config
from small_runs import train as step

import offload
from offload.store.plan_file import FORMAT, PLAN_NAME, task_content
from pagemem.frames.page import TensorId
from scheduler.planning.plan import Plan
from scheduler.planning.task import TaskKind


def config_of(folder: Path, memory: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A run of which not everything fits, unless ``memory`` says otherwise."""
    made = small_config(folder)
    return {**made, "memory": {**made["memory"], **(memory or {})}, **more}


def train(config: dict[str, Any], look: Callable[[offload.Engine], Any], steps: int = 4) -> Any:
    """What ``look`` returns of an engine after some steps."""
    with offload.initialize(built(), config, adamw) as engine:
        step(engine, steps)
        return look(engine)


def read(path: Path) -> dict[str, Any]:
    """A plan's file, parsed."""
    content: dict[str, Any] = json.loads(path.read_bytes())
    assert content["format"] == FORMAT
    return content


def assert_is(content: dict[str, Any], plan: Plan) -> None:
    """A plan's file says what the plan does."""
    for key, tasks in (("tasks", plan.tasks), ("carried", plan.carried)):
        assert content[key] == [task_content(task) for task in tasks]
    assert {int(tensor): frame for tensor, frame in content["initial"].items()} == dict(plan.initial)
    for key in ("closed", "read_bytes", "written_bytes", "step_s", "compute_s"):
        assert content[key] == getattr(plan, key)
    assert content["frames"] == {tier.value: n_frames for tier, n_frames in plan.frames.items()}
    assert content["peak_frames"] == {tier.value: n_frames for tier, n_frames in plan.peaks.items()}
    assert content["steps"] == plan.n_steps
    assert len(content["ops"]) * content["steps"] == len(plan.keys)


@pytest.mark.parametrize("more", [{}, {"device": "cpu-emulated", "memory": {"device": "1MiB"}}])
def test_the_file_is_the_plan_that_is_followed(more: dict[str, Any], tmp_path: Path) -> None:
    def look(engine: offload.Engine) -> None:
        driver = engine.debug.driver
        content = read(tmp_path / "pages" / PLAN_NAME)
        plan = driver.follower.plan
        assert plan is not None and plan.loads, "not everything fits"
        assert "device" not in more or any(task.kind is TaskKind.UPLOAD for task in plan.tasks)
        assert_is(content, plan)
        assert content["page_bytes"] == driver.mover.arena.page_bytes
        assert [(op["kind"], op["name"], op["seconds"]) for op in content["ops"]] == [
            (op.key[0].value, op.name, op.duration_s) for op in driver.follower.trace.ops
        ]
        assert json.dumps([op["key"] for op in content["ops"]]) == json.dumps(
            [op.key[1] for op in driver.follower.trace.ops]
        )
        for number, tensor_name in content["names"].items():
            known = driver.planner.tensor(TensorId(int(number)))
            assert (tensor_name, content["tensor_bytes"][number]) == (known.name, known.n_bytes)

    train(config_of(tmp_path, **more), look, steps=6)


def test_a_plan_made_anew_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pages" / PLAN_NAME
    seen: list[bytes] = []

    def look(engine: offload.Engine) -> None:
        for _ in range(8):
            step(engine, 1)
            if path.read_bytes() not in seen:
                seen.append(path.read_bytes())
        assert engine.debug.driver.follower.plan is not None
        assert_is(read(path), engine.debug.driver.follower.plan)

    train(config_of(tmp_path), look, steps=3)
    assert len(seen) == 2, "that of the second step, and that with durations measured since"


def test_a_run_that_goes_on_with_another_budget_has_another_plan(tmp_path: Path) -> None:
    def kept(engine: offload.Engine) -> dict[str, Any]:
        engine.save()
        return read(tmp_path / "pages" / PLAN_NAME)

    def gone_on(engine: offload.Engine) -> dict[str, Any]:
        engine.resume()
        step(engine, 4)
        return read(tmp_path / "pages" / PLAN_NAME)

    before = train(config_of(tmp_path), kept)
    after = train(config_of(tmp_path, memory={"ram": "64MiB"}), gone_on, steps=0)
    assert before["tasks"] and not after["tasks"], "with 64MiB everything stays"
    assert before["frames"]["host"] < after["frames"]["host"]


def test_a_file_that_cannot_be_written_is_said_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename

    def full(source: str | Path, target: str | Path) -> None:
        if Path(target).name == PLAN_NAME:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.warns(
        RuntimeWarning,
        match=r"the plan could not be kept, training goes on by it: renaming .*plan\.json\.new: "
        "No space left on device",
    ):
        train(config_of(tmp_path), lambda engine: None)
    assert not list((tmp_path / "pages").glob("plan*"))
