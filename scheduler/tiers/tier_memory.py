"""One tier as the driver uses it: who owns what is in it, the lane of what comes, and what brings it for ops.

Tensors of a device are copies of tensors of host memory. Where a plan has not brought one, the tensor below is held in
host memory while it is copied; nothing of that is an op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tier
from scheduler.planning.trace import Access, AccessMode
from scheduler.tiers.load_lane import LoadLane
from scheduler.tiers.on_demand import OnDemand, PlanView
from scheduler.tiers.pinning import Bringer, Pinner
from scheduler.tiers.read_ahead import ReadAhead


class TierMemory:
    """Host memory, or that of a device. Training thread only.

    Args:
        mover: owner of residency in the tier.
        numbers: of tasks, over all lanes.
        followed: the plans of what the op under way belongs to; None: it is not recorded.
        below: the tier that tensors are copied up from; None: they come from page files.

    Attributes:
        tier: which. lane: planned loads. pinner, on_demand: see there.
        read_ahead: of ops without a plan; None above another tier, where loads begin once that has the tensor.
        bringer: counts the bytes that no plan brought.
    """

    def __init__(
        self,
        mover: Mover,
        numbers: Iterator[int],
        followed: Callable[[], PlanView | None],
        below: TierMemory | None = None,
    ) -> None:
        self.mover = mover
        self.tier: Tier = mover.tier
        self.lane = LoadLane(mover, numbers)
        self.read_ahead = ReadAhead(mover) if below is None else None
        self.on_demand = OnDemand(mover, self.take_back_loads, self.read_ahead)
        self.bringer = Bringer(mover, self.lane, self.on_demand, followed, None if below is None else self._held_below)
        self.pinner = Pinner(mover, self.on_demand, self._bring, self.lane, self._held_for, self.bringer.gatherer)
        self._below = below
        if below is not None:
            below.lane.above = self.lane

    @property
    def device(self) -> DeviceMover:
        """The owner of a device's tensors."""
        assert isinstance(self.mover, DeviceMover)
        return self.mover

    def take_back_loads(self) -> None:
        """Undo all loads whose copies wait for the tier below."""
        if self._below is not None:
            self.device.take_back_loads()

    def forget_loads(self) -> None:
        """Loads that have not begun are not wanted; what they would have read below may leave."""
        self.lane.clear()
        if self._below is not None:
            with self._below.mover.changed:
                self._below.lane.pump()

    def _bring(self, tensor: PagedTensor, mode: AccessMode, name: str, enough: Callable[[], bool]) -> bool:
        usable = self.bringer.bring(tensor, mode, name, enough)
        if self._below is not None:
            self.device.wait_for(tensor)
        return usable

    # ---- what is below -----------------------------------------------------------------------------------------

    @contextmanager
    def _held_below(self, tensor: PagedTensor, name: str) -> Iterator[bool]:
        """Have what a tensor is a copy of in host memory inside the block; yields False where the copy needs it no
        more. Without the lock held."""
        if self._below is None or not self.device.mirrors(tensor):
            yield True
            return
        self.device.accelerator.check()
        lower, below = self.device.lower(tensor.id), self._below

        def is_on_its_way() -> bool:
            return self.device.is_given(tensor) or (tensor.readable and not self.lane.moves(tensor))

        with below.mover.changed:
            held = below.pinner.pin(name, [_read(lower)], is_on_its_way)
        try:
            yield bool(held)
        finally:
            below.pinner.unpin(held)

    @contextmanager
    def _held_for(self, accesses: Sequence[Access], name: str) -> Iterator[None]:
        """Have all that the tensors of an op are copies of in host memory, and compute put behind their copies at the
        end."""
        if self._below is None:
            yield
            return
        tensors = [self.mover.tensors[access.tensor] for access in accesses]
        wholes = self.mover.gathered
        tensors = [wholes.shard(tensor) if tensor.id in wholes else tensor for tensor in tensors]
        streamed = [tensor for tensor in tensors if not tensor.resident and self.device.mirrors(tensor)]
        with self.lower_pinned(streamed, name):
            yield
        for tensor in streamed:
            self.device.wait_for(tensor)

    @contextmanager
    def lower_pinned(self, tensors: Sequence[PagedTensor], name: str) -> Iterator[list[PagedTensor]]:
        """Have what tensors of a device are copies of in host memory inside the block; yields it.

        Raises:
            BudgetError: it does not fit there. StorageError: a page file failed. Nothing was lost.
        """
        assert self._below is not None
        self.device.accelerator.check()
        lower = [self.device.lower(tensor.id) for tensor in tensors]
        with self._below.mover.changed:
            held = self._below.pinner.pin(name, [_read(tensor) for tensor in lower])
        try:
            yield lower
        finally:
            self._below.pinner.unpin(held)


def _read(tensor: PagedTensor) -> Access:
    return Access(tensor.id, AccessMode.READ)
