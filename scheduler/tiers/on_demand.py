"""Fetching without a plan: a tensor comes in now, in place of the least recently used ones.

Used in the first steps, for steps that differ from their trace, and between steps. Training thread only, with the
mover's lock held (waiting gives it up).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from pagemem.errors import BudgetError
from pagemem.frames.page import FrameId, TensorId
from pagemem.frames.window import Window
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.tier import Tag
from pagemem.units import format_bytes
from scheduler.lookahead.next_uses import NEVER
from scheduler.tiers.read_ahead import ReadAhead


class PlanView(Protocol):
    """What a plan says to whoever fetches beside it."""

    @property
    def planned(self) -> bool:
        """Whether there is a plan for what is under way."""

    @property
    def moves(self) -> bool:
        """Whether it is followed op by op; not so where nothing moves."""

    def frame_for(self, tensor: TensorId) -> FrameId | None:
        """Where the plan has a tensor now; None: nowhere, or it is not known."""

    def next_use(self, tensor: TensorId) -> int:
        """Ops until the plan uses what a tensor holds; `NEVER` where it does not."""

    def missed(self, name: str, tensor: PagedTensor) -> None:
        """The plan has not brought a tensor of the op under way, called by name, which is fetched on demand."""

    def announce(self, tensors: Iterable[TensorId]) -> None:
        """What is used next."""


class OnDemand:
    """Brings tensors in and out, one at a time.

    Args:
        mover: owner of residency in the tier.
        take_back_loads: undoes loads whose copies have not begun, and which may wait for what is not coming.
        read_ahead: is told of tensors that are being brought; None: nothing is read ahead.

    Attributes:
        overhead_bytes: what the budget holds beside the arena; part of the budget that an error proposes.
        make_way: called before a tensor has to leave for another one; returns whether what has to may be chosen anew.
    """

    def __init__(self, mover: Mover, take_back_loads: Callable[[], None], read_ahead: ReadAhead | None = None) -> None:
        self.mover = mover
        self.read_ahead = read_ahead
        self._take_back_loads = take_back_loads
        self.overhead_bytes = 0
        self.make_way: Callable[[], bool] = lambda: False

    def fetch(
        self, tensor: PagedTensor, name: str, *, fresh: bool, lowest: bool = False, by_plan: PlanView | None = None
    ) -> None:
        """Bring one tensor in now, in place of the least recently used ones, and wait for it.

        Args:
            fresh: its content is not wanted. lowest: in the first window there is.
            by_plan: where a plan has it, and which tenants a plan uses last, so that they leave.
        """
        tensor.pins += 1  # From its first instant there, no planned load makes it leave.
        try:
            while not tensor.whole:
                self.mover.monitor.check()  # what has failed is not tried for ever
                if tensor.frame is None:
                    self._begin(tensor, name, lambda: self._choose(tensor, lowest, by_plan), fresh=fresh)
                    if self.read_ahead is not None and not (fresh or lowest or by_plan):
                        self.read_ahead.follow(tensor)
                # Who else has a use for it may have begun to bring it, or take it away again.
                self.mover.monitor.wait_until(lambda: tensor.whole or tensor.frame is None, tensor.name, tensor.n_bytes)
        finally:
            tensor.pins -= 1

    def _choose(self, tensor: PagedTensor, lowest: bool, by_plan: PlanView | None) -> Window | None:
        """The window for a tensor whose tenants can leave."""
        tensors, tenants = self.mover.tensors, self.mover.tenants
        planned = None if by_plan is None else by_plan.frame_for(tensor.id)
        if planned is not None:
            owners = [owner for _, _, owner in self.mover.host.taken(planned, planned + tensor.n_frames)]
            if all(map(tenants.droppable, owners)):
                return Window(planned, tensor.n_frames, tuple(owners))

        def cost(leaving: Sequence[TensorId]) -> tuple[int, int]:
            if lowest:
                return (0, 0)
            dirty_frames = sum(tensors[t].n_frames for t in leaving if tensors[t].state is Residency.DIRTY)
            if by_plan is not None:
                return (-min((by_plan.next_use(t) for t in leaving), default=NEVER + 1), dirty_frames)
            return (max((tensors[t].last_use for t in leaving), default=-1), dirty_frames)

        def least_cost(tenant: TensorId) -> tuple[int, int]:
            return (tensors[tenant].last_use, 0)

        return tenants.choose(tensor.n_frames, cost, None if lowest or by_plan is not None else least_cost)

    def begin_early(self, tensor: PagedTensor, by_plan: PlanView) -> bool:
        """Begin to bring in a tensor that is used soon, in place of what the plan uses much later and that is clean;
        does not wait. Returns whether there was such a place."""
        window, tensors = self._choose(tensor, False, by_plan), self.mover.tensors
        if window is None or any(
            by_plan.next_use(tenant) == 0 or tensors[tenant].state is not Residency.CLEAN or tensors[tenant].updates
            for tenant in window.tenants
        ):
            return False
        for tenant in window.tenants:
            self.mover.drop(self.mover.tensors[tenant])
        self.mover.start_load(tensor, window.first)
        return True

    def _begin(self, tensor: PagedTensor, name: str, choose: Callable[[], Window | None], *, fresh: bool) -> None:
        """Make room for a tensor and begin to bring it in."""
        tensors = self.mover.tensors
        while True:
            window = choose()
            if (window is None or window.tenants) and self.make_way():
                continue
            if window is None:
                self._take_back_loads()
                window = choose()
            if window is not None:
                break
            in_flight = [t for t in tensors.values() if t.moving]
            if not in_flight:
                raise self._shortage(tensor, name)
            self.mover.monitor.settle()
            self.mover.monitor.check()
        for tenant in window.tenants:
            if tensors[tenant].state is Residency.DIRTY:
                self.mover.start_store(tensors[tenant])
        for tenant in window.tenants:
            self.move_out(tensors[tenant])
        taken = self.mover.host.taken(window.first, window.first + window.n_frames)
        if tensor.frame is None and not any(True for _ in taken):
            self.mover.start_load(tensor, window.first, fresh=fresh)

    def move_out(self, tensor: PagedTensor) -> None:
        """Give a tensor's host frames up, storing it first when needed."""
        if tensor.frame is None:
            return
        self.mover.monitor.wait_until(lambda: tensor.state is not Residency.ARRIVING, tensor.name, tensor.n_bytes)

        def there() -> bool:
            # A planned load may have made it leave meanwhile, or a load ahead have failed.
            return tensor.frame is not None

        while there() and (tensor.state is not Residency.CLEAN or tensor.uploads):
            if tensor.state is Residency.DIRTY:  # again, where a sync failed meanwhile
                self.mover.start_store(tensor)
            self.mover.monitor.wait_until(
                lambda: not there() or (tensor.state in (Residency.CLEAN, Residency.DIRTY) and not tensor.uploads),
                tensor.name,
                tensor.n_bytes,
            )
            self.mover.monitor.check()
        if there():
            self.mover.drop(tensor)

    def _shortage(self, tensor: PagedTensor, name: str) -> BudgetError:
        """The error for a tensor that finds no window although everything movable could leave."""
        page_bytes = self.mover.arena.page_bytes
        held = [t for t in self.mover.tensors.values() if t.held and t.frame is not None]
        need_frames = sum(t.n_frames for t in held) + tensor.n_frames
        if need_frames <= self.mover.arena.n_frames:
            # Enough pages, but what is held lies between them.
            need_frames = self.mover.arena.n_frames + tensor.n_frames
        smallest_bytes = need_frames * page_bytes + self.overhead_bytes
        by_tag: dict[Tag, int] = {}
        for other in held:
            by_tag[other.tag] = by_tag.get(other.tag, 0) + other.n_frames * page_bytes
        holders = ", ".join(f"{tag.value} {format_bytes(n)}" for tag, n in by_tag.items()) or "nothing"
        return BudgetError(
            f"{name}: {tensor.name} needs {tensor.n_frames} adjacent pages of {format_bytes(page_bytes)}, the "
            f"{self.mover.tier.value} arena has {self.mover.arena.n_frames}, and held by views in use are: {holders}. "
            f"Set {self.mover.setting} to at least {smallest_bytes} bytes ({format_bytes(smallest_bytes)}).",
            smallest_bytes,
        )
