"""Fetching without a plan: a tensor comes in now, in place of the least recently used ones.

Used in the first steps, for steps that differ from their trace, and between steps. Training thread only, with the
mover's lock held (waiting gives it up).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.tier import Tag
from pagemem.units import format_bytes
from scheduler.execution.read_ahead import ReadAhead


class OnDemand:
    """Brings tensors in and out, one at a time.

    Args:
        mover: owner of all residency.
        read_ahead: is told of tensors that are being brought; None: nothing is read ahead.

    Attributes:
        overhead_bytes: what the budget holds beside the arena; part of the budget that an error proposes.
        make_way: called before a tensor has to leave for another one; returns whether what has to may be chosen anew.
    """

    def __init__(self, mover: Mover, read_ahead: ReadAhead | None = None) -> None:
        self.mover = mover
        self.read_ahead = read_ahead
        self.overhead_bytes = 0
        self.make_way: Callable[[], bool] = lambda: False

    def fetch(self, tensor: PagedTensor, name: str, *, fresh: bool, lowest: bool = False) -> None:
        """Bring one tensor in now, in place of the least recently used ones, and wait for it."""
        tensors = self.mover.tensors

        def cost(tenants: Sequence[TensorId]) -> tuple[int, int]:
            if lowest:
                return (0, 0)
            dirty_frames = sum(tensors[t].n_frames for t in tenants if tensors[t].state is Residency.DIRTY)
            return (max((tensors[t].last_use for t in tenants), default=-1), dirty_frames)

        def least_cost(tenant: TensorId) -> tuple[int, int]:
            return (tensors[tenant].last_use, 0)

        while not tensor.readable:
            self.mover.monitor.check()  # what has failed is not tried for ever
            if tensor.frame is None:
                self._begin(tensor, name, cost, None if lowest else least_cost, fresh=fresh)
                if self.read_ahead is not None and not (fresh or lowest):
                    self.read_ahead.follow(tensor)
            # Who else has a use for it may have begun to bring it, or take it away again.
            self.mover.monitor.wait_until(lambda: tensor.readable or tensor.frame is None, tensor.name, tensor.n_bytes)

    def _begin(
        self,
        tensor: PagedTensor,
        name: str,
        cost: Callable[[Sequence[TensorId]], tuple[int, int]],
        least_cost: Callable[[TensorId], tuple[int, int]] | None,
        *,
        fresh: bool,
    ) -> None:
        """Make room for a tensor and begin to bring it in."""
        tensors = self.mover.tensors
        while True:
            window = self.mover.tenants.choose(tensor.n_frames, cost, least_cost)
            if (window is None or window.tenants) and self.make_way():
                continue
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
        if tensor.frame is None:
            self.mover.start_load(tensor, window.first, fresh=fresh)

    def move_out(self, tensor: PagedTensor) -> None:
        """Give a tensor's host frames up, storing it first when needed."""
        if tensor.frame is None:
            return
        self.mover.monitor.wait_until(lambda: tensor.state is not Residency.ARRIVING, tensor.name, tensor.n_bytes)
        # Dirty again, where a sync failed meanwhile; without frames, where it was read ahead and that failed.
        while tensor.frame is not None and (tensor.state is not Residency.CLEAN or tensor.uploads):
            if tensor.state is Residency.DIRTY:
                self.mover.start_store(tensor)
            self.mover.monitor.wait_until(
                lambda: (
                    tensor.frame is None or (tensor.state in (Residency.CLEAN, Residency.DIRTY) and not tensor.uploads)
                ),
                tensor.name,
                tensor.n_bytes,
            )
            self.mover.monitor.check()
        if tensor.frame is not None:
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
