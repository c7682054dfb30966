"""A plan as a file: JSON that a person can read and a program can make the same plan of again.

Each run keeps the plan it follows in its first folder of ``ssd.paths``, as `PLAN_NAME` (that of a device tier as
`DEVICE_PLAN_NAME`); a later plan replaces it. Nothing is lost with the file: a run that goes on traces a step and plans
anew, for the budget that it then has.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offload.store.page_store import PageStore
from pagemem.errors import StorageError
from pagemem.folders.own_file import replace_file
from pagemem.folders.small_file import first_fault, parse_json, read_small
from pagemem.frames.page import MAX_PAGE_BYTES, FrameId, TensorId
from pagemem.units import MiB, ceil_div
from scheduler.execution.driver import Driver
from scheduler.planning.plan import LoadTask, Plan, StoreTask, by_trigger
from scheduler.planning.trace import OpKey, OpKind, Trace

PLAN_NAME: Final = "plan.json"
DEVICE_PLAN_NAME: Final = "plan-device.json"
FORMAT: Final = "offload plan 1"

#: A larger file is not read.
_MAX_BYTES: Final = 64 * MiB
#: Ops of a cycle, all its steps together.
_MAX_OPS: Final = 10_000_000

_Count = Annotated[int, Field(ge=0, le=2**53)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PlanFileError(ValueError):
    """A plan's file that cannot be read, is of another format, or does not fit together; says which and where."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Op(_Strict):
    """One op of the step: its key is what must come again for the plan to be followed."""

    kind: OpKind = Field(strict=False)
    key: Any
    name: str
    seconds: _Seconds


class _Load(_Strict):
    """See `scheduler.planning.plan.LoadTask`; ops are numbers of the cycle."""

    tensor: _Count
    frame: _Count
    trigger: _Count
    needed_at: _Count
    fresh: bool = False


class _Store(_Strict):
    """See `scheduler.planning.plan.StoreTask`."""

    tensor: _Count
    trigger: _Count


class PlanFile(_Strict):
    """All of a plan, and what its numbers mean: names of its tensors and ops, and their sizes.

    Attributes:
        names, tensor_bytes: of each tensor that the plan knows, by its number.
        ops: of one step; a cycle is ``steps`` of them.
        initial: tensor -> first frame when a cycle begins.
    """

    format: Literal["offload plan 1"]
    page_bytes: Annotated[int, Field(gt=0, le=MAX_PAGE_BYTES)]
    frames: _Count
    peak_frames: _Count
    steps: Annotated[int, Field(gt=0, le=_MAX_OPS)]
    closed: bool
    read_bytes: _Count
    written_bytes: _Count
    step_s: _Seconds
    compute_s: _Seconds
    names: dict[_Count, str]
    tensor_bytes: dict[_Count, _Count]
    ops: list[_Op]
    initial: dict[_Count, _Count]
    carried: list[_Load]
    loads: list[_Load]
    stores: list[_Store]

    @classmethod
    def of(
        cls,
        plan: Plan,
        trace: Trace,
        names: Mapping[TensorId, str],
        tensor_bytes: Mapping[TensorId, int],
        page_bytes: int,
    ) -> PlanFile:
        """The file of a plan made for a trace.

        Raises:
            PlanFileError: the key of an op is not of numbers and words, so it cannot be written down.
        """
        tasks: list[LoadTask | StoreTask] = [*plan.loads, *plan.carried, *plan.stores]
        known = {task.tensor for task in tasks} | set(plan.initial) | set(trace.tensors())
        return cls(
            format=FORMAT,
            page_bytes=page_bytes,
            frames=plan.n_frames,
            peak_frames=plan.peak_frames,
            steps=plan.n_steps,
            closed=plan.closed,
            read_bytes=plan.read_bytes,
            written_bytes=plan.written_bytes,
            step_s=plan.step_s,
            compute_s=plan.compute_s,
            names={tensor: names[tensor] for tensor in sorted(known)},
            tensor_bytes={tensor: tensor_bytes[tensor] for tensor in sorted(known)},
            ops=[_Op(kind=op.key[0], key=_written(op.key[1]), name=op.name, seconds=op.duration_s) for op in trace.ops],
            initial=dict(sorted(plan.initial.items())),
            carried=[_load(task) for task in plan.carried],
            loads=[_load(task) for task in plan.loads],
            stores=[_Store(tensor=task.tensor, trigger=task.trigger) for task in plan.stores],
        )

    def plan(self) -> Plan:
        """The plan again.

        Raises:
            PlanFileError: something names an op, a frame or a tensor that there is not.
        """
        if len(self.ops) * self.steps > _MAX_OPS:
            raise PlanFileError(
                f"steps is {self.steps}, of {len(self.ops)} ops; a cycle has at most {_MAX_OPS} of them"
            )
        keys: tuple[OpKey, ...] = tuple((op.kind, _key(op.key)) for op in self.ops) * self.steps
        loads, carried = tuple(map(_task, self.loads)), tuple(map(_task, self.carried))
        stores = tuple(StoreTask(TensorId(store.tensor), store.trigger) for store in self.stores)
        tasks: list[LoadTask | StoreTask] = [*loads, *carried, *stores]
        for task in tasks:
            if task.trigger >= len(keys):
                raise PlanFileError(f"{task} begins with op {task.trigger}; the cycle has {len(keys)}")
        for tensor in {task.tensor for task in tasks} | set(self.initial):
            if tensor not in self.names or tensor not in self.tensor_bytes:
                raise PlanFileError(f"a task is of tensor {tensor}, of which the file has no name or no size")
        for tensor, frame in [*self.initial.items(), *((load.tensor, load.frame) for load in (*loads, *carried))]:
            last = frame + ceil_div(self.tensor_bytes[tensor], self.page_bytes) - 1
            if last >= self.frames:
                raise PlanFileError(f"tensor {tensor} goes to frames {frame} to {last}; there are {self.frames}")
        return Plan(
            keys=keys, n_steps=self.steps, n_frames=self.frames,
            initial={TensorId(tensor): FrameId(frame) for tensor, frame in self.initial.items()},
            loads=loads, stores=stores, carried=carried, closed=self.closed, peak_frames=self.peak_frames,
            read_bytes=self.read_bytes, written_bytes=self.written_bytes, step_s=self.step_s, compute_s=self.compute_s,
            loads_at=by_trigger(loads), stores_at=by_trigger(stores),
        )  # fmt: skip


