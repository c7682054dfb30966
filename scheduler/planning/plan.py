"""A plan: which tasks to start with which op, and where their tensors go. Pure data.

Ops are numbered over one *cycle*, which is one step or, when the placement only repeats every few steps, a few. The
tasks of a plan go to their lanes in order: by trigger, then as they stand in the plan, those ``behind`` an op when it
is over. A lane starts its tasks in this order, each as soon as all tasks that it follows (``after``) are over. An op
begins when the tensors that it uses are there, what it takes out has been copied, and nothing reads any more what it
changes.

A task with frames takes them from whoever has them. That a copy, or nothing but the frames, is there already is no
mistake: the task has nothing to do then; so has one that stores what has not changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier
from scheduler.planning.task import ARRIVALS, Lane, Task, TaskKind
from scheduler.planning.trace import OpKey


@dataclass(frozen=True, slots=True)
class Plan:
    """A cycle of ops with the tasks each one triggers, over all tiers and lanes.

    Attributes:
        keys: the ops expected, one cycle of ``n_steps`` steps.
        frames: the budgets.
        initial: tensor -> first frame when op 0 of a cycle begins, before the tasks under way then.
        tasks: in order. What one of them follows and starts later in the cycle was started in the cycle before.
        carried: tasks of the previous cycle for this one; a first cycle starts with them.
        closed: whether a cycle ends with the placement it began with; if not, each one begins by restoring it.
        peaks: distinct frames of each tier that the cycle touches.
        lane_bytes: that a cycle moves at most, restoring its first placement included.
        step_s: seconds of one step, predicted with the planner's bandwidths, its share of restoring included.
            compute_s: of them without any wait.
        updates: of the updater's round (`scheduler.planning.update_round`), whose ops trigger its tasks; None: updates
            are ops of the step.
        tasks_at, behind_at: the tasks by their trigger: those that start when it begins, and when it is over.
        arriving_at: of them those that take frames. stores_at: those that bring tensors to page files.
    """

    keys: tuple[OpKey, ...]
    n_steps: int
    frames: Mapping[Tier, int]
    initial: Mapping[TensorId, FrameId]
    tasks: tuple[Task, ...]
    carried: tuple[Task, ...]
    closed: bool
    peaks: Mapping[Tier, int]
    lane_bytes: Mapping[Lane, int]
    step_s: float
    compute_s: float
    updates: Plan | None = None
    tasks_at: Mapping[int, tuple[Task, ...]] = field(init=False, compare=False, repr=False)
    behind_at: Mapping[int, tuple[Task, ...]] = field(init=False, compare=False, repr=False)
    arriving_at: Mapping[int, tuple[Task, ...]] = field(init=False, compare=False, repr=False)
    stores_at: Mapping[int, tuple[Task, ...]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        found = {
            "tasks_at": by_trigger(task for task in self.tasks if not task.behind),
            "behind_at": by_trigger(task for task in self.tasks if task.behind),
            "arriving_at": by_trigger(task for task in self.tasks if task.kind in ARRIVALS),
            "stores_at": by_trigger(self.stores),
        }
        for name, tasks in found.items():
            object.__setattr__(self, name, tasks)

    @property
    def loads(self) -> tuple[Task, ...]:
        """Tasks that bring tensors to host memory from page files, or their frames alone."""
        return tuple(task for task in self.tasks if task.kind is TaskKind.LOAD)

    @property
    def stores(self) -> tuple[Task, ...]:
        """Tasks that bring tensors to page files."""
        return tuple(task for task in self.tasks if task.kind is TaskKind.STORE)

    @property
    def ops_per_step(self) -> int:
        """Ops from one optimizer step to the next."""
        return len(self.keys) // self.n_steps

    @property
    def n_frames(self) -> int:
        """Of host memory."""
        return self.frames[Tier.HOST]

    @property
    def peak_frames(self) -> int:
        """Of host memory, that the cycle touches."""
        return self.peaks.get(Tier.HOST, 0)

    @property
    def read_bytes(self) -> int:
        """Of page files, that a cycle reads at most."""
        return self.lane_bytes.get(Lane.SSD_READ, 0)

    @property
    def written_bytes(self) -> int:
        """To page files, that a cycle writes at most."""
        return self.lane_bytes.get(Lane.SSD_WRITE, 0)

    @property
    def moved_bytes(self) -> float:
        """Bytes of page files read and written a step."""
        return (self.read_bytes + self.written_bytes) / self.n_steps

    def stored(self) -> list[TensorId]:
        """Tensors that the plan copies to the page files, in order of their first copy."""
        return list(dict.fromkeys(task.tensor for task in sorted(self.stores, key=lambda task: task.trigger)))


def by_trigger(tasks: Iterable[Task]) -> dict[int, tuple[Task, ...]]:
    """Tasks grouped by the op that starts them, in order."""
    found: dict[int, list[Task]] = {}
    for task in tasks:
        found.setdefault(task.trigger, []).append(task)
    return {trigger: tuple(group) for trigger, group in found.items()}
