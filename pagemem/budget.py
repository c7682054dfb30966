"""Bytes of a tier that somebody holds, by tag. The only place where such bytes are counted.

A `Reservation` stands for bytes held; it can be resized, and must end. The sum of all never exceeds the
budget: what does not fit is refused with a `BudgetShortage`, which names the holders and is false where a reservation
is true, and nothing changes.

Invariants, whenever the budget's lock is free
    1. 0 <= used_bytes <= limit_bytes, and used_bytes <= peak_bytes <= limit_bytes.
    2. used_bytes is the sum of the sizes of all HELD reservations, in all and tag by tag.
    3. A reservation that is not HELD has size 0.

A reservation begins HELD; `Reservation.release` makes it RELEASED, for good.
"""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal

from pagemem.errors import TransitionError
from pagemem.state_machine import StateMachine
from pagemem.telemetry.events import Watcher
from pagemem.tier import Tag, Tier
from pagemem.units import format_bytes


@dataclass(frozen=True, slots=True)
class BudgetShortage:
    """A refused request; always false.

    Attributes:
        asked_bytes: bytes wanted beyond those held.
        used_bytes: bytes held by all at that moment.
        limit_bytes: the budget.
        holders: bytes held under each tag that holds any, most first.
    """

    tier: Tier
    asked_bytes: int
    used_bytes: int
    limit_bytes: int
    holders: tuple[tuple[Tag, int], ...]

    def __bool__(self) -> Literal[False]:
        return False

    def describe(self) -> str:
        """The error sentence, with what to change."""
        held = ", ".join(f"{tag.value} {format_bytes(n)}" for tag, n in self.holders) or "nobody"
        return (
            f"{self.tier.value}: {format_bytes(self.asked_bytes)} more do not fit, {format_bytes(self.used_bytes)} of "
            f"{format_bytes(self.limit_bytes)} are held by {held}; raise the budget by "
            f"{format_bytes(self.used_bytes + self.asked_bytes - self.limit_bytes)}"
        )


class ReservationState(enum.Enum):
    """HELD from `Budget.reserve` on, RELEASED after its end."""

    HELD = "held"
    RELEASED = "released"


_MOVES: Final = StateMachine("reservation", {ReservationState.HELD: {ReservationState.RELEASED}})


class Reservation:
    """Bytes of one budget held under one tag. Made by `Budget.reserve`; methods may be called on any thread.

    As a context manager it is released at the end of the block.
    """

    __slots__ = ("_budget", "_n_bytes", "_state", "holder", "tag")

    def __init__(self, budget: Budget, tag: Tag, holder: str) -> None:
        self._budget = budget
        self._n_bytes = 0  # This and the state are written under the budget's lock only.
        self._state = ReservationState.HELD
        self.tag = tag
        self.holder = holder

    @property
    def n_bytes(self) -> int:
        """Bytes held now; 0 once it has ended."""
        return self._n_bytes

    @property
    def state(self) -> ReservationState:
        """Whether it is held, and if not how it ended."""
        return self._state

    def resize(self, n_bytes: int) -> Reservation | BudgetShortage:
        """Hold ``n_bytes`` from now on.

        Returns:
            This reservation (true), or the shortage (false); the size is as it was then.

        Raises:
            ValueError: the size is negative. TransitionError: the reservation has ended.
        """
        return self._budget._resize(self, n_bytes)

    def release(self) -> None:
        """Hold nothing any more.

        Raises:
            TransitionError: it has ended before: two owners believe that it is theirs.
        """
        self._budget._release(self)

    def end(self) -> None:
        """Hold nothing any more, if it has not ended before: for those who may be closed twice."""
        if self._state is ReservationState.HELD:
            self.release()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Reservation {self.holder!r} {self.tag.value} {self._n_bytes} bytes {self._state.value}>"


class Budget:
    """A hard limit on the bytes of one tier. Thread safe: one lock, held for bookkeeping only.

    Args:
        tier: named in shortages and errors.
        limit_bytes: what may be held at any instant.

    Raises:
        ValueError: the limit is negative.
    """

    def __init__(self, tier: Tier, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"{tier.value}: a budget cannot be negative: {limit_bytes}")
        self.tier = tier
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()  # guards all below, and size and state of every reservation
        self._used_bytes = 0
        self._peak_bytes = 0
        self._by_tag = dict.fromkeys(Tag, 0)
        self._held: set[Reservation] = set()
        self._watcher: Watcher | None = None

    def reserve(self, tag: Tag, n_bytes: int, holder: str) -> Reservation | BudgetShortage:
        """Hold ``n_bytes`` bytes; ``holder`` is named in errors.

        Raises:
            ValueError: the size is negative.
        """
        made = Reservation(self, tag, holder)
        _check_size(made, n_bytes)
        with self._lock:
            shortage = self._change(made, n_bytes)
            if shortage is not None:
                return shortage
            self._held.add(made)
            return made

    @property
    def used_bytes(self) -> int:
        """Bytes held now."""
        return self._used_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at any instant so far."""
        return self._peak_bytes

    def by_tag(self) -> dict[Tag, int]:
        """Bytes held under each tag that holds any, all at one instant."""
        with self._lock:
            return {tag: n_bytes for tag, n_bytes in self._by_tag.items() if n_bytes}

    def watch(self, watcher: Watcher | None) -> dict[Tag, int]:
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

    def _change(self, reservation: Reservation, n_bytes: int) -> BudgetShortage | None:
        """Resize with the lock held."""
        more_bytes = n_bytes - reservation._n_bytes
        if self._used_bytes + more_bytes > self.limit_bytes:
            holders = sorted(((tag, n) for tag, n in self._by_tag.items() if n), key=lambda held: -held[1])
            return BudgetShortage(self.tier, more_bytes, self._used_bytes, self.limit_bytes, tuple(holders))
        reservation._n_bytes = n_bytes
        self._used_bytes += more_bytes
        self._by_tag[reservation.tag] += more_bytes
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)
        if self._watcher is not None:
            self._watcher.held(self.tier, reservation.tag, more_bytes)
        return None

    def _resize(self, reservation: Reservation, n_bytes: int) -> Reservation | BudgetShortage:
        _check_size(reservation, n_bytes)
        with self._lock:
            if reservation._state is not ReservationState.HELD:
                raise TransitionError(f"reservation {reservation.holder!r} was released before; it cannot be resized")
            shortage = self._change(reservation, n_bytes)
            return reservation if shortage is None else shortage

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            reservation._state = _MOVES.move(reservation._state, ReservationState.RELEASED, repr(reservation.holder))
            n_bytes, reservation._n_bytes = reservation._n_bytes, 0
            self._held.remove(reservation)
            self._used_bytes -= n_bytes
            self._by_tag[reservation.tag] -= n_bytes
            if self._watcher is not None:
                self._watcher.held(self.tier, reservation.tag, -n_bytes)


def _check_size(reservation: Reservation, n_bytes: int) -> None:
    if n_bytes < 0:
        raise ValueError(f"reservation {reservation.holder!r}: a size cannot be negative: {n_bytes}")
