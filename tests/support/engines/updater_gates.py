"""Holds the updater of lock-free mode where a test wants it, and sees every time the training thread has to wait for
it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import offload
from optim.lockfree.updater import LockFreeUpdater
from optim.unit import Unit

#: Every point at which the updater passes a gate, in the order in which it does for one unit ("slice" several times).
POINTS = ("chosen", "taken", "slice", "applied", "published")
TIMEOUT_S = 30.0
#: Stands for every unit.
ANY = "*"


class _Waking(threading.Event):
    """The event that wakes the updater; tells when it is set."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__()
        self._then = then

    def set(self) -> None:
        super().set()
        self._then()


class UpdaterGates:
    """Gates of one engine's updater, open at first. Closing the engine opens them, once the updater has been told to
    stop.

    Attributes:
        passed: points and unit names in the order in which the updater came there.
        waits: name of the unit, or "gradients", for each time the training thread had to wait for the updater.
        on_wait: called on the training thread whenever it is about to wait; opens all gates unless set.
        on_pass: called on the updater at every point, before it may be held there.
    """

    def __init__(self, engine: offload.Engine) -> None:
        assert isinstance(engine.debug.updater, LockFreeUpdater)
        self.updater = engine.debug.updater
        self.thread = self.updater._thread
        self.passed: list[tuple[str, str]] = []
        self.waits: list[str] = []
        self.on_wait: Callable[[], None] = self.open
        self.on_pass: Callable[[str, Unit], None] = lambda point, unit: None
        self._changed = threading.Condition()
        self._held: set[tuple[str, str]] = set()
        self._standing: tuple[str, str] | None = None
        self._await_progress = self.thread.await_progress
        self.thread.await_progress = self._see_wait  # type: ignore[method-assign]
        work = self.thread._work
        self.thread._work = _Waking(self._see_stop)
        self.thread._gate = self._pass
        work.set()

    def hold(self, point: str, unit: str = ANY) -> None:
        """Hold the updater when it comes to ``point`` next."""
        assert point in POINTS
        with self._changed:
            self._held.add((point, unit))

    def open(self) -> None:
        """Let the updater pass everywhere."""
        with self._changed:
            self._held.clear()
            self._changed.notify_all()

    def open_one(self) -> None:
        """Let the updater go on from where it stands; it will be held there again."""
        with self._changed:
            assert self._standing is not None, "the updater stands nowhere"
            self._standing = None
            self._changed.notify_all()

    def await_standing(self, point: str, unit: str = ANY) -> str:
        """Wait until the updater is held at ``point``; returns the name of the unit."""
        with self._changed:
            held = self._changed.wait_for(
                lambda: self._standing is not None and self._standing[0] == point and unit in (ANY, self._standing[1]),
                TIMEOUT_S,
            )
            assert held and self._standing is not None, f"the updater did not come to {point}: {self.passed[-5:]}"
            return self._standing[1]

    def await_passed(self, point: str, unit: str, count: int) -> None:
        """Wait until the updater has come to ``point`` for ``unit`` ``count`` times."""
        with self._changed:
            came = self._changed.wait_for(lambda: self.passed.count((point, unit)) >= count, TIMEOUT_S)
            assert came, f"the updater did not come to {point} of {unit}: {self.passed[-5:]}"

    # ---- what the engine calls ---------------------------------------------------------------------------------

    def _pass(self, point: str, unit: Unit) -> None:
        with self._changed:
            self.on_pass(point, unit)
            self.passed.append((point, unit.name))
            self._changed.notify_all()
            if not self._is_held(point, unit.name):
                return
            here = self._standing = (point, unit.name)
            self._changed.notify_all()
            opened = self._changed.wait_for(
                lambda: self._standing is not here or not self._is_held(point, unit.name), TIMEOUT_S
            )
            self._standing = None
            assert opened, f"the gate at {point} of {unit.name} was never opened"

    def _is_held(self, point: str, unit: str) -> bool:
        return (point, unit) in self._held or (point, ANY) in self._held

    def _see_wait(self, ready: Callable[[], bool]) -> None:
        if not ready():
            wanted = self.thread._wanted
            self.waits.append("gradients" if wanted is None else wanted.unit.name)
            self.on_wait()
        self._await_progress(ready)

    def _see_stop(self) -> None:
        if self.thread._stopping:
            self.open()
