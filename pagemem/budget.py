"""Bytes of a tier that somebody holds, by tag. The only place where such bytes are counted.

A `Reservation` stands for bytes held; it can be resized, and must end. The sum of all never exceeds the
budget: what does not fit is refused, and nothing changes.

Invariants, whenever the budget's lock is free
    1. 0 <= used_bytes <= peak_bytes <= limit_bytes.
    2. used_bytes is the sum of the sizes of all reservations, in all and tag by tag.
    3. A released reservation has size 0, for good.
"""

from __future__ import annotations

import threading

from pagemem.errors import BudgetError, TransitionError
from pagemem.telemetry.recorder import Recorder
from pagemem.tier import Tag, Tier
from pagemem.units import format_bytes


class Reservation:
    """Bytes of one budget held under one tag. Made by `Budget.reserve`; methods may be called on any thread.

    Attributes:
        n_bytes: held now; 0 once it has ended. Written under the budget's lock only, as is ``released``.
        holder: named in errors.
    """

    __slots__ = ("_budget", "holder", "n_bytes", "released", "tag")

    def __init__(self, budget: Budget, tag: Tag, holder: str) -> None:
        self._budget = budget
        self.n_bytes = 0
        self.released = False
        self.tag = tag
        self.holder = holder

    def resize(self, n_bytes: int) -> bool:
        """Hold ``n_bytes`` from now on, if they fit; returns whether they do. If not, the size is as it was.

        Raises:
            ValueError: the size is negative. TransitionError: the reservation has ended.
        """
        with self._budget._lock:
            if self.released:
                raise TransitionError(f"reservation {self.holder!r} was released before; it cannot be resized")
            return self._budget._change(self, n_bytes)

    def release(self) -> None:
        """Hold nothing any more.

        Raises:
            TransitionError: it has ended before: two owners believe that it is theirs.
        """
        with self._budget._lock:
            if self.released:
                raise TransitionError(f"reservation {self.holder!r} was released before; it cannot be released again")
            self.released = True
            self._budget._change(self, 0)
            self._budget._held.remove(self)

    def end(self) -> None:
        """Hold nothing any more, if it has not ended before: for those who may be closed twice."""
        if not self.released:
            self.release()


class Budget:
    """A hard limit on the bytes of one tier. Thread safe: one lock, held for bookkeeping only.

    Args:
        tier: named in shortages and errors.
        limit_bytes: what may be held at any instant.

    Attributes:
        used_bytes: held now.
        peak_bytes: most bytes held at any instant so far.

    Raises:
        ValueError: the limit is negative.
    """

    def __init__(self, tier: Tier, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"{tier.value}: a budget cannot be negative: {limit_bytes}")
        self.tier = tier
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()  # guards all below, and size and state of every reservation
        self.used_bytes = self.peak_bytes = 0
        self._by_tag = dict.fromkeys(Tag, 0)
        self._held: set[Reservation] = set()
        self._watcher: Recorder | None = None

    def reserve(self, tag: Tag, n_bytes: int, holder: str) -> Reservation:
        """Hold ``n_bytes`` bytes; ``holder`` is named in errors.

        Raises:
            BudgetError: they do not fit; says what is held under which tags.
            ValueError: the size is negative.
        """
        made = Reservation(self, tag, holder)
        with self._lock:
            if not self._change(made, n_bytes):
                most_first = sorted(((n, tag.value) for tag, n in self._by_tag.items() if n), reverse=True)
                held = ", ".join(f"{name} {format_bytes(n)}" for n, name in most_first) or "nobody"
                raise BudgetError(
                    f"{self.tier.value}: {format_bytes(n_bytes)} more do not fit, {format_bytes(self.used_bytes)} of "
                    f"{format_bytes(self.limit_bytes)} are held by {held}; raise the budget by "
                    f"{format_bytes(self.used_bytes + n_bytes - self.limit_bytes)}",
                    self.used_bytes + n_bytes,
                )
            self._held.add(made)
        return made

    def by_tag(self) -> dict[Tag, int]:
        """Bytes held under each tag that holds any, all at one instant."""
        with self._lock:
            return {tag: n_bytes for tag, n_bytes in self._by_tag.items() if n_bytes}

    def watch(self, watcher: Recorder | None) -> dict[Tag, int]:
        """Tell ``watcher`` (None: nobody) of every change from now on; returns `by_tag` of that instant."""
        with self._lock:
            self._watcher = watcher
            return {tag: n_bytes for tag, n_bytes in self._by_tag.items() if n_bytes}

    def close(self) -> None:
        """Make sure that everything was given back. May be called again after it was.

        Raises:
            AssertionError: something was not; names every holder.
        """
        with self._lock:
            left = sorted(f"{r.holder} ({r.tag.value}, {r.n_bytes} bytes)" for r in self._held)
        if left:
            raise AssertionError(f"{self.tier.value}: reservations never released: {', '.join(left)}")

    def _change(self, reservation: Reservation, n_bytes: int) -> bool:
        """Resize with the lock held, if it fits."""
        if n_bytes < 0:
            raise ValueError(f"reservation {reservation.holder!r}: a size cannot be negative: {n_bytes}")
        more_bytes = n_bytes - reservation.n_bytes
        if self.used_bytes + more_bytes > self.limit_bytes:
            return False
        reservation.n_bytes = n_bytes
        self.used_bytes += more_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self._by_tag[reservation.tag] += more_bytes
        if self._watcher is not None:
            self._watcher.held(self.tier, reservation.tag, more_bytes)
        return True
