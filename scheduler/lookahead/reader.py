"""The reader that runs through a cyclic trace ahead of compute and decides what moves, and where to. Pure.

For each access whose tensor is not in its tier the best window is taken: among those that cost no stall on the
predicted clock the one whose tenants are needed last (Belady's rule; all next uses are known), clean before dirty on
ties. Memory that nothing needs keeps what it holds, so spare memory serves first what is used soonest again: parameters
between forward and backward, then optimizer states.

Source: Angel-PTM (VLDB 2023), unified scheduling; victims after L. A. Belady, IBM Systems Journal 5(2), 1966.
"""

from __future__ import annotations

import math

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier
from scheduler.lookahead.residence import Residence
from scheduler.lookahead.tensor_facts import room_of
from scheduler.planning.sources import LANE_OF, chain_of
from scheduler.planning.task import Lane, Task, TaskKind
from scheduler.planning.trace import CHANGES, AccessMode, Op


class LookaheadReader(Residence):
    """Passes over steps, op by op."""

    def read_step(self, cycle: int) -> None:
        """Pass over one more step, with the predicted clock."""
        n_ops = len(self.work.trace.ops)
        for index, op in enumerate(self.work.trace.ops):
            now = cycle * n_ops + index
            before_s = self.op_end_s[-1] if self.op_end_s else 0.0
            begin_s = max(self.bring(op, now, before_s), before_s)
            if op.lane is Lane.COMPUTE:
                begin_s = max(begin_s, self._bring_out(op, now, before_s))
                self.op_end_s.append(begin_s + op.duration_s)
                self.use(op, now, cycle * n_ops + op.until, begin_s + op.duration_s)
            else:
                self.op_end_s.append(before_s)
                self.use(op, now, now, self.lanes[op.lane].serve(begin_s, op.duration_s))

    def bring(self, op: Op, now: int, before_s: float) -> float:
        """Have every tensor of an op in its tier; returns when the op can begin for their sake."""
        own = frozenset(access.tensor for access in op.accesses)
        wanted = [(a.tensor, a.mode is AccessMode.CREATE) for a in op.accesses if a.mode is not AccessMode.DISCARD]
        if op.conditional is not None and self.work.room_frames(op.conditional):
            wanted.append((room_of(now % len(self.work.trace.ops)), True))
        ready_s = 0.0
        for tensor, fresh in wanted:
            there_s = self.ensure(tensor, now, own, before_s, fresh=fresh)
            if there_s is None:
                ready_s = self.repack(op, wanted, now, before_s)
                break
            ready_s = max(ready_s, there_s)
        for access in op.accesses:
            tenant = self.tenant(access.tensor)
            if access.mode in CHANGES and tenant is not None and tenant.busy_s > ready_s:
                ready_s = tenant.busy_s
        return ready_s

    def repack(self, op: Op, wanted: list[tuple[TensorId, bool]], now: int, before_s: float) -> float:
        """Make room for an op whose own tensors stand in each other's way in a tier: place them anew, largest first.

        Those of which an older view lives stay where they are.

        Raises:
            BudgetError: the op's tensors do not fit together; the message says which and how much they need.
        """
        tier = self.short
        anew = {tensor: fresh for tensor, fresh in wanted if self.facts[tensor].tier is tier}
        begin = len(self.tasks)
        while begin and self.tasks[begin - 1][0] == now:
            begin -= 1
        came_down = {task.tensor for _, task in self.tasks[begin:] if task.kind is TaskKind.DOWNLOAD}
        self.tasks[begin:] = [
            (made_for, task)
            for made_for, task in self.tasks[begin:]
            if task.kind is TaskKind.STORE or task.tensor not in anew or task.tensor in came_down
        ]
        placed: set[TensorId] = set()
        for tensor in anew:
            tenant = self.tenant(tensor)
            if tenant is not None and tenant.locked_until >= now:
                placed.add(tensor)
            elif tenant is not None:
                self.evict(tensor, now, frozenset(placed))
        self.books[tier].trigger = now
        ready_s = 0.0
        others = [(tensor, fresh) for tensor, fresh in wanted if tensor not in anew]
        for pack, group in ((True, sorted(anew.items(), key=lambda a: -self.facts[a[0]].n_bytes)), (False, others)):
            for tensor, fresh in group:
                if tensor in placed:
                    continue
                there_s = self.ensure(tensor, now, frozenset(placed), before_s, fresh=fresh, pack=pack)
                if there_s is None:
                    raise self.shortage(op)
                placed.add(tensor)
                ready_s = max(ready_s, there_s)
        return ready_s

    def _bring_out(self, op: Op, now: int, before_s: float) -> float:
        """Copy up what an op takes out of the paged memory; returns when that is done."""
        ready_s = before_s
        for access in op.accesses:
            if access.via is None or access.mode in CHANGES:
                continue
            tenant, lane = self.tenant(access.tensor), LANE_OF[access.via]
            assert tenant is not None
            n_bytes = self.work.n_bytes[access.tensor]
            end_s = self.lanes[lane].serve(max(before_s, tenant.ready_s), self.work.machine.seconds(lane, n_bytes))
            self.tasks.append((now, Task(access.via, access.tensor, Tier.DEVICE, lane, n_bytes, now, needed_at=now)))
            tenant.is_busy(end_s, now)
            ready_s = max(ready_s, end_s)
        return ready_s

    # ---- what ops do -------------------------------------------------------------------------------------------

    def use(self, op: Op, now: int, until: int, done_s: float) -> None:
        """Note what an op, over at ``done_s``, does to its tensors."""
        beside = op.lane is not Lane.COMPUTE
        if beside and op.accesses:
            changed = [a.tensor for a in op.accesses if a.mode in CHANGES] or [op.accesses[0].tensor]
            n_bytes = sum(self.work.n_bytes[access.tensor] for access in op.accesses)
            tier = self.facts[changed[0]].tier
            self.tasks.append((now, Task(TaskKind.UPDATE, changed[0], tier, op.lane, n_bytes, now)))
        for access in op.accesses:
            tensor, tenant = access.tensor, self.tenant(access.tensor)
            if access.mode is AccessMode.DISCARD:
                self.since(tensor, now + 1, done_s)
                if tenant is not None:
                    tenant.locked_until = max(tenant.locked_until, now)
                    self._end(tensor, now)
                continue
            assert tenant is not None
            if beside:
                tenant.is_busy(done_s, now + 1)
            else:
                tenant.locked_until = max(tenant.locked_until, until, now)
            if access.mode in CHANGES:
                changed_s = done_s if access.via is None else self._arrive(op, access.tensor, access.via, now, done_s)
                self.book(tensor).used_next(tensor, self.next_need(tensor, now))
                self.note_change(tensor, tenant, changed_s, now + 1)
                for other in (*list(chain_of(tensor, self.work.sources))[1:], *self._made_of(tensor)):
                    self._end(other, now)
            elif access.mode is AccessMode.CONSUME:
                for link in chain_of(tensor, self.work.sources):
                    self._end(link, now)
            else:
                self.book(tensor).used_next(tensor, self.next_need(tensor, now))
        if op.conditional is not None and (
            room := self.books[op.conditional.tier].tenants.get(room_of(now % len(self.work.trace.ops)))
        ):
            room.locked_until = max(until, now)
            self._end(room_of(now % len(self.work.trace.ops)), now)

    def _arrive(self, op: Op, tensor: TensorId, via: TaskKind, now: int, done_s: float) -> float:
        """Bytes that an op has made come to a tensor, from what it consumes; returns when they are there."""
        ended = [access.tensor for access in op.accesses if access.mode is AccessMode.CONSUME]
        n_bytes = sum(self.work.n_bytes[other] for other in ended) or self.work.n_bytes[tensor]
        lane, facts = LANE_OF[via], self.facts[tensor]
        end_s = self.lanes[lane].serve(done_s, self.work.machine.seconds(lane, n_bytes))
        frames: list[FrameId] = []
        for other in (tensor, *ended):
            tenant = self.tenant(other)
            assert tenant is not None
            tenant.is_busy(end_s, now + 1)
            frames.append(tenant.frame)
        self.tasks.append((now, Task(via, tensor, facts.tier, lane, n_bytes, now, frame=frames[0], behind=True)))
        return end_s

    def _made_of(self, tensor: TensorId) -> list[TensorId]:
        """What is made of a tensor, and of that, and so on."""
        found = list(self.facts[tensor].copies)
        for copy in found:
            found.extend(self.facts[copy].copies)
        return found

    def _end(self, tensor: TensorId, now: int) -> None:
        """The content of a tensor is of no use any more after op ``now``."""
        tenant = self.tenant(tensor)
        if tenant is not None:
            if tenant.dirty:  # until then it would be missed
                tenant.locked_until = max(tenant.locked_until, now)
            tenant.dead, tenant.dirty = True, False
            self.book(tensor).used_next(tensor, math.inf)
