"""The reader that runs through a cyclic trace ahead of compute and chooses host frames for every load. Pure.

For each access whose tensor is not in host memory it chooses a window of adjacent frames: among those that cost no
stall the one whose tenants are needed last (Belady's rule; all next uses are known), clean before dirty on ties. The
load is triggered by the first op at which every tenant of its window has had its last use; a dirty tenant is copied out
right after its last change. Memory that no load needs keeps what it holds, so spare memory serves first what is used
soonest again: parameters between forward and backward, then optimizer states.

Source: Angel-PTM (VLDB 2023), unified scheduling; victims after L. A. Belady, IBM Systems Journal 5(2), 1966.
"""

from __future__ import annotations

import bisect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pagemem import knobs as pagemem_knobs
from pagemem.errors import BudgetError
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import FrameId, Shortage, TensorId
from pagemem.frames.window import Window, best_window, window_near
from pagemem.tier import Tier
from pagemem.units import ceil_div
from scheduler import knobs
from scheduler.planning.task import Task, load_task, store_task
from scheduler.planning.trace import CHANGES, Access, AccessMode, Op, Trace
from scheduler.planning.victims import Victims

#: The op until which a tensor that is never moved is in use.
FOR_GOOD: Final = sys.maxsize
#: The cost of a window that is not taken.
_TOO_DEAR: Final = (math.inf, math.inf, 0)

#: Tensor, first frame, dirtiness and deadness of everything in host memory, sorted.
Placed = tuple[tuple[TensorId, FrameId, bool, bool], ...]


@dataclass(frozen=True, slots=True)
class TierSpec:
    """What the planner must know of the memory: host frames, their size, and the page files' bandwidths (bytes/s)."""

    n_frames: int
    page_bytes: int
    read_bytes_per_s: float
    write_bytes_per_s: float


@dataclass(slots=True)
class Tenant:
    """A tensor in host frames. Op numbers count on over all cycles."""

    frame: FrameId
    locked_until: int
    dirty: bool = False
    dead: bool = False
    modified_at: int = -1
    clean_at_s: float = 0.0
    #: The first op that uses it again, as of its last use; infinite when it is dead.
    next_use: float = -1


