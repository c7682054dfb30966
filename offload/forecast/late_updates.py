"""Lock-free steps on paper: the training thread's ops beside the update thread and the disk. Pure and deterministic.

    compute    ops in order; before a late unit's first use in a step the thread waits while it misses too many
    update     one unit's batch at a time, the one furthest behind first; its tasks in order, one slice after another
    ssd_read   slices that pass through the ring; asked for when the slice before is begun, once a window is free
    ssd_write  slices that were updated; a window is free when its slice is stored

What a unit's batch takes is a list of tasks, as a plan would have them. Compute and update share the processors: while
both work each gets its part of the cores. Gradients of steps that arrive while their unit waits are merged with it.
"""

from __future__ import annotations

import enum
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from optim.lockfree.state_windows import RING_WINDOWS

#: Steps performed, and those of them, the first ones, that are not counted.
STEPS: Final = 40
LEAD_STEPS: Final = 15
#: Less is what binary fractions leave of nothing.
_NOTHING_S: Final = 1e-12


class LateTaskKind(enum.Enum):
    """What a task does."""

    LOAD = "load"
    UPDATE = "update"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class LateTask:
    """A piece of work of one lane.

    Attributes:
        lane: "ssd_read", "update" or "ssd_write".
        n_bytes: moved. seconds: of a lane that moves nothing, on a processor of its own.
        after: places in the list of the tasks that end before.
    """

    kind: LateTaskKind
    lane: str
    n_bytes: int
    seconds: float
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LateUnit:
    """A unit that the update thread has.

    Attributes:
        first_use: op before which its parameters must be young enough. handed_over: op after which its gradient is
            handed over.
        tasks: of one batch.
    """

    first_use: int
    handed_over: int
    tasks: Sequence[LateTask]


@dataclass(frozen=True, slots=True)
class LateSpec:
    """What is done with which means.

    Attributes:
        ops_s: seconds of each op of a step.
        read_bytes_per_s, write_bytes_per_s: of the disk. shared: whether that is one rate for both together.
        max_staleness: steps that parameters may miss.
        together: speed of compute and of updates while both work; 1: each has cores of its own.
    """

    ops_s: Sequence[float]
    units: Sequence[LateUnit]
    read_bytes_per_s: float
    write_bytes_per_s: float
    shared: bool
    max_staleness: int
    together: float = 1.0


@dataclass(frozen=True, slots=True)
class LateSteps:
    """What `simulate_late` finds, for one step.

    Attributes:
        step_s: seconds. wait_s: of them, waited for updates. missed: steps that parameters miss at their first use,
            mean over the units.
        busy: share of the time that each lane is busy.
    """

    step_s: float
    wait_s: float
    missed: float
    read_bytes: float
    written_bytes: float
    busy: dict[str, float]


@dataclass(slots=True)
class _Disk:
    """Lanes of the disk, each serving in order; one lane where reads and writes share a rate."""

    spec: LateSpec
    free_s: dict[str, float] = field(default_factory=lambda: {"ssd_read": 0.0, "ssd_write": 0.0})
    busy_s: dict[str, float] = field(default_factory=lambda: {"ssd_read": 0.0, "ssd_write": 0.0})
    moved_bytes: dict[str, int] = field(default_factory=lambda: {"ssd_read": 0, "ssd_write": 0})

    def serve(self, lane: str, n_bytes: int, from_s: float) -> float:
        """Move bytes; returns when that is over."""
        rate = self.spec.read_bytes_per_s if lane == "ssd_read" else self.spec.write_bytes_per_s
        takes_s, queue = n_bytes / rate, "ssd_read" if self.spec.shared else lane
        self.free_s[queue] = max(self.free_s[queue], from_s) + takes_s
        self.busy_s[lane] += takes_s
        self.moved_bytes[lane] += n_bytes
        return self.free_s[queue]


