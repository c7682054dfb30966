"""One gather of a tensor from the shards of all ranks, from when it is asked for until it is over; see
`pagemem.residency.gathered`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import torch

from pagemem.devices.arena import Arena
from pagemem.errors import BudgetError
from pagemem.files.transfer import Completion
from pagemem.frames.page import FrameId, TensorId
from pagemem.process.wait_lock import WaitLock
from pagemem.ranks.collectives import Collectives, ShardLayout
from pagemem.ranks.comm_lane import Collective, CollectiveKind, Outcome, Vote
from pagemem.residency.monitor import CopyMonitor
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.residency.tenants import Tenants
from pagemem.tier import Tag


class ArenaOwner(Protocol):
    """What is asked of the mover that owns a gathered tensor and its shard; see `pagemem.residency.mover.Mover`."""

    changed: WaitLock
    monitor: CopyMonitor
    tenants: Tenants
    arena: Arena
    tensors: dict[TensorId, PagedTensor]

    @property
    def setting(self) -> str:
        """The budget that is too small when the arena is."""

    def create(self, name: str, tag: Tag, n_bytes: int) -> PagedTensor:
        """A new tensor."""

    def drop(self, tensor: PagedTensor) -> None:
        """Give up a clean tensor's frames."""

    def discard_if_expired(self, tensor: PagedTensor) -> None:
        """Discard a tensor whose content was of no use before, and that was held until now."""


def hold(mover: ArenaOwner, tensor: PagedTensor) -> None:
    """A collective begins to read or fill a tensor, which neither moves nor changes until `let_go`. With the lock
    held."""
    tensor.uploads += 1
    mover.monitor.in_flight += 1


def let_go(mover: ArenaOwner, tensor: PagedTensor) -> None:
    """It has ended. With the lock held; notify the monitor afterwards."""
    tensor.uploads -= 1
    mover.monitor.ended(None)
    mover.discard_if_expired(tensor)


#: Where a plan has a tensor that it does not have.
NOWHERE: Final = FrameId(-1)


class GatherTicket(Collective):
    """One gather. Guarded by the mover's lock.

    Attributes:
        planned: a plan has asked for it; otherwise the op that waits for it.
        place: where the plan has the tensor, if an op waits for it. number: of the plan's task.
        load: ends the load that it makes.
        fills: its frames are its own: they are filled, or filled anew. has: they hold what it would bring.
        refused: it is not to be made. over: it has ended, and so has its load.
        comes_up: whether a shard that is being loaded waits for nothing but tasks numbered before another.
        on_end: called when it is over.
    """

    kind = CollectiveKind.GATHER

    def __init__(
        self, mover: ArenaOwner, tensor: PagedTensor, shard: PagedTensor, layout: ShardLayout, rank: int, *,
        planned: bool,
    ) -> None:  # fmt: skip
        super().__init__(tensor.name, tensor.id, layout.n_bytes)
        self.tensor, self.planned, self.place = tensor, planned, NOWHERE
        self.number = 0
        self.load: Completion | None = None
        self.fills = self.has = self.refused = self.over = False
        self.comes_up: Callable[[PagedTensor, int], bool] = lambda shard, before: True
        self.on_end: Callable[[GatherTicket], None] = lambda ticket: None
        self._mover, self._source, self._layout, self._rank = mover, shard, layout, rank
        self._held: list[PagedTensor] = []
        self._shard = self._whole = torch.empty(0)

    @property
    def undecided(self) -> bool:
        """Whether it has no frames yet, and might get some."""
        return not (self.over or self.refused or self.fills or self.has)

    @property
    def is_right(self) -> bool:
        """Whether it has brought what the tensor is to hold. Not so where a shard has changed meanwhile."""
        return self.outcome is Outcome.DONE and not self.refused

    @property
    def reads_later(self) -> bool:
        """Whether it has frames that the plan gave it, and has yet to read the shard."""
        return self.fills and not self.over and not self._held

    @property
    def mark(self) -> int:
        """As `Collective.mark`: whether the tensor is where this rank's plan has it."""
        return int(self.tensor.frame == self.place)

    def vote(self) -> Vote | None:
        """As `Collective.vote`."""
        with self._mover.changed:
            return self._vote()

    def _vote(self) -> Vote | None:
        shard = self._source
        comes = shard.state is Residency.LOADING and self.comes_up(shard, self.number)
        self.refused |= self.fills and not shard.readable and not comes
        if self.refused:
            return Vote.REFUSE
        if not self.has and not (self.fills and shard.readable):
            return None
        tenants, layout, rank = self._mover.tenants, self._layout, self._rank
        self._whole = tenants.view(self.tensor, layout.dtype, 0, layout.numel)
        if self.has:  # held since then
            self._shard = layout.part(self._whole, rank)
            return Vote.HAVE
        self.hold(shard)
        start, end = layout.ranges[rank]
        self._shard = tenants.view(shard, layout.dtype, 0, end - start)
        return Vote.TAKE

    def hold(self, tensor: PagedTensor) -> None:
        """Have a tensor neither move nor change until the end. With the lock held."""
        hold(self._mover, tensor)
        self._held.append(tensor)

    def make(self, collectives: Collectives) -> None:
        """As `Collective.make`."""
        collectives.gather(self._shard, self._whole, self._layout)

    def ended(self) -> None:
        """As `Collective.ended`."""
        mover, tensor = self._mover, self.tensor
        with mover.changed:
            self._shard = self._whole = torch.empty(0)
            while self._held:
                let_go(mover, self._held.pop())
            self.over = True
            self.on_end(self)
            error = self.error
            if error is None and not self.is_right:
                error = self.shortage()
                tensor.tentative = self.planned  # its op gathers it then
            if self.load is not None:
                self.load(error)
            elif self.outcome is Outcome.FAILED and error is not None:
                mover.monitor.note_failure(error)
            if self.is_right and not self.planned and all(self.marks):
                tensor.kept_at = self.place
            mover.monitor.notify()

    def shortage(self) -> BudgetError:
        """What an op is told whose gather was refused."""
        mover = self._mover
        need_bytes = (mover.arena.n_frames + self.tensor.n_frames) * mover.arena.page_bytes
        return BudgetError(
            f"rank {', '.join(map(str, self.refusing))} has no room for {self.tensor.name} and its shard beside what "
            f"is held there; raise {mover.setting} on all ranks",
            need_bytes,
        )
