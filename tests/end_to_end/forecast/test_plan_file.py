"""The plan that a run keeps as a file: it says what the engine follows, is replaced with it, and refuses what is
none."""

from __future__ import annotations

import dataclasses
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
from offload.store.plan_file import DEVICE_PLAN_NAME, PLAN_NAME, PlanFile, PlanFileError, read_plan
from pagemem.frames.page import TensorId
from scheduler.execution.driver import Driver
from scheduler.planning.trace import Op, OpKind, Trace


def config_of(folder: Path, memory: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A run of which not everything fits, unless ``memory`` says otherwise."""
    made = small_config(folder)
    return {**made, "memory": {**made["memory"], **(memory or {})}, **more}


def train(config: dict[str, Any], look: Callable[[offload.Engine], Any], steps: int = 4) -> Any:
    """What ``look`` returns of an engine after some steps."""
    with offload.initialize(built(), config, adamw) as engine:
        step(engine, steps)
        return look(engine)


def drivers(engine: offload.Engine) -> list[Driver]:
    """The driver of host memory, and the device's."""
    tier = engine.debug.device_tier
    return [engine.debug.driver, *([] if tier is None else [tier.driver])]


@pytest.mark.parametrize("more", [{}, {"device": "cpu-emulated", "memory": {"device": "1MiB"}}])
def test_the_file_is_the_plan_that_is_followed(more: dict[str, Any], tmp_path: Path) -> None:
    def look(engine: offload.Engine) -> None:
        for driver, name in zip(drivers(engine), (PLAN_NAME, DEVICE_PLAN_NAME)):
            content = read_plan(tmp_path / "pages" / name)
            assert driver.plan is not None and driver.plan.loads, "not everything fits"
            assert content.plan() == driver.plan
            assert content.page_bytes == driver.mover.arena.page_bytes
            assert [op.name for op in content.ops] == [op.name for op in driver.trace.ops]
            for tensor in map(TensorId, content.names):
                known = driver.mover.tensors[tensor]
                assert (content.names[tensor], content.tensor_bytes[tensor]) == (known.name, known.n_bytes)

    train(config_of(tmp_path, **more), look, steps=6)


def test_a_plan_made_anew_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pages" / PLAN_NAME
    seen: list[bytes] = []

    def look(engine: offload.Engine) -> None:
        for _ in range(8):
            step(engine, 1)
            if path.read_bytes() not in seen:
                seen.append(path.read_bytes())
        assert read_plan(path).plan() == engine.debug.driver.plan

    train(config_of(tmp_path), look, steps=3)
    assert len(seen) == 2, "that of the second step, and that with durations measured since"


def test_a_run_that_goes_on_with_another_budget_has_another_plan(tmp_path: Path) -> None:
    def kept(engine: offload.Engine) -> PlanFile:
        engine.save()
        return read_plan(tmp_path / "pages" / PLAN_NAME)

    def gone_on(engine: offload.Engine) -> PlanFile:
        engine.resume()
        step(engine, 4)
        return read_plan(tmp_path / "pages" / PLAN_NAME)

    before = train(config_of(tmp_path), kept)
    after = train(config_of(tmp_path, memory={"ram": "64MiB"}), gone_on, steps=0)
    assert before.plan().loads and not after.plan().loads, "with 64MiB everything stays"
    assert before.frames < after.frames


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


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan's file, parsed."""
    folder = tmp_path_factory.mktemp("run")
    train(config_of(folder), lambda engine: None)
    loaded: dict[str, Any] = json.loads((folder / "pages" / PLAN_NAME).read_bytes())
    return loaded


def changed(content: dict[str, Any], key: str, value: Any) -> str:
    return json.dumps({**content, key: value})


def test_what_is_no_plans_file_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / PLAN_NAME
    with pytest.raises(PlanFileError, match=r"plan\.json cannot be read: No such file"):
        read_plan(path)
    load = content["loads"][0]
    for text, where in (
        ("", "Expecting value"),
        ("[1, 2]", "the whole"),
        (changed(content, "format", "offload plan 0"), "format"),
        (changed(content, "steps", 0), "steps"),
        (changed(content, "closed", "yes"), "closed"),
        (changed(content, "zzz", 1), "zzz"),
        (changed(content, "loads", [{**load, "frame": -1}]), r"loads\.0\.frame"),
        (changed(content, "ops", [{**content["ops"][0], "kind": "nap"}]), r"ops\.0\.kind"),
        (json.dumps({key: value for key, value in content.items() if key != "stores"}), "stores"),
    ):
        path.write_text(text)
        with pytest.raises(PlanFileError, match=rf"plan\.json is not a plan's file of this version: {where}: "):
            read_plan(path)


def test_tasks_that_point_nowhere_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    n_ops = len(content["ops"]) * content["steps"]
    load = content["loads"][0]
    for key, value, what in (
        ("loads", [{**load, "trigger": n_ops}], rf"begins with op {n_ops}; the cycle has {n_ops}"),
        (
            "loads",
            [{**load, "frame": content["frames"]}],
            rf"goes to frames {content['frames']} to \d+; there are {content['frames']}",
        ),
        (
            "tensor_bytes",
            {**content["tensor_bytes"], str(load["tensor"]): content["page_bytes"] * (content["frames"] + 1)},
            "goes to frames",
        ),
        ("initial", {"1000000": 0}, r"of tensor 1000000, of which the file has no name"),
        ("stores", [{"tensor": 10**6, "trigger": 0}], r"of tensor 1000000, of which the file has no name"),
        ("initial", {str(load["tensor"]): content["frames"]}, "goes to frames"),
    ):
        (tmp_path / PLAN_NAME).write_text(changed(content, key, value))
        with pytest.raises(PlanFileError, match=what):
            read_plan(tmp_path / PLAN_NAME).plan()


def test_a_key_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    def look(engine: offload.Engine) -> None:
        driver = engine.debug.driver
        assert driver.plan is not None
        plan = dataclasses.replace(driver.plan, loads=(), stores=(), carried=(), initial={})
        trace = Trace(
            (
                Op((OpKind.FORWARD, ("a", (1, None))), "an op", (), 0.1, 0),
                Op((OpKind.FORWARD, ("a", object())), "an op", (), 0.1, 1),
            )
        )
        with pytest.raises(PlanFileError, match=r"an op has the key <object object at .*>, of type object"):
            PlanFile.of(plan, trace, {}, {}, 1)
        of_one = PlanFile.of(plan, Trace(trace.ops[:1]), {}, {}, 1)
        assert of_one.plan().keys == ((OpKind.FORWARD, ("a", (1, None))),) * plan.n_steps

    train(config_of(tmp_path), look)