class _Updater:
    """The update thread and its ring."""

    def __init__(self, spec: LateSpec) -> None:
        self.spec = spec
        self.disk = _Disk(spec)
        self.produced = [0] * len(spec.units)
        self.applied = [0] * len(spec.units)
        self.wanted: int | None = None
        self.unit: int | None = None
        self.busy_s = self.left_s = 0.0
        self.ready_s = 0.0
        self._batch = 0
        self._place = 0
        self._stored_s: list[float] = []
        self._loaded_s: dict[int, float] = {}

    def next_unit(self) -> int | None:
        """The one to be served now."""
        behind = [
            (self.applied[u] - self.produced[u], u) for u in range(len(self.spec.units)) if u != self.unit
        ]  # fmt: skip
        if (
            self.wanted is not None
            and self.wanted != self.unit
            and self.produced[self.wanted] > self.applied[self.wanted]
        ):
            return self.wanted
        first = min(behind, default=(0, 0))
        return first[1] if first[0] < 0 else None

    def begin(self, now_s: float) -> None:
        """Take the next batch, if there is one and none is at work."""
        if self.unit is None:
            self.unit = self.next_unit()
            if self.unit is not None:
                self._batch, self._place = self.produced[self.unit], 0
                self._begin_slice(now_s)

    def _begin_slice(self, now_s: float) -> None:
        """Have the slice at hand there (`ready_s`), and ask for the one after it once it is."""
        assert self.unit is not None
        tasks = self.spec.units[self.unit].tasks
        while tasks[self._place].kind is not LateTaskKind.UPDATE:
            self._load(self.unit, self._place, now_s)
            self._place += 1
        self.left_s = tasks[self._place].seconds
        self.ready_s = max(
            [now_s, *(self._loaded_s.pop(self._key(self.unit, k), now_s) for k in tasks[self._place].after)]
        )
        following = next((k for k in range(self._place + 1, len(tasks)) if tasks[k].kind is LateTaskKind.LOAD), None)
        if following is not None:
            self._load(self.unit, following, self.ready_s)
        else:
            unit = self.next_unit()
            if unit is not None and self.spec.units[unit].tasks[0].kind is LateTaskKind.LOAD:
                self._load(unit, 0, self.ready_s)

    def _key(self, unit: int, place: int) -> int:
        return unit << 32 | place

    def _load(self, unit: int, place: int, asked_s: float) -> None:
        """Bring a slice in, unless it is there or on its way."""
        key, n_bytes = self._key(unit, place), self.spec.units[unit].tasks[place].n_bytes
        if key not in self._loaded_s:
            window_s = self._stored_s[1 - RING_WINDOWS] if len(self._stored_s) >= RING_WINDOWS - 1 else 0.0
            self._loaded_s[key] = self.disk.serve("ssd_read", n_bytes, max(asked_s, window_s))

    def advance(self, now_s: float, compute_s: float | None) -> tuple[float, float]:
        """Go on until compute has done so many seconds' work (None: it waits), or the update thread gets somewhere.

        Returns:
            The time then, and the seconds' work that compute has done.
        """
        if self.unit is None:
            if compute_s is None:
                raise AssertionError("compute waits for an update that nobody makes")
            return now_s + compute_s, compute_s
        if self.ready_s > now_s:
            until_s = self.ready_s if compute_s is None else min(self.ready_s, now_s + compute_s)
            return until_s, until_s - now_s
        speed = 1.0 if compute_s is None else self.spec.together
        spent_s = self.left_s / speed if compute_s is None else min(self.left_s, compute_s) / speed
        now_s += spent_s
        self.busy_s += spent_s
        self.left_s -= spent_s * speed
        if self.left_s <= _NOTHING_S:
            self.end_slice(now_s)
        return now_s, spent_s * speed

    def end_slice(self, now_s: float) -> None:
        """A slice is updated: it is stored, and the next one is begun, or the unit published."""
        assert self.unit is not None
        tasks = self.spec.units[self.unit].tasks
        self._place += 1
        while self._place < len(tasks) and tasks[self._place].kind is LateTaskKind.STORE:
            self._stored_s = [*self._stored_s, self.disk.serve("ssd_write", tasks[self._place].n_bytes, now_s)][-8:]
            self._place += 1
        if self._place < len(tasks):
            self._begin_slice(now_s)
        else:
            self.applied[self.unit] = self._batch
            self.unit = None
            self.begin(now_s)


def simulate_late(spec: LateSpec) -> LateSteps:
    """Perform `STEPS` steps; the mean of the later ones."""
    updater, now_s = _Updater(spec), 0.0
    uses: dict[int, list[int]] = {}
    hands: dict[int, list[int]] = {}
    for number, unit in enumerate(spec.units):
        uses.setdefault(unit.first_use, []).append(number)
        hands.setdefault(unit.handed_over, []).append(number)
    ends_s, waits_s = [0.0], [0.0]
    missed: list[int] = []
    begun: tuple[dict[str, int], dict[str, float], float] | None = None
    waited_s = 0.0
    for step in range(STEPS):
        if step == LEAD_STEPS:
            begun = dict(updater.disk.moved_bytes), dict(updater.disk.busy_s), updater.busy_s
        for op, seconds in enumerate(spec.ops_s):
            for used in uses.get(op, ()):
                began_s, updater.wanted = now_s, used
                while updater.produced[used] - updater.applied[used] > spec.max_staleness:
                    now_s, _ = updater.advance(now_s, None)
                updater.wanted = None
                waited_s += now_s - began_s
                missed.append(updater.produced[used] - updater.applied[used])
            left_s = seconds
            while left_s > _NOTHING_S:
                now_s, done_s = updater.advance(now_s, left_s)
                left_s -= done_s
            for given in hands.get(op, ()):
                updater.produced[given] += 1
            updater.begin(now_s)
        ends_s.append(now_s)
        waits_s.append(waited_s)
    assert begun is not None
    n_steps, spent_s = STEPS - LEAD_STEPS, ends_s[-1] - ends_s[LEAD_STEPS]
    moved = {lane: (updater.disk.moved_bytes[lane] - begun[0][lane]) / n_steps for lane in begun[0]}
    busy = {lane: (updater.disk.busy_s[lane] - begun[1][lane]) / spent_s if spent_s else 0.0 for lane in begun[1]}
    busy["update"] = (updater.busy_s - begun[2]) / spent_s if spent_s else 0.0
    return LateSteps(
        spent_s / n_steps, (waits_s[-1] - waits_s[LEAD_STEPS]) / n_steps,
        statistics.mean(missed[len(missed) // 2 :]) if missed else 0.0, moved["ssd_read"], moved["ssd_write"], busy,
    )  # fmt: skip
