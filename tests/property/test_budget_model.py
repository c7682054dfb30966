"""Budgets against a model: a list of sizes. Any sequence of calls leaves the same figures, and refuses the same
calls."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagemem.budget import Budget, Reservation
from pagemem.errors import BudgetError, TransitionError
from pagemem.tier import Tag, Tier

LIMIT_BYTES = 50
SIZES = st.integers(0, LIMIT_BYTES + 5)
TAGS = (Tag.PARAM, Tag.GRAD, Tag.MOMENT)


@dataclass
class Entry:
    """A reservation and the bytes that it must hold."""

    reservation: Reservation
    n_bytes: int
    ended: bool = False


class BudgetModel(RuleBasedStateMachine):
    """Calls on one budget, mirrored in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(Tier.DEVICE, LIMIT_BYTES)
        self.entries: list[Entry] = []
        self.peak_bytes = 0

    def used_bytes(self) -> int:
        return sum(entry.n_bytes for entry in self.entries)

    def pick(self, data: st.DataObject) -> Entry:
        return self.entries[data.draw(st.integers(0, len(self.entries) - 1))]

    @rule(tag=st.sampled_from(TAGS), n_bytes=SIZES)
    def reserve(self, tag: Tag, n_bytes: int) -> None:
        fits = self.used_bytes() + n_bytes <= LIMIT_BYTES
        try:
            self.entries.append(Entry(self.budget.reserve(tag, n_bytes, f"number {len(self.entries)}"), n_bytes))
        except BudgetError:
            assert not fits
        else:
            assert fits

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), n_bytes=SIZES)
    def resize(self, data: st.DataObject, n_bytes: int) -> None:
        entry = self.pick(data)
        try:
            found = entry.reservation.resize(n_bytes)
        except TransitionError:
            assert entry.ended
            return
        assert not entry.ended
        assert found == (self.used_bytes() - entry.n_bytes + n_bytes <= LIMIT_BYTES)
        if found:
            entry.n_bytes = n_bytes

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = self.pick(data)
        try:
            entry.reservation.release()
        except TransitionError:
            assert entry.ended
            return
        assert not entry.ended
        entry.n_bytes, entry.ended = 0, True

    @invariant()
    def figures_agree(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.used_bytes())
        assert self.budget.used_bytes == self.used_bytes() <= self.budget.peak_bytes == self.peak_bytes <= LIMIT_BYTES
        by_tag = {tag: sum(e.n_bytes for e in self.entries if e.reservation.tag is tag) for tag in TAGS}
        assert self.budget.by_tag() == {tag: n_bytes for tag, n_bytes in by_tag.items() if n_bytes}
        for entry in self.entries:
            assert entry.reservation.n_bytes == entry.n_bytes
            assert entry.reservation.released is entry.ended

    def teardown(self) -> None:
        for entry in self.entries:
            if not entry.ended:
                entry.reservation.release()
        assert self.budget.used_bytes == 0
        self.budget.close()


TestBudgetModel = BudgetModel.TestCase
