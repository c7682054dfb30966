"""A plan: which page moves to start before which op, and where their tensors go. Pure data.

Ops are numbered over one *cycle*, which is one step or, when the placement only repeats every few steps, a few. A task
with trigger ``k`` starts when the training thread begins op ``k``. Loads run in list order; a load whose window is
still being copied out waits for that copy and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pagemem.frames.page import FrameId, TensorId
from scheduler.planning.task import Task
from scheduler.planning.trace import OpKey


@dataclass(frozen=True, slots=True)
class Plan:
    """A cycle of ops with the tasks each one triggers.

    Attributes:
        keys: the ops expected, one cycle of ``n_steps`` steps.
        initial: tensor -> first frame when op 0 of a cycle begins, before the loads in flight then.
        carried: loads of the previous cycle for this one; a first cycle starts with them.
        closed: whether a cycle ends with the placement it began with; if not, each one begins by restoring it.
        peak_frames: distinct host frames that the cycle touches.
        read_bytes: that a cycle moves at most, restoring its first placement included; written_bytes: likewise.
        step_s: seconds of one step, predicted with the planner's bandwidths, its share of restoring included.
            compute_s: of them without any wait.
    """

    keys: tuple[OpKey, ...]
    n_steps: int
    n_frames: int
    initial: Mapping[TensorId, FrameId]
    loads: tuple[Task, ...]
    stores: tuple[Task, ...]
    carried: tuple[Task, ...]
    closed: bool
    peak_frames: int
    read_bytes: int
    written_bytes: int
    step_s: float
    compute_s: float
    loads_at: Mapping[int, tuple[Task, ...]] = field(default_factory=dict)
    stores_at: Mapping[int, tuple[Task, ...]] = field(default_factory=dict)

    @property
    def ops_per_step(self) -> int:
        """Ops from one optimizer step to the next."""
        return len(self.keys) // self.n_steps

    @property
    def moved_bytes(self) -> float:
        """Bytes read and written a step."""
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
