"""The updater of the hand-off without its thread, one move at a time, and watched channels and clocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from one_unit import mark
from torch import Tensor

from optim.lockfree.unit_channel import GradientBatch, GradientSum, UnitChannel, Version
from optim.lockfree.unit_clock import UnitClock
from optim.unit import Slot, Unit
from pagemem.process.wait_lock import WaitLock

#: Elements of a parameter, which is also how many steps can be told apart.
N = 64
Hook = Callable[[], None]


class SavedWeight:
    """What autograd keeps of a unit's parameters."""


class WatchedClock(UnitClock):
    """A clock after whose reading by one side the other side moves."""

    __slots__ = ("_adopted", "events", "read")

    def __init__(self, read: Hook, events: list[tuple[str, int]]) -> None:
        self.read, self.events = read, events
        super().__init__()

    @property
    def adopted(self) -> int:  # type: ignore[override]
        """The number as it was; by the time it is looked at it may be old."""
        value = self._adopted
        self.read()
        return value

    @adopted.setter
    def adopted(self, value: int) -> None:
        self._adopted = value

    def adopt(self, last: int) -> None:
        """As the real one, recorded."""
        super().adopt(last)
        self.events.append(("adopt", last))


class WatchedDeque(deque[Any]):
    """A deque after each operation on which the other side moves."""

    moved: Hook

    def append(self, item: Any) -> None:
        """Then the other side moves."""
        super().append(item)
        self.moved()

    def popleft(self) -> Any:
        """Then the other side moves."""
        item = super().popleft()
        self.moved()
        return item


class WatchedChannel(UnitChannel):
    """A channel that records publications and what was seen of them."""

    def unadopted(self) -> Version | None:
        """As the real one, recorded."""
        events = cast(WatchedClock, self.clock).events
        events.append(("look", self.version.last if self.version is not None else 0))
        return super().unadopted()

    def publish(self, batch: GradientBatch) -> None:
        """As the real one, recorded."""
        super().publish(batch)
        cast(WatchedClock, self.clock).events.append(("publish", batch.last))


class Pages:
    """The arena: one row of parameters for each unit. The other side moves before each copy."""

    def __init__(self, units: list[Unit], moved: Hook) -> None:
        self.rows = [torch.zeros(unit.slots[-1].end) for unit in units]
        self._moved = moved

    def view(self, frame: int, offset_bytes: int, dtype: torch.dtype, numel: int) -> Tensor:
        """Elements of a unit's row."""
        self._moved()
        return self.rows[frame][offset_bytes // 4 : offset_bytes // 4 + numel]

    def of(self, unit: Unit, slot: Slot) -> Tensor:
        """A parameter's values."""
        return self.rows[unit.index][slot.offset : slot.end]


class SteppedUpdater:
    """The updater, one move at a time, in place of its thread."""

    def __init__(self, boxes: list[UnitChannel], pages: Pages) -> None:
        self._boxes, self._pages = boxes, pages
        self._wanted: UnitChannel | None = None
        self._at: Iterator[None] = self._serve()
        self.follower = SimpleNamespace(n_frames=0)
        self.lock = WaitLock("updates")
        self.moving = False
        self.choice = 0
        self.waits = 0
        self.applied: dict[Slot, list[int]] = {slot: [] for box in boxes for slot in box.unit.slots}

    def move(self) -> None:
        """The next thing the updater does."""
        self.moving = True
        next(self._at)
        self.moving = False

    def _serve(self) -> Iterator[None]:
        while True:
            busy = [box for box in self._boxes if box.has_work]
            if not busy:
                yield
                continue
            box = self._wanted if self._wanted in busy else busy[self.choice % len(busy)]
            assert box is not None
            yield
            batch = box.take()
            yield
            if batch is None:
                continue
            newest = box.newest_values()
            yield
            for slot, total in batch.sums.items():
                self._update(box.unit, slot, total, newest)
                yield
            box.publish(batch)
            yield

    def _update(self, unit: Unit, slot: Slot, total: GradientSum, newest: dict[Slot, Tensor]) -> None:
        known = newest.get(slot)
        before = (self._pages.of(unit, slot) if known is None else known).clone()
        assert torch.equal(before, mark(N, *self.applied[slot])), "the updater does not start from the newest values"
        steps = [hyper["lr"] for hyper in total.hypers]
        assert torch.equal(total.flat, mark(N, *steps)), "gradients and learning rates are not of the same steps"
        self.applied[slot] += steps
        total.flat.add_(before)

    # ---- what the training thread calls ------------------------------------------------------------------------

    def start(self) -> None:
        """It moves when it is told to."""

    stop = wake = check = start

    def want(self, box: UnitChannel | None) -> None:
        """As the real one."""
        self._wanted = box

    def await_progress(self, ready: Hook) -> None:
        """Move until it is so."""
        self.waits += 1
        for _ in range(1000):
            if ready():
                return
            self.move()
        raise AssertionError("the training thread waits for ever")
