"""Bytes of a tier that somebody holds, by tag. The only place where such bytes are counted.

A `Reservation` stands for bytes held; it can be resized and merged, and must end. The sum of all never exceeds the
budget: what does not fit is refused with a `BudgetShortage` that names the holders, and nothing changes.
"""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from pagemem.errors import TransitionError
from pagemem.tier import Tag, Tier
from pagemem.units import format_bytes


@dataclass(frozen=True, slots=True)
class BudgetShortage:
    """A refused request: what was asked for, what is used of which limit, and who uses it."""

    tier: Tier
    asked_bytes: int
    used_bytes: int
    limit_bytes: int
    holders: tuple[tuple[Tag, int], ...]

    def describe(self) -> str:
        """The error sentence, with what to change."""
        held = ", ".join(f"{tag.value} {format_bytes(n)}" for tag, n in self.holders) or "nobody"
        return (
            f"{self.tier.value}: {format_bytes(self.asked_bytes)} more do not fit, {format_bytes(self.used_bytes)} of "
            f"{format_bytes(self.limit_bytes)} are held by {held}; raise the budget by "
            f"{format_bytes(self.used_bytes + self.asked_bytes - self.limit_bytes)}"
        )


class ReservationState(enum.Enum):
    """HELD from `Budget.reserve` on, ENDED after `release` or `merge`, for good."""

    HELD = "held"
    ENDED = "ended"


_LEGAL: Final = {ReservationState.HELD: frozenset({ReservationState.ENDED}), ReservationState.ENDED: frozenset()}


class Reservation:
    """Bytes of one budget held under one tag. Methods may be called on any thread."""

    def __init__(self, budget: Budget, tag: Tag, holder: str) -> None:
        self._budget = budget
        self.tag = tag
        self.holder = holder
        self.n_bytes = 0
        self.state = ReservationState.HELD

    def resize(self, n_bytes: int) -> BudgetShortage | None:
        """Hold ``n_bytes`` from now on; on a shortage the size stays as it was.

        Raises:
            TransitionError: the reservation has ended. ValueError: the size is negative.
        """
        return self._budget._resize(self, n_bytes)

    def merge(self, other: Reservation) -> None:
        """Take over what ``other`` holds, and end it. Both must be of this budget and tag, and held.

        Raises:
            ValueError: they are of different budgets or tags. TransitionError: one has ended.
        """
        self._budget._merge(self, other)

    def release(self) -> None:
        """Hold nothing any more.

        Raises:
            TransitionError: it has ended before.
        """
        self._budget._release(self)

    def become(self, state: ReservationState) -> None:
        """Apply one legal move; called by the budget under its lock."""
        if state not in _LEGAL[self.state]:
            raise TransitionError(f"reservation {self.holder!r}: {self.state.value} -> {state.value} is not a legal move")
        self.state = state

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class Budget:
    """A hard limit on the bytes of one tier. Thread safe; its lock is held for bookkeeping only."""

    def __init__(self, tier: Tier, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"{tier.value}: a budget cannot be negative: {limit_bytes}")
        self.tier = tier
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self._lock = threading.Lock()
        self._held: set[Reservation] = set()

    def reserve(self, tag: Tag, n_bytes: int, holder: str) -> Reservation | BudgetShortage:
        """Hold ``n_bytes`` bytes; ``holder`` is named in errors."""
        made = Reservation(self, tag, holder)
        with self._lock:
            self._held.add(made)
        short = self._resize(made, n_bytes)
        if short is not None:
            self._release(made)
            return short
        return made

    def by_tag(self) -> dict[Tag, int]:
        """Bytes held under each tag that holds any."""
        with self._lock:
            return self._by_tag()

    def close(self) -> None:
        """Make sure that everything was given back.

        Raises:
            AssertionError: something was not; names the holders.
        """
        with self._lock:
            left = sorted(f"{r.holder} ({r.tag.value}, {r.n_bytes} bytes)" for r in self._held)
        if left:
            raise AssertionError(f"{self.tier.value}: reservations never released: {', '.join(left)}")

    def _by_tag(self) -> dict[Tag, int]:
        found: dict[Tag, int] = {}
        for reservation in self._held:
            if reservation.n_bytes:
                found[reservation.tag] = found.get(reservation.tag, 0) + reservation.n_bytes
        return found

    def _resize(self, reservation: Reservation, n_bytes: int) -> BudgetShortage | None:
        if n_bytes < 0:
            raise ValueError(f"reservation {reservation.holder!r}: a size cannot be negative: {n_bytes}")
        with self._lock:
            if reservation.state is not ReservationState.HELD:
                raise TransitionError(f"reservation {reservation.holder!r} has ended and cannot be resized")
            more = n_bytes - reservation.n_bytes
            if self.used_bytes + more > self.limit_bytes:
                holders = tuple(sorted(self._by_tag().items(), key=lambda pair: pair[0].value))
                return BudgetShortage(self.tier, more, self.used_bytes, self.limit_bytes, holders)
            reservation.n_bytes = n_bytes
            self.used_bytes += more
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            return None

    def _merge(self, kept: Reservation, ended: Reservation) -> None:
        if kept is ended or kept.tag is not ended.tag or kept._budget is not ended._budget:
            raise ValueError(f"reservations {kept.holder!r} and {ended.holder!r} cannot be merged: not of one budget and tag")
        with self._lock:
            if kept.state is not ReservationState.HELD:
                raise TransitionError(f"reservation {kept.holder!r} has ended and cannot take another over")
            ended.become(ReservationState.ENDED)
            self._held.remove(ended)
            kept.n_bytes, ended.n_bytes = kept.n_bytes + ended.n_bytes, 0

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            reservation.become(ReservationState.ENDED)
            self._held.remove(reservation)
            self.used_bytes -= reservation.n_bytes
            reservation.n_bytes = 0