@dataclass(slots=True)
class LookaheadReader:
    """State of the reader and of the predicted clock.

    Attributes:
        resident: tensors that are in host memory for good, in the trace or not, and their first frames.
        loads: what was brought, in order. stores: what was copied out, and the op for whose sake it had to leave.
        op_end_s: when each op read so far ends.
    """

    trace: Trace
    n_bytes: Mapping[TensorId, int]
    tier: TierSpec
    resident: Mapping[TensorId, FrameId]
    frames: PageAllocator = field(init=False)
    tenants: dict[TensorId, Tenant] = field(default_factory=dict)
    uses: dict[TensorId, list[int]] = field(default_factory=dict)
    renewals: dict[TensorId, set[int]] = field(default_factory=dict)
    renewed_at: dict[TensorId, int] = field(default_factory=dict)
    loads: list[Task] = field(default_factory=list)
    stores: list[tuple[int, Task]] = field(default_factory=list)
    op_end_s: list[float] = field(default_factory=list)
    read_free_s: float = 0.0
    write_free_s: float = 0.0
    last_trigger: int = 0
    victims: Victims = field(default_factory=Victims)

    def __post_init__(self) -> None:
        self.frames = PageAllocator(Tier.HOST, self.tier.page_bytes, self.tier.n_frames)
        for tensor, frame in self.resident.items():
            self.frames.allocate(tensor, self.n_bytes[tensor], contiguous=True, at=frame)
            self.tenants[tensor] = Tenant(frame, FOR_GOOD)
        for index, op in enumerate(self.trace.ops):
            for access in op.accesses:
                uses = self.uses.setdefault(access.tensor, [])
                if not uses or uses[-1] != index:
                    uses.append(index)
                if access.mode is AccessMode.RENEW:
                    self.renewals.setdefault(access.tensor, set()).add(index)

    # ---- what the ranking needs --------------------------------------------------------------------------------

    def next_use(self, tensor: TensorId, now: int) -> float:
        """First op after ``now`` that uses ``tensor`` as it is now; infinite when it is renewed before."""
        cycle, index = divmod(now, len(self.trace.ops))
        uses = self.uses[tensor]
        place = bisect.bisect_right(uses, index)
        cycle, use = (cycle, uses[place]) if place < len(uses) else (cycle + 1, uses[0])
        return math.inf if use in self.renewals.get(tensor, ()) else cycle * len(self.trace.ops) + use

    def released_s(self, tenant: Tenant) -> float:
        """When the tenant's frames can be overwritten, on the predicted clock."""
        used_s = self.op_end_s[tenant.locked_until] if tenant.locked_until >= 0 else 0.0
        return max(used_s, tenant.clean_at_s) if tenant.dirty else used_s

    def choose(
        self, now: int, n_frames: int, read_s: float, staying: frozenset[TensorId], *, pack: bool = False
    ) -> Window | None:
        """The best window for a load needed at op ``now``; tenants in ``staying`` are not moved. ``pack``: the
        lowest."""
        need_s = self.op_end_s[now - 1] if now else 0.0
        least = _TOO_DEAR

        def stall(start_s: float) -> float:
            return max(0.0, start_s + read_s - need_s) // knobs.STALL_QUANTUM_S

        least_stall = stall(self.read_free_s)
        tenants = self.tenants

        def movable(tensor: TensorId) -> bool:
            return tensor not in staying and tenants[tensor].locked_until < now

        def cost(tensors: Sequence[TensorId]) -> tuple[float, float, int]:
            if pack:
                return (0.0, 0.0, 0)
            nonlocal least
            soonest = math.inf
            for tensor in tensors:
                next_use = tenants[tensor].next_use
                if next_use < soonest:
                    soonest = next_use
                    # Most windows are out of the question early: what is left to add cannot make them cheaper.
                    if least[0] == least_stall and -soonest > least[1]:
                        return _TOO_DEAR
            start_s = max([self.read_free_s, *(self.released_s(tenants[tensor]) for tensor in tensors)])
            dirty_bytes = sum(self.n_bytes[tensor] * tenants[tensor].dirty for tensor in tensors)
            found = (stall(start_s), -soonest, dirty_bytes)
            least = min(least, found)
            return found

        if len(tenants) > pagemem_knobs.MANY_TENANTS and not pack:
            self.victims.settle(max(self.read_free_s, need_s - read_s))
            near = window_near(
                self.frames,
                n_frames,
                self.victims.in_order(),
                movable,
                cost,
                lambda tensor: (least_stall, -tenants[tensor].next_use, 0),
            )
            if near is not None:
                return near
        return best_window(list(self.frames.segments()), n_frames, movable, cost)

    def _used_next(self, tensor: TensorId, tenant: Tenant, next_use: float) -> None:
        """Note when a tenant is used again."""
        tenant.next_use = next_use
        if tenant.locked_until != FOR_GOOD:
            self.victims.used(tensor, next_use)

    # ---- moves -------------------------------------------------------------------------------------------------

    def evict(self, tensor: TensorId, now: int) -> Tenant:
        """Take a tensor out of host memory, storing it first when it is dirty."""
        tenant = self.tenants.pop(tensor)
        self.victims.left(tensor)
        self.frames.release(tensor)
        if tenant.dirty and not tenant.dead:
            self.stores.append((now, store_task(tensor, self.n_bytes[tensor], tenant.modified_at + 1)))
        return tenant

    def load(self, access: Access, now: int, staying: frozenset[TensorId], *, pack: bool = False) -> float | None:
        """Place a tensor for op ``now``; returns when it is there (predicted clock), or None when no window is free."""
        tensor = access.tensor
        n_bytes = self.n_bytes[tensor]
        n_frames = ceil_div(n_bytes, self.tier.page_bytes)
        fresh = access.mode is AccessMode.CREATE
        read_s = 0.0 if fresh else n_bytes / self.tier.read_bytes_per_s
        window = self.choose(now, n_frames, read_s, staying, pack=pack)
        if window is None:
            return None
        start_s, trigger = self.read_free_s, max(self.last_trigger, now - len(self.trace.ops) + 1)
        if tensor in self.renewed_at:
            trigger = max(trigger, self.renewed_at[tensor] + 1)
            start_s = max(start_s, self.op_end_s[self.renewed_at[tensor]])
        for victim in window.tenants:
            tenant = self.evict(victim, now)
            start_s = max(start_s, self.released_s(tenant))
            trigger = max(trigger, tenant.locked_until + 1)
        placed = self.frames.allocate(tensor, n_bytes, contiguous=True, at=window.first)
        if isinstance(placed, Shortage):
            raise AssertionError(f"chosen window {window} is not free: {placed}")
        self.tenants[tensor] = Tenant(window.first, now - 1)
        self.loads.append(load_task(tensor, n_bytes, window.first, trigger, now, fresh=fresh))
        self.last_trigger = trigger
        self.read_free_s = start_s + read_s
        return self.read_free_s

    def repack(self, op: Op, now: int) -> float:
        """Make room for an op whose own tensors stand in each other's way: place them anew, largest first.

        Those of which an older view lives stay where they are.

        Raises:
            BudgetError: the op's tensors do not fit together; the message says which and how much they need.
        """
        placed: set[TensorId] = set()
        while self.loads and self.loads[-1].needed_at == now:
            self.loads.pop()
        for access in op.accesses:
            tenant = self.tenants.get(access.tensor)
            if tenant is not None and tenant.locked_until >= now:
                placed.add(access.tensor)
            elif tenant is not None:
                self.evict(access.tensor, now)
        self.last_trigger = now
        ready_s = 0.0
        for access in sorted(op.accesses, key=lambda a: -self.n_bytes[a.tensor]):
            if access.tensor in placed:
                continue
            there_s = self.load(access, now, frozenset(placed), pack=True)
            if there_s is None:
                page_bytes = self.tier.page_bytes
                need_bytes = page_bytes * sum(ceil_div(self.n_bytes[a.tensor], page_bytes) for a in op.accesses)
                raise BudgetError(
                    f"{op.name} needs {need_bytes} bytes of host pages at once, the budget holds "
                    f"{self.tier.n_frames * page_bytes}; raise memory.ram",
                    need_bytes,
                )
            placed.add(access.tensor)
            ready_s = max(ready_s, there_s)
        return ready_s

    # ---- reading ----------------------------------------------------------------------------------------------

    def read_step(self, cycle: int) -> None:
        """Pass over one more step, with the predicted clock."""
        n_ops = len(self.trace.ops)
        for index, op in enumerate(self.trace.ops):
            now = cycle * n_ops + index
            ready_s = self.bring(op, now)
            begin_s = max(ready_s, self.op_end_s[-1] if self.op_end_s else 0.0)
            self.op_end_s.append(begin_s + op.duration_s)
            self.use(op, now, until=cycle * n_ops + op.until)

    def bring(self, op: Op, now: int) -> float:
        """Have every tensor of an op in host memory; returns when the last one is there."""
        own = frozenset(access.tensor for access in op.accesses)
        ready_s = 0.0
        for access in op.accesses:
            if access.mode is AccessMode.RENEW:
                continue
            tenant = self.tenants.get(access.tensor)
            if tenant is not None and tenant.dead:
                self.evict(access.tensor, now)
                self.last_trigger = max(self.last_trigger, tenant.locked_until + 1)
                tenant = None
            if tenant is None:
                there_s = self.load(access, now, own)
                if there_s is None:
                    return self.repack(op, now)
                ready_s = max(ready_s, there_s)
        return ready_s

    def use(self, op: Op, now: int, until: int) -> None:
        """Note what an op does to its tensors."""
        for access in op.accesses:
            if access.mode is AccessMode.RENEW:
                self.renewed_at[access.tensor] = now
                stale = self.tenants.get(access.tensor)
                if stale is not None:
                    stale.locked_until = max(stale.locked_until, now)
                    stale.dead, stale.dirty = True, False
                    self._used_next(access.tensor, stale, math.inf)
                continue
            tenant = self.tenants[access.tensor]
            tenant.locked_until = max(tenant.locked_until, until, now)
            self._used_next(access.tensor, tenant, self.next_use(access.tensor, now))
            if access.mode in CHANGES:
                write_s = self.n_bytes[access.tensor] / self.tier.write_bytes_per_s
                if not tenant.dirty:
                    self.write_free_s = max(self.write_free_s, self.op_end_s[now]) + write_s
                tenant.dirty, tenant.modified_at = True, now
                tenant.clean_at_s = max(self.write_free_s, self.op_end_s[now] + write_s)
                if tenant.locked_until != FOR_GOOD:
                    self.victims.changed(access.tensor, tenant.clean_at_s)
            elif access.mode is AccessMode.CONSUME:
                tenant.dead, tenant.dirty = True, False
                self._used_next(access.tensor, tenant, math.inf)

    def placement(self) -> Placed:
        """What is where; two steps that begin alike go on alike."""
        return tuple(sorted((tensor, t.frame, t.dirty, t.dead) for tensor, t in self.tenants.items()))
