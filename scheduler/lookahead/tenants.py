"""Who is in the frames of one tier while the reader reads, and which window had best be taken. Pure."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pagemem import knobs as pagemem_knobs
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import FrameId, Shortage, TensorId
from pagemem.frames.window import Window, best_window, window_near
from pagemem.tier import Tier
from scheduler import knobs
from scheduler.lookahead.victims import Victims

#: The op until which a tensor that is never moved is in use.
FOR_GOOD: Final = sys.maxsize
#: The cost of a window that is not taken.
_TOO_DEAR: Final = (math.inf, math.inf, 0)


@dataclass(slots=True)
class Tenant:
    """A tensor in frames. Op numbers count on over all cycles.

    Attributes:
        locked_until: the last op that uses it.
        clean_at_s: when it is below, too.
        next_use: the first op that uses it again, or what is made of it, as of its last use; infinite when it is dead.
        ready_s: when its content is there. ready_trigger: the op that lets a task begin that copies this content.
        busy_s: when the last task that reads or writes it is over; ``busy_trigger`` is that of the task.
    """

    frame: FrameId
    locked_until: int
    dirty: bool = False
    dead: bool = False
    clean_at_s: float = 0.0
    next_use: float = -1
    ready_s: float = 0.0
    ready_trigger: int = 0
    busy_s: float = 0.0
    busy_trigger: int = 0

    def is_busy(self, until_s: float, trigger: int) -> None:
        """A task with this trigger reads or writes it until then."""
        self.busy_s = max(self.busy_s, until_s)
        self.busy_trigger = max(self.busy_trigger, trigger)


@dataclass(slots=True)
class Wish:
    """What is asked of a window.

    Attributes:
        now: the op for whose sake it is wanted.
        earliest_s: before then nothing can come into it; move_s: so long does it take to come.
        need_s: later than then is a stall.
        staying: tenants that may not leave.
        pack: whether the lowest window is the best.
    """

    now: int
    n_frames: int
    earliest_s: float
    move_s: float
    need_s: float
    staying: frozenset[TensorId]
    pack: bool = False

    def stall(self, start_s: float) -> float:
        """Of a window that is free at ``start_s``, in steps that are told apart."""
        return max(0.0, start_s + self.move_s - self.need_s) // knobs.STALL_QUANTUM_S


@dataclass(slots=True)
class TierTenants:
    """The frames of one tier.

    Attributes:
        op_end_s: when each op read so far ends; the reader's own list.
        trigger: of the last task that got frames; none that gets some later starts earlier, so that frames which were
            left are free.
    """

    tier: Tier
    page_bytes: int
    n_frames: int
    n_bytes: Mapping[TensorId, int]
    op_end_s: list[float]
    frames: PageAllocator = field(init=False)
    tenants: dict[TensorId, Tenant] = field(default_factory=dict)
    victims: Victims = field(default_factory=Victims)
    trigger: int = 0

    def __post_init__(self) -> None:
        self.frames = PageAllocator(self.tier, self.page_bytes, self.n_frames)

    def put(self, tensor: TensorId, n_bytes: int, tenant: Tenant) -> None:
        """Give a tensor the frames that its tenant says, which are free."""
        placed = self.frames.allocate(tensor, n_bytes, contiguous=True, at=tenant.frame)
        if isinstance(placed, Shortage):
            raise AssertionError(f"the frames chosen for {tensor} are not free: {placed}")
        self.tenants[tensor] = tenant

    def leave(self, tensor: TensorId) -> Tenant:
        """Take a tensor's frames back."""
        self.victims.left(tensor)
        self.frames.release(tensor)
        return self.tenants.pop(tensor)

    def used_next(self, tensor: TensorId, next_use: float) -> None:
        """Note when a tenant is used again."""
        tenant = self.tenants[tensor]
        tenant.next_use = next_use
        if tenant.locked_until != FOR_GOOD:
            self.victims.used(tensor, next_use)

    def changed(self, tensor: TensorId) -> None:
        """Note that a tenant is dirty until its ``clean_at_s``."""
        tenant = self.tenants[tensor]
        if tenant.locked_until != FOR_GOOD:
            self.victims.changed(tensor, tenant.clean_at_s)

    def released_s(self, tenant: Tenant) -> float:
        """When the tenant's frames can be overwritten, on the predicted clock."""
        free_s = tenant.busy_s
        if tenant.locked_until >= 0 and self.op_end_s[tenant.locked_until] > free_s:
            free_s = self.op_end_s[tenant.locked_until]
        return tenant.clean_at_s if tenant.dirty and tenant.clean_at_s > free_s else free_s

    def choose(self, wish: Wish) -> Window | None:
        """The best window: among those that cost the least stall the one whose tenants are needed last, clean before
        dirty; None where every window has a tenant that may not leave."""
        tenants, staying, now, pack = self.tenants, wish.staying, wish.now, wish.pack
        least, least_stall = _TOO_DEAR, wish.stall(wish.earliest_s)

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
            start_s, dirty_bytes = wish.earliest_s, 0
            for tensor in tensors:
                tenant = tenants[tensor]
                start_s = max(start_s, self.released_s(tenant))
                if tenant.dirty:
                    dirty_bytes += self.n_bytes[tensor]
            found = (wish.stall(start_s), -soonest, dirty_bytes)
            least = min(least, found)
            return found

        if len(tenants) > pagemem_knobs.MANY_TENANTS and not pack:
            self.victims.settle(max(wish.earliest_s, wish.need_s - wish.move_s))
            near = window_near(
                self.frames,
                wish.n_frames,
                self.victims.in_order(),
                movable,
                cost,
                lambda tensor: (least_stall, -tenants[tensor].next_use, 0),
            )
            if near is not None:
                return near
        return best_window(list(self.frames.segments()), wish.n_frames, movable, cost)
