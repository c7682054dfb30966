"""One update of `scheduler.tiers.update_lane`: what it does, with which tensors, and whether it can begin. With the
mover's lock held, but where something else is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagemem.residency.paged_tensor import PagedTensor, Residency
from scheduler.planning.trace import CHANGES, Access, AccessMode
from scheduler.tiers.load_lane import LoadLane


def nothing() -> None:
    """In the place of work that is done, which holds gradients."""


@dataclass(slots=True, eq=False)
class UpdateJob:
    """An update that was begun, and not told of.

    Attributes:
        number: among tasks of plans, see `LoadLane`.
        uses: its tensors.
        loads: the lane that brings them.
        work: makes it, on any thread.
        ended: called on the training thread once it is over. spent_s: seconds that it took, known then.
        running: whether the worker is making it. taken: whether the training thread is, or brings its tensors for that.
    """

    number: int
    name: str
    accesses: Sequence[Access]
    uses: list[tuple[PagedTensor, AccessMode]]
    loads: LoadLane
    work: Callable[[], None]
    ended: list[Callable[[], None]] = field(default_factory=list)
    running: bool = False
    taken: bool = False
    spent_s: float = 0.0

    @property
    def begun(self) -> bool:
        """Whether somebody has begun to make it."""
        return self.running or self.taken

    def has(self, tensor: PagedTensor) -> bool:
        """Whether it uses a tensor."""
        return any(used is tensor for used, _ in self.uses)

    @property
    def lacks(self) -> bool:
        """Whether a tensor is not there, and nothing is to bring it. Loads that were begun later may wait for this
        update."""
        loads, number = self.loads, self.number
        return any(not (t.whole or t.moving or loads.moves(t, before=number)) for t, _ in self.uses)

    @property
    def would_lack(self) -> bool:
        """Likewise, behind the updates that were begun before: what one of them uses stays for this one."""
        return any(not (t.whole or t.moving or t.updates or t.id in self.loads) for t, _ in self.uses)

    @property
    def is_ready(self) -> bool:
        """Whether all tensors are there, and may be changed."""
        return all(self._is_usable(tensor, mode) for tensor, mode in self.uses)

    def _is_usable(self, tensor: PagedTensor, mode: AccessMode) -> bool:
        # What a load begun before the update moves, out of another one's way, has to move first.
        if self.loads.moves(tensor, before=self.number):
            return False
        if mode in CHANGES:
            there = tensor.state in (Residency.CLEAN, Residency.DIRTY)
            return there and not tensor.uploads and not tensor.snapshot_pending
        return tensor.whole

    def to_store(self) -> list[PagedTensor]:
        """What a commit has yet to get, before it is changed, and nobody is storing."""
        changed = (tensor for tensor, mode in self.uses if mode in CHANGES)
        return [tensor for tensor in changed if tensor.snapshot_pending and tensor.state is Residency.DIRTY]
