"""A plan as a file: JSON for people and programs to look at; the engine does not read it.

Each run keeps the plan it follows in its first folder of ``ssd.paths``, as `PLAN_NAME`; a later plan replaces it. A run
that goes on traces a step and plans anew, for the budget that it then has.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Final

from offload.store.page_store import PageStore
from pagemem.errors import StorageError
from pagemem.folders.own_file import replace_file
from pagemem.frames.page import TensorId
from scheduler.execution.driver import Driver
from scheduler.planning.plan import Plan
from scheduler.planning.task import NO_FRAME, NO_OP, Task

PLAN_NAME: Final = "plan.json"
FORMAT: Final = "offload plan 4"


def plan_content(driver: Driver, plan: Plan) -> dict[str, Any]:
    """All of a driver's plan, and what its numbers mean: names of its tensors and ops, and their sizes.

    ``names`` and ``tensor_bytes`` are by the tensor's number; ``ops`` are those of one step, and a cycle is ``steps``
    of them; ``initial`` is the first frame of each tensor when a cycle begins. Ops of tasks are numbers of the cycle,
    and what ``after`` names are places in ``tasks``. ``updates`` is the round of updates that another thread makes
    beside the steps, in the same form: its tasks' ops are those of the round.
    """
    trace, of = driver.follower.trace, driver.planner.tensor
    known = {*_tensors(plan), *trace.tensors(), *([] if plan.updates is None else _tensors(plan.updates))}
    return {
        "format": FORMAT, "page_bytes": driver.mover.arena.page_bytes,
        "frames": {tier.value: n_frames for tier, n_frames in plan.frames.items()},
        "peak_frames": {tier.value: n_frames for tier, n_frames in plan.peaks.items()},
        "steps": plan.n_steps, "closed": plan.closed, "read_bytes": plan.read_bytes,
        "written_bytes": plan.written_bytes, "step_s": plan.step_s, "compute_s": plan.compute_s,
        "names": {tensor: of(tensor).name for tensor in sorted(known)},
        "tensor_bytes": {tensor: of(tensor).n_bytes for tensor in sorted(known)},
        "ops": [
            {"kind": op.key[0].value, "key": op.key[1], "name": op.name, "seconds": op.duration_s} for op in trace.ops
        ],
        "initial": dict(sorted(plan.initial.items())), "carried": [task_content(task) for task in plan.carried],
        "tasks": [task_content(task) for task in plan.tasks], "updates": _updates_content(driver, plan),
    }  # fmt: skip


def _tensors(plan: Plan) -> set[TensorId]:
    return {task.tensor for task in (*plan.tasks, *plan.carried)} | plan.initial.keys()


def _updates_content(driver: Driver, plan: Plan) -> dict[str, Any] | None:
    updates, follower = plan.updates, driver.planner.updates
    if updates is None or follower is None:
        return None
    beside = follower.beside(driver.follower.trace)
    return {
        "first_frame": beside.first_frame, "frames": beside.n_frames, "max_staleness": beside.max_staleness,
        "rounds": updates.n_steps, "closed": updates.closed, "read_bytes": updates.read_bytes,
        "written_bytes": updates.written_bytes,
        "ops": [{"name": op.name, "seconds": op.duration_s} for op in beside.trace.ops],
        "units": [
            {"name": unit.name, "ops": list(unit.ops), "first_use": unit.first_use, "handed_over": unit.handed_over}
            for unit in beside.units
        ],
        "initial": dict(sorted(updates.initial.items())), "carried": [task_content(task) for task in updates.carried],
        "tasks": [task_content(task) for task in updates.tasks],
    }  # fmt: skip


def task_content(task: Task) -> dict[str, Any]:
    """All of a task, without what it does not have: frames, an op that waits for it, tasks that it follows."""
    content: dict[str, Any] = {
        "kind": task.kind.value, "tensor": task.tensor, "tier": task.tier.value, "lane": task.lane.value,
        "bytes": task.n_bytes, "trigger": task.trigger,
    }  # fmt: skip
    if task.frame != NO_FRAME:
        content["frame"] = task.frame
    if task.needed_at != NO_OP:
        content["needed_at"] = task.needed_at
    content |= {flag: True for flag in ("fresh", "behind") if getattr(task, flag)}
    if task.after:
        content["after"] = list(task.after)
    return content


class PlanKeeper:
    """Keeps the plan that a driver follows in a file. Training thread only.

    Args:
        path: in a folder that is the run's.
    """

    def __init__(self, driver: Driver, path: Path) -> None:
        self._driver = driver
        self._path = path
        self._kept: Plan | None = None

    def keep(self) -> None:
        """Between two steps: write the plan if it is another one than before. Where that cannot be done, warn and leave
        the file that is there."""
        plan = self._driver.follower.plan
        if plan is None or plan is self._kept:
            return
        self._kept = plan
        content = json.dumps(plan_content(self._driver, plan), ensure_ascii=False, separators=(",", ":"))
        try:
            replace_file(self._path, (content + "\n").encode())
        except StorageError as error:
            warnings.warn(f"the plan could not be kept, training goes on by it: {error}", RuntimeWarning, stacklevel=2)


def plan_keeper(store: PageStore) -> PlanKeeper:
    """The keeper of an engine's plan."""
    return PlanKeeper(store.driver, store.directories[0].path / PLAN_NAME)
