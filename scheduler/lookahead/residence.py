"""What is where while a step is read, and how something comes to be where it is needed. Pure.

There is one question, `Residence.ensure`: that a tensor be in its tier for an op. If it is not, what it is made of is
ensured first, one tier below or in the shards, and so on down to the page files; then a window of adjacent frames is
chosen (`scheduler.lookahead.tenants`). The task starts with the first op at which every tenant of its window has had
its last use, and what it is made of is there. A dirty tenant is brought below right after its last change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pagemem.errors import BudgetError
from pagemem.frames.page import FrameId, TensorId
from pagemem.frames.window import Window
from pagemem.tier import Tier
from scheduler.lookahead.lane_times import LaneTimes
from scheduler.lookahead.tenants import FOR_GOOD, Tenant, TierTenants, Wish
from scheduler.lookahead.tensor_facts import TensorFacts, facts_of
from scheduler.planning.sources import LANE_OF, chain_of
from scheduler.planning.task import Lane, Task, store_task
from scheduler.planning.trace import Op
from scheduler.planning.work import Work

#: Tensor, first frame, dirtiness and deadness of everything in frames, sorted.
Placed = tuple[tuple[TensorId, FrameId, bool, bool], ...]

#: What a budget that is too small is called.
_SETTINGS: Final = {Tier.HOST: "memory.ram", Tier.DEVICE: "memory.device"}


@dataclass(slots=True)
class Residence:
    """What is in the frames of all tiers, and the predicted clock. Op numbers count on over all cycles.

    Attributes:
        tasks: what was decided, in order, with the op for whose sake.
        op_end_s: when each op read so far ends; of an update beside compute, when compute goes on.
        below_since: the op and the time from which on what is below a tensor is what it has to be made of.
        short: the tier that had no window when `ensure` said so.
    """

    work: Work
    facts: dict[TensorId, TensorFacts] = field(init=False)
    books: dict[Tier, TierTenants] = field(init=False)
    lanes: dict[Lane, LaneTimes] = field(default_factory=lambda: {lane: LaneTimes() for lane in Lane})
    tasks: list[tuple[int, Task]] = field(default_factory=list)
    op_end_s: list[float] = field(default_factory=list)
    below_since: dict[TensorId, tuple[int, float]] = field(default_factory=dict)
    write_free_s: float = 0.0
    short: Tier = Tier.HOST

    def __post_init__(self) -> None:
        machine = self.work.machine
        self.facts = facts_of(self.work)
        sizes = {tensor: facts.n_bytes for tensor, facts in self.facts.items()}
        self.books = {
            tier: TierTenants(tier, machine.page_bytes, n_frames, sizes, self.op_end_s)
            for tier, n_frames in machine.n_frames.items()
        }
        for tensor, frame in self.work.resident.items():
            self.book(tensor).put(tensor, sizes[tensor], Tenant(frame, FOR_GOOD))

    def book(self, tensor: TensorId) -> TierTenants:
        """Of the tier of a tensor."""
        return self.books[self.facts[tensor].tier]

    def tenant(self, tensor: TensorId) -> Tenant | None:
        """A tensor in frames, if it is."""
        return self.book(tensor).tenants.get(tensor)

    def begin_with(self, initial: Mapping[TensorId, FrameId], dirty: Iterable[TensorId]) -> None:
        """Begin with tensors in these frames; what is in ``dirty`` may have changed."""
        changed = set(dirty)
        for tensor, frame in initial.items():
            if self.tenant(tensor) is None:
                self.book(tensor).put(tensor, self.facts[tensor].n_bytes, Tenant(frame, -1, tensor in changed))
                self.book(tensor).used_next(tensor, self.next_need(tensor, -1))

    def placement(self) -> Placed:
        """What is where; two steps that begin alike go on alike."""
        tenants = (book.tenants.items() for book in self.books.values())
        return tuple(sorted((tensor, t.frame, t.dirty, t.dead) for of_tier in tenants for tensor, t in of_tier))

    # ---- next uses ---------------------------------------------------------------------------------------------

    def next_need(self, tensor: TensorId, now: int) -> float:
        """First op after ``now`` that uses a tensor as it is, or makes of it what is not there."""
        facts = self.facts[tensor]
        found = facts.next_use(now, len(self.work.trace.ops))
        for copy in facts.copies:
            there = self.tenant(copy)
            if there is None or there.dead:
                found = min(found, self.next_need(copy, now))
        return found

    def _note_next_need(self, tensor: TensorId, now: int) -> None:
        tenant = self.tenant(tensor)
        if tenant is not None:
            self.book(tensor).used_next(tensor, math.inf if tenant.dead else self.next_need(tensor, now))

    # ---- moves -------------------------------------------------------------------------------------------------

    def ensure(
        self,
        tensor: TensorId,
        now: int,
        staying: frozenset[TensorId],
        need_s: float,
        *,
        fresh: bool,
        pack: bool = False,
    ) -> float | None:
        """Have a tensor in its tier for op ``now``, if need be by making it of what it is made of.

        Args:
            staying: tenants that may not leave.
            need_s: when it is needed, on the predicted clock.
            fresh: only its frames are wanted. pack: in the lowest window.

        Returns:
            When it is there; None when no window is free in the tier `short`.
        """
        facts = self.facts[tensor]
        there = self._as_it_is(facts, now, staying, fresh=fresh)
        if there is not None:
            return there.ready_s
        trigger, from_s = self.below_since.get(tensor, (0, 0.0))
        made_of: Tenant | None = None
        if facts.source is not None and not fresh:
            source_s = self.ensure(facts.source, now, staying | {tensor}, need_s - facts.move_s, fresh=False)
            made_of = self.tenant(facts.source)
            if source_s is None or made_of is None:
                return None
            trigger, from_s = max(trigger, made_of.ready_trigger), max(from_s, source_s)
            staying |= {facts.source}
        lane, move_s = self.lanes[facts.lane], 0.0 if fresh else facts.move_s
        wish = Wish(now, facts.n_frames, lane.start_s(from_s, move_s), move_s, need_s, staying, pack)
        window = self.books[facts.tier].choose(wish)
        if window is None:
            self.short = facts.tier
            return None
        end_s, trigger = self._come(facts, window, wish, trigger, from_s, fresh=fresh)
        if made_of is not None and facts.source is not None:
            made_of.is_busy(end_s, trigger)
            self._note_next_need(facts.source, now - 1)
        return end_s

    def _as_it_is(self, facts: TensorFacts, now: int, staying: frozenset[TensorId], *, fresh: bool) -> Tenant | None:
        """A tensor that is in its tier already, or comes down to it from a copy that has changed."""
        book = self.books[facts.tier]
        tenant = book.tenants.get(facts.tensor)
        if tenant is not None and tenant.dead and tenant.locked_until == FOR_GOOD:
            tenant.dead = False
            if not fresh:
                self._written_back(facts, now, staying)
        if tenant is not None and tenant.dead:
            if tenant.locked_until >= now:  # of what it held somebody has a view: nothing else can come to it
                raise self.shortage(self.work.trace.ops[now % len(self.work.trace.ops)])
            self.evict(facts.tensor, now, staying)
            book.trigger = max(book.trigger, tenant.locked_until + 1, tenant.busy_trigger)
            self.since(facts.tensor, book.trigger, tenant.busy_s)
            tenant = None
        if tenant is None and not fresh and self._written_back(facts, now, staying):
            tenant = book.tenants.get(facts.tensor)
        return tenant

    def _come(
        self, facts: TensorFacts, window: Window, wish: Wish, trigger: int, from_s: float, *, fresh: bool
    ) -> tuple[float, int]:
        """Bring a tensor into a window, after its tenants have left; returns when it is there, and the trigger."""
        book, lane = self.books[facts.tier], self.lanes[facts.lane]
        trigger = max(trigger, book.trigger, wish.now - len(self.work.trace.ops) + 1)
        for victim in window.tenants:
            gone = self.evict(victim, wish.now, wish.staying)
            from_s = max(from_s, book.released_s(gone))
            trigger = max(trigger, gone.locked_until + 1, gone.busy_trigger)
        end_s = lane.plan(lane.start_s(from_s, wish.move_s), wish.move_s)
        book.trigger = trigger
        coming = Tenant(
            window.first, wish.now - 1, ready_s=end_s, ready_trigger=trigger, busy_s=end_s, busy_trigger=trigger
        )
        book.put(facts.tensor, facts.n_bytes, coming)
        n_bytes = facts.n_bytes if fresh else facts.moved_bytes
        task = Task(
            facts.kind, facts.tensor, facts.tier, facts.lane, n_bytes, trigger,
            frame=window.first, needed_at=wish.now, fresh=fresh,
        )  # fmt: skip
        self.tasks.append((wish.now, task))
        return end_s, trigger

    def evict(self, tensor: TensorId, now: int, staying: frozenset[TensorId]) -> Tenant:
        """Take a tensor out of its frames, having brought it below when it is dirty."""
        facts, book = self.facts[tensor], self.book(tensor)
        tenant = book.tenants[tensor]
        if tenant.dirty and not tenant.dead:
            if facts.source is None:
                self.tasks.append((now, store_task(tensor, facts.n_bytes, tenant.ready_trigger)))
                self.since(tensor, tenant.ready_trigger, tenant.clean_at_s)
            elif self.write_back(tensor, now, staying) is None:
                raise self.shortage(self.work.trace.ops[now % len(self.work.trace.ops)])
        book.leave(tensor)
        if facts.source is not None:
            self._note_next_need(facts.source, now - 1)
        return tenant

    def write_back(self, tensor: TensorId, now: int, staying: frozenset[TensorId]) -> float | None:
        """Bring a changed copy down to what it was made of; returns when it is there, None where it finds no frames."""
        facts, tenant = self.facts[tensor], self.tenant(tensor)
        assert facts.source is not None and tenant is not None
        tenant.dirty = False
        there_s = self.ensure(facts.source, now, staying | {tensor}, math.inf, fresh=True)
        below = self.tenant(facts.source)
        if there_s is None or below is None:
            tenant.dirty = True
            return None
        trigger = max(tenant.ready_trigger, below.ready_trigger, now - len(self.work.trace.ops) + 1)
        lane = self.lanes[LANE_OF[facts.back]]
        end_s = lane.serve(max(there_s, tenant.ready_s), facts.back_s)
        below_facts = self.facts[facts.source]
        self.tasks.append(
            (now, Task(facts.back, facts.source, below_facts.tier, LANE_OF[facts.back], facts.n_bytes, trigger,
                       frame=below.frame, needed_at=now))
        )  # fmt: skip
        tenant.is_busy(end_s, trigger)
        self._note_next_need(facts.source, now - 1)
        self.note_change(facts.source, below, end_s, trigger)
        return end_s

    def write_all_back(self, now: int) -> None:
        """Bring down every changed copy that may leave, as after op ``now``.

        Raises:
            BudgetError: one finds no frames below.
        """
        for book in self.books.values():
            for tensor, tenant in list(book.tenants.items()):
                leaves = tenant.dirty and not tenant.dead and tenant.locked_until != FOR_GOOD
                leaves = leaves and self.facts[tensor].source is not None
                if leaves and self.write_back(tensor, now, frozenset()) is None:
                    raise self.shortage(self.work.trace.ops[now % len(self.work.trace.ops)])

    def _written_back(self, facts: TensorFacts, now: int, staying: frozenset[TensorId]) -> bool:
        """Bring a changed copy down to what is wanted, if there is one."""
        for copy in facts.copies:
            there = self.tenant(copy)
            if there is not None and there.dirty and not there.dead:
                return self.write_back(copy, now, staying) is not None
        return False

    def since(self, tensor: TensorId, trigger: int, at_s: float) -> None:
        """What is below a tensor is other content, or its frames have a use, until an op and a time."""
        before = self.below_since.get(tensor, (0, 0.0))
        self.below_since[tensor] = max(before[0], trigger), max(before[1], at_s)

    def note_change(self, tensor: TensorId, tenant: Tenant, changed_s: float, trigger: int) -> None:
        """A tensor has other content from ``changed_s`` on, which is brought below as soon as may be."""
        facts = self.facts[tensor]
        if facts.source is not None:
            tenant.clean_at_s = changed_s + facts.back_s
        else:
            if not tenant.dirty:
                self.write_free_s = max(self.write_free_s, changed_s) + facts.back_s
            tenant.clean_at_s = max(self.write_free_s, changed_s + facts.back_s)
        tenant.dirty, tenant.ready_trigger = True, trigger
        tenant.ready_s = changed_s
        self.book(tensor).changed(tensor)

    def shortage(self, op: Op) -> BudgetError:
        """What an op needs at once in the tier that is short, which is more than there is."""
        tier, page_bytes = self.short, self.work.page_bytes
        own = {access.tensor for access in op.accesses}
        passing = {link for tensor in own for link in chain_of(tensor, self.work.sources)} - own
        needs = [self.work.frames(tensor) for tensor in own if self.work.tiers[tensor] is tier]
        needs.append(
            max((self.work.frames(tensor) for tensor in passing if self.work.tiers[tensor] is tier), default=0)
        )
        if op.conditional is not None and op.conditional.tier is tier:
            needs.append(self.work.room_frames(op.conditional))
        need_bytes = page_bytes * sum(needs)
        return BudgetError(
            f"{op.name} needs {need_bytes} bytes of {tier.value} pages at once, the budget holds "
            f"{self.work.machine.n_frames[tier] * page_bytes}; raise {_SETTINGS[tier]}",
            need_bytes,
        )