def write_plan(path: Path, content: PlanFile) -> None:
    """Put a plan's file in the place of the one before; where that cannot be done, warn and leave that one. Any
    thread."""
    try:
        replace_file(path, (content.model_dump_json(exclude_defaults=True) + "\n").encode())
    except StorageError as error:
        warnings.warn(f"the plan could not be kept, training goes on by it: {error}", RuntimeWarning, stacklevel=2)


def read_plan(path: Path) -> PlanFile:
    """What a plan's file says.

    Raises:
        PlanFileError: there is no such file, or it is not one of a plan; says where.
    """
    try:
        content = read_small(path, _MAX_BYTES)
        parse_json(content)  # for what pydantic's parser takes: a key twice, numbers that are none
        return PlanFile.model_validate_json(content)
    except OSError as error:
        raise PlanFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        why = first_fault(error) if isinstance(error, ValidationError) else error
        raise PlanFileError(f"{path} is not a plan's file of this version: {why}") from error


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
        """Write the plan if it is another one than before. Between two steps; see `write_plan`."""
        plan, mover = self._driver.plan, self._driver.mover
        if plan is None or plan is self._kept:
            return
        self._kept = plan
        names = {tensor.id: tensor.name for tensor in mover.tensors.values()}
        n_bytes = {tensor.id: tensor.n_bytes for tensor in mover.tensors.values()}
        write_plan(self._path, PlanFile.of(plan, self._driver.trace, names, n_bytes, mover.arena.page_bytes))


def plan_keepers(store: PageStore) -> list[PlanKeeper]:
    """A keeper for the plan of each tier that has one."""
    folder = store.directories[0]
    keepers = [PlanKeeper(store.driver, folder.file(PLAN_NAME))]
    if store.device_tier is not None:
        keepers.append(PlanKeeper(store.device_tier.driver, folder.file(DEVICE_PLAN_NAME)))
    return keepers


def _load(task: LoadTask) -> _Load:
    return _Load(tensor=task.tensor, frame=task.frame, trigger=task.trigger, needed_at=task.needed_at, fresh=task.fresh)


def _task(load: _Load) -> LoadTask:
    return LoadTask(TensorId(load.tensor), FrameId(load.frame), load.trigger, load.needed_at, load.fresh)


def _written(key: Hashable) -> Any:
    """An op's key with lists for tuples."""
    if isinstance(key, tuple):
        return [_written(part) for part in key]
    if key is None or isinstance(key, str | int):
        return key
    raise PlanFileError(
        f"an op has the key {key!r}, of type {type(key).__name__}; a file takes numbers, words and tuples of them"
    )


def _key(written: Any) -> Hashable:
    return tuple(_key(part) for part in written) if isinstance(written, list) else written
