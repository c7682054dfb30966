"""Having the tensors of one op at hand together: each made usable and pinned, or all of them placed anew, side by side.

Who brings a tensor that is not there, by plan or on demand, is the driver's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pagemem.errors import BudgetError
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from scheduler.execution.on_demand import OnDemand
from scheduler.planning.trace import CHANGES, Access, AccessMode


class Holding(ABC):
    """What a driver pins. Training thread only, with the mover's lock held (waiting gives it up).

    Args:
        mover: owner of all residency.
        overhead_bytes: what the budget holds beside the arena; part of the budget that an error proposes.
    """

    def __init__(self, mover: Mover, overhead_bytes: int) -> None:
        self.mover = mover
        self._on_demand = OnDemand(mover, overhead_bytes)
        self._sequence = 0

    @abstractmethod
    def _make_usable(self, tensor: PagedTensor, mode: AccessMode, name: str) -> None:
        """Have a tensor at hand for an op, which is called ``name``."""

    @abstractmethod
    def end(self, held: Sequence[PagedTensor]) -> None:
        """Unpin tensors."""

    def _hold(self, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """Pin the tensors of an op once they are usable."""
        held: list[PagedTensor] = []
        try:
            for access in accesses:
                tensor = self.mover.tensors[access.tensor]
                self._make_usable(tensor, access.mode, name)
                tensor.pins += 1
                held.append(tensor)
        except BudgetError:
            self.end(held)
            held = self._hold_packed(name, accesses)
        except BaseException:
            self.end(held)
            raise
        self._sequence += 1
        for access, tensor in zip(accesses, (self.mover.tensors[a.tensor] for a in accesses), strict=True):
            self.mover.tenants.used(tensor, self._sequence)
            if access.mode in CHANGES:
                self.mover.touch(tensor)
        return held

    def _hold_packed(self, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """Pin tensors that stood in each other's way: move them out and place them anew, side by side.

        Those of which a view lives stay where they are.
        """
        own = [self.mover.tensors[access.tensor] for access in accesses]
        for tensor in own:
            if not tensor.held:
                self._on_demand.move_out(tensor)
        modes = {access.tensor: access.mode for access in accesses}
        held: list[PagedTensor] = []
        try:
            for tensor in sorted(own, key=lambda t: (not t.held, -t.n_frames)):
                if tensor.held:
                    self._await_copy(tensor, modes[tensor.id])
                else:
                    self._on_demand.fetch(tensor, name, fresh=modes[tensor.id] is AccessMode.CREATE, lowest=True)
                tensor.pins += 1
                held.append(tensor)
        except BaseException:
            self.end(held)
            raise
        return held

    def _await_copy(self, tensor: PagedTensor, mode: AccessMode) -> None:
        self.mover.monitor.wait_until(lambda: self._usable(tensor, mode), tensor.name, tensor.n_bytes)

    def _usable(self, tensor: PagedTensor, mode: AccessMode) -> bool:
        if mode in CHANGES:
            return tensor.state in (Residency.CLEAN, Residency.DIRTY) and not tensor.uploads
        return tensor.readable
