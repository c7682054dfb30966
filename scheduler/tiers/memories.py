"""The memory of all tiers, as ops use it: which tier a tensor is in, pinning over tiers, and their locks in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

import torch

from pagemem.frames.page import TensorId
from pagemem.ranks.collectives import ShardLayout
from pagemem.ranks.comm_lane import CommLane
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.host_mover import HostMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.telemetry.recorder import WaitCause
from pagemem.tier import Tier
from scheduler.planning.trace import Access, AccessMode
from scheduler.tiers.on_demand import PlanView
from scheduler.tiers.reducing import Fill, ReduceScatter
from scheduler.tiers.tier_memory import TierMemory
from scheduler.tiers.update_lane import UpdateLane
from scheduler.tiers.wait_explainer import DeviceCauses, WaitExplainer

_NO_WORKER: Final = (
    "updates are made beside compute, and shards gathered for other ranks: nothing orders the two; have the training "
    "thread make them (update.worker: false)"
)


class Memories:
    """Host memory, and a device above it where there is one. Training thread only.

    The lock of a device's mover is taken before that of host memory.

    Args:
        mover: owner of residency in host memory.
        followed: the plans of what the op under way belongs to; None: it is not recorded.

    Attributes:
        numbers: of tasks, in the order in which they are begun over all lanes.
        host, device: the tiers; no device: None. all: both, host memory first.
        updates: made beside compute; None: there is no worker.
    """

    def __init__(self, mover: Mover, followed: Callable[[], PlanView | None]) -> None:
        self.numbers = itertools.count()
        self.host = TierMemory(mover, self.numbers, followed)
        self.device: TierMemory | None = None
        self.updates: UpdateLane | None = None
        self.all = [self.host]
        self._followed = followed
        self._comm: CommLane | None = None

    def add_ranks(self, lane: CommLane) -> None:
        """Have other ranks, too. Once, after `add_device`.

        Raises:
            ValueError: updates are made beside compute.
        """
        if self.updates is not None:
            raise ValueError(_NO_WORKER)
        self._comm = lane
        for memory in self.all:
            memory.mover.gathered.lane = lane

    def add_device(self, mover: DeviceMover) -> None:
        """Have a device, too, whose tensors are copied up from host memory. Once, before the first op."""
        self.device = TierMemory(mover, self.numbers, self._followed, self.host)
        self.all.append(self.device)

    def add_worker(self, n_threads: int) -> UpdateLane:
        """Have updates in host memory made beside compute, from the first op on; returns their lane.

        Args:
            n_threads: compute threads of an update.

        Raises:
            StorageError: the system starts no more threads.
            ValueError: there are other ranks.
        """
        if self._comm is not None:
            raise ValueError(_NO_WORKER)
        host = self.host
        assert isinstance(host.mover, HostMover)
        lane = UpdateLane(
            host.mover, host.lane, lambda: next(self.numbers), host.pinner.pin, host.pinner.unpin, n_threads
        )
        self.updates = host.bringer.updates = host.lane.updates = lane
        return lane

    def finish_updates(self) -> None:
        """Wait until all updates made beside compute are over. Without the lock of a device.

        Raises:
            BudgetError, StorageError: as `UpdateLane.finish`.
        """
        if self.updates is not None:
            self.updates.finish()

    def set_order(self, tensors: Iterable[PagedTensor]) -> None:
        """In which order passes go through tensors of host memory: what is fetched on demand is read ahead in it, or
        backwards."""
        assert self.host.read_ahead is not None
        self.host.read_ahead.set_order(tensors)

    def set_overhead(self, n_bytes: int) -> None:
        """What the budget of host memory holds beside the arena from now on."""
        self.host.on_demand.overhead_bytes = n_bytes

    @property
    def overhead_bytes(self) -> int:
        """What the budget of host memory holds beside the arena."""
        return self.host.on_demand.overhead_bytes

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The locks of all movers, in their order."""
        with ExitStack() as locks:
            for memory in reversed(self.all):
                locks.enter_context(memory.mover.changed)
            yield

    # ---- which tier --------------------------------------------------------------------------------------------

    def of(self, tensor: TensorId) -> TierMemory:
        """The tier that a tensor is in."""
        return self.host if self.device is None or tensor in self.host.mover.tensors else self.device

    def placed(self, accesses: Sequence[Access]) -> list[Access]:
        """Accesses with the tiers that their tensors are in."""
        return [Access(access.tensor, access.mode, self.of(access.tensor).tier, access.via) for access in accesses]

    def in_host(self, tensor: TensorId) -> TensorId:
        """A tensor, or the one of page files that it is made of here."""
        for memory in reversed(self.all):
            wholes = memory.mover.gathered
            if tensor in wholes:
                tensor = wholes.shard(memory.mover.tensors[tensor]).id
        if self.device is None:
            return tensor
        device = self.device.device
        known = device.tensors.get(tensor)
        return device.lower(tensor).id if known is not None and device.mirrors(known) else tensor

    def is_to_be_copied(self, tensor: TensorId) -> bool:
        """Whether a tensor of host memory has yet to be copied up, by a task that was begun."""
        lower, above = self.host.mover.tensors.get(tensor), self.host.lane.above
        return lower is not None and above is not None and above.copies(lower)

    @property
    def on_demand_bytes(self) -> int:
        """Bytes that ops had to fetch themselves, over all lanes, since no plan had brought them."""
        bringers = [memory.bringer for memory in self.all]
        return sum(bringer.on_demand_bytes + bringer.gatherer.on_demand_bytes for bringer in bringers)

    def causes(self) -> Callable[[str], WaitCause]:
        """Explains waits, for the profiler."""
        host = WaitExplainer(self.host.mover, self.host.lane)
        return host if self.device is None else DeviceCauses(self.device.device, host)

    # ---- ops ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what a copy failed with, and where gathered tensors were written to. With the locks held."""
        for memory in self.all:
            memory.mover.monitor.check()
            memory.mover.gathered.refuse_writes()

    def pin(self, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """Pin the tensors of an op once they are usable, those first that are waited for in host memory.

        Raises:
            BudgetError, StorageError: as `Pinner.pin`; none is pinned.
        """
        held: list[PagedTensor] = []
        try:
            for memory in self.all:
                own = [access for access in touching(accesses) if access.tier is memory.tier]
                if own and memory is self.host:
                    with memory.mover.changed:
                        held += memory.pinner.pin(name, own)
                elif own:
                    held += memory.pinner.pin(name, own)
        except BaseException:
            self.unpin(held)
            raise
        return held

    def unpin(self, held: Sequence[PagedTensor]) -> None:
        """Tensors may move again, unless views of them live on."""
        for memory in self.all:
            own = [tensor for tensor in held if tensor.id in memory.mover.tensors]
            if own:
                memory.pinner.unpin(own)

    def collect_views(self) -> list[PagedTensor]:
        """Tensors of which the last view has ended. With the locks held."""
        return [tensor for memory in self.all for tensor in memory.mover.collect_leases()]

    @contextmanager
    def in_passing(self, tensor: PagedTensor) -> Iterator[bool]:
        """Without an op and without moves: yields whether a tensor of host memory is there and may be changed in the
        block."""
        mover = self.host.mover
        with mover.changed:
            free = tensor.readable and not tensor.snapshot_pending and not tensor.uploads
            if free:
                tensor.pins += 1
                mover.touch(tensor)
        try:
            yield free
        finally:
            if free:
                self.unpin([tensor])

    @contextmanager
    def lower_pinned(self, tensor: PagedTensor) -> Iterator[PagedTensor]:
        """Have what a tensor of the device is a copy of in host memory inside the block, which is no op; yields it.

        Raises:
            BudgetError: it does not fit there. StorageError: a page file failed. Nothing was lost.
        """
        assert self.device is not None
        with self.device.lower_pinned([tensor], tensor.name) as lower:
            yield lower[0]

    def consume(self, tensor: PagedTensor) -> None:
        """Declare a tensor's content dead, after the op that consumed it has ended, or once the worker has made it."""
        mover = self.of(tensor.id).mover
        if tensor.updates:
            mover.discard_soon(tensor)
            return
        mover.monitor.wait_until(lambda: not tensor.moving, tensor.name, tensor.n_bytes)
        mover.discard(tensor)

    def reduce_scatter(
        self, whole: torch.Tensor, into: PagedTensor, layout: ShardLayout, source: PagedTensor | None = None,
        *, parts: int = 0, divisor: int = 1,
    ) -> None:  # fmt: skip
        """Begin to have the sum over all ranks of a tensor come to a shard in host memory, inside an op that creates
        ``into`` via REDUCE_SCATTER. On all ranks; what uses ``into`` next waits for it.

        Args:
            whole: flat, of the layout's dtype; it stays as it is until then.
            source: the paged tensor that ``whole`` is a view of, which the op consumes, and which expires then: who
                uses it next calls `Mover.end_expiry` before. None: it is memory that is not paged.
            parts: a number for what of ``whole`` is to be summed, equal on all ranks. divisor: of the sum.
        """
        assert self._comm is not None
        with self.locked():
            owner = None if source is None else (self.of(source.id).mover, source)
            assert isinstance(self.host.mover, HostMover)
            self._comm.submit(ReduceScatter(self.host.mover, whole, into, layout, owner, parts, divisor))
            if owner is not None:
                owner[0].discard_soon(owner[1])

    def fill(self, into: PagedTensor, layout: ShardLayout) -> None:
        """Begin to have the other ranks' parts come to a tensor in host memory, inside an op that modifies ``into`` via
        FILL. On all ranks; what uses ``into`` next waits for it.

        Args:
            layout: which elements of ``into`` are right on which rank.
        """
        assert self._comm is not None and isinstance(self.host.mover, HostMover)
        with self.locked():
            self._comm.submit(Fill(self.host.mover, into, layout))

    # ---- all of them -------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Wait until no collective is under way, with no lock held and no gather waiting for frames."""
        if self._comm is not None:
            self._comm.drain()

    def settle(self) -> None:
        """Wait until no copy is under way."""
        for memory in reversed(self.all):
            memory.mover.monitor.settle()

    def evict(self, tier: Tier) -> None:
        """Store what is dirty and give all frames of a tier up.

        Raises:
            AssertionError: something is held. StorageError: a copy failed; it is still intact in memory.
        """
        for memory in self.all:
            if memory.tier is tier:
                memory.mover.store_all()
                for tensor in memory.mover.tensors.values():
                    if tensor.state is Residency.CLEAN and not tensor.resident:
                        memory.mover.drop(tensor)


def touching(accesses: Sequence[Access]) -> list[Access]:
    """Those for which a tensor has to be in its tier."""
    return [access for access in accesses if access.mode is not AccessMode.DISCARD]
