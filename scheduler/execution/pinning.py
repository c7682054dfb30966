"""Pinning the tensors of one op: each made usable, or all of them placed anew, side by side.

What a plan brings is waited for; the rest is fetched on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from scheduler.execution.lower_tier import LowerTier
from scheduler.execution.on_demand import OnDemand
from scheduler.execution.plan_follower import Mode, PlanFollower
from scheduler.execution.read_lane import ReadLane
from scheduler.planning.trace import CHANGES, Access, AccessMode


def is_usable(tensor: PagedTensor, mode: AccessMode) -> bool:
    """Whether an op may use a tensor in this way now."""
    if mode in CHANGES:
        return tensor.state in (Residency.CLEAN, Residency.DIRTY) and not tensor.uploads
    return tensor.readable


class Bringer:
    """Brings tensors for ops. Training thread only, with the mover's lock held (waiting gives it up).

    Args:
        mover: owner of all residency.
        lane: planned loads. on_demand: fetches what they do not bring.
        lower: the tier that tensors are copied up from; None above page files.
        follower: the plans of what the op under way belongs to; None: it is not recorded.

    Attributes:
        on_demand_bytes: that ops had to fetch themselves, since no plan had brought them.
    """

    def __init__(
        self,
        mover: Mover,
        lane: ReadLane,
        on_demand: OnDemand,
        lower: LowerTier | None,
        follower: Callable[[], PlanFollower | None],
    ) -> None:
        self.on_demand_bytes = 0
        self._mover = mover
        self._lane = lane
        self._on_demand = on_demand
        self._lower = lower
        self._follower = follower

    def bring(self, tensor: PagedTensor, mode: AccessMode, name: str) -> None:
        """Make a tensor usable in this way for the op called ``name``.

        Raises:
            BudgetError: it has no room beside what is held. StorageError: it cannot be read. Nothing was lost.
        """
        lower = self._lower
        if lower is None:
            self._bring(tensor, mode, name)
        elif lower.must_be_op_below(tensor) or not is_usable(tensor, mode) or tensor.id in self._lane:
            with lower.holds([tensor.id], name):
                self._bring(tensor, mode, name)
            lower.copied([tensor])

    def announce(self, tensors: Sequence[TensorId]) -> None:
        """See `Driver.announce`."""
        follower = self._follower()
        if self._lower is not None:
            self._lower.announce(tensors)
        elif follower is not None:
            with self._mover.changed:
                self._mover.monitor.check()
                follower.announce(tensors)
                for tensor in map(self._mover.tensors.__getitem__, tensors):
                    # One that waits in the lane is about to get the place that the plan has for it.
                    if tensor.frame is None and tensor.id not in self._lane and tensor.state is Residency.STORED:
                        self._on_demand.begin_early(tensor, follower)

    def _bring(self, tensor: PagedTensor, mode: AccessMode, name: str) -> None:
        follower = self._follower()
        planned = follower is not None and (follower.rest.active or follower.mode is Mode.PLANNED)
        ahead = self._on_demand.read_ahead
        if ahead is not None and not planned and tensor.frame is not None and mode is not AccessMode.CREATE:
            ahead.follow(tensor)
        # Outside a step nobody says whether a tensor is going to be changed.
        if tensor.snapshot_pending and (mode in CHANGES or follower is None):
            self._mover.make_writable(tensor)

        def usable() -> bool:
            # A tensor that waits in the lane is about to move to where the plan has it, out of another one's way.
            return is_usable(tensor, mode) and tensor.id not in self._lane

        def hopeless() -> bool:
            if tensor.moving:
                return False
            if self._lane.stuck:
                self._lane.free(tensor)
            return tensor.id not in self._lane and not tensor.moving

        self._mover.monitor.wait_until(lambda: usable() or hopeless(), tensor.name, tensor.n_bytes)
        if is_usable(tensor, mode):
            return
        self.on_demand_bytes += 0 if mode is AccessMode.CREATE else tensor.n_bytes
        by_plan = None if follower is None or follower.rest.active or follower.mode is Mode.ON_DEMAND else follower
        if by_plan is not None:
            by_plan.missed(name, tensor.name)
        self._on_demand.fetch(tensor, name, fresh=mode is AccessMode.CREATE, by_plan=by_plan)


class Pinner:
    """Pins tensors for ops. Training thread only, with the mover's lock held (waiting gives it up).

    Args:
        mover: owner of all residency.
        on_demand: moves tensors that stand in each other's way.
        bring: makes one tensor usable for an op, which is called by name.
        lane: planned loads, which may wait for what is unpinned.
        lower: the tier that tensors are copied up from; None above page files.
    """

    def __init__(
        self,
        mover: Mover,
        on_demand: OnDemand,
        bring: Callable[[PagedTensor, AccessMode, str], None],
        lane: ReadLane,
        lower: LowerTier | None,
    ) -> None:
        self._mover = mover
        self._on_demand = on_demand
        self._bring = bring
        self._lane = lane
        self._lower = lower
        self._sequence = 0

    def pin(self, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """Pin the tensors of an op once they are usable."""
        held: list[PagedTensor] = []
        try:
            for access in accesses:
                tensor = self._mover.tensors[access.tensor]
                self._bring(tensor, access.mode, name)
                tensor.pins += 1
                held.append(tensor)
        except BudgetError:
            self.unpin(held)
            with self._lane.paused():
                held = self._pin_packed(name, accesses)
        except BaseException:
            self.unpin(held)
            raise
        self._sequence += 1
        for access in accesses:
            tensor = self._mover.tensors[access.tensor]
            self._mover.tenants.used(tensor, self._sequence)
            if access.mode in CHANGES:
                self._mover.touch(tensor)
        return held

    def unpin(self, held: Sequence[PagedTensor]) -> None:
        """Tensors may move again, unless views of them live on."""
        for tensor in held:
            tensor.pins -= 1
        if self._lane.stuck:
            self._lane.pump()

    def _pin_packed(self, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        if self._lower is None:
            return self._pack(name, accesses)
        tensors = self._mover.tensors
        streamed = [access.tensor for access in accesses if not tensors[access.tensor].resident]
        with self._lower.holds(streamed, name):
            held = self._pack(name, accesses)
        self._lower.copied(held)
        return held

    def _pack(self, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """Pin tensors that stood in each other's way: move them out and place them anew, side by side.

        Those of which a view lives stay where they are.
        """
        own = [self._mover.tensors[access.tensor] for access in accesses]
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
            self.unpin(held)
            raise
        return held

    def _await_copy(self, tensor: PagedTensor, mode: AccessMode) -> None:
        self._mover.monitor.wait_until(lambda: is_usable(tensor, mode), tensor.name, tensor.n_bytes)
