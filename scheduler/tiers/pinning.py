"""Pinning the tensors of one op: each made usable, or all of them placed anew, side by side.

What a plan brings is waited for; the rest is fetched on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from scheduler.planning.trace import CHANGES, Access, AccessMode
from scheduler.tiers.gathering import Gatherer
from scheduler.tiers.load_lane import LoadLane
from scheduler.tiers.on_demand import OnDemand, PlanView


def is_usable(tensor: PagedTensor, mode: AccessMode) -> bool:
    """Whether an op may use a tensor in this way now, once its updates are over."""
    if mode in CHANGES:
        return tensor.state in (Residency.CLEAN, Residency.DIRTY) and not tensor.uploads
    return tensor.whole


def never() -> bool:
    """It is not enough before the tensor is there."""
    return False


class UpdatesBeside(Protocol):
    """Updates that are made beside compute: `scheduler.tiers.update_lane.UpdateLane`."""

    @property
    def busy(self) -> bool:
        """Whether one is not over."""

    def finish(self, tensor: PagedTensor | None = None) -> None:
        """Have those of a tensor made, or all."""


class Bringer:
    """Brings tensors for ops. Training thread only, with the mover's lock held in host memory (waiting gives it up).

    Args:
        mover: owner of residency in the tier.
        lane: planned loads. on_demand: fetches what they do not bring.
        follower: the plans of what the op under way belongs to; None: it is not recorded.
        held_below: has what a tensor is copied from where it can be, for an op called by name, and says whether; it is
            not where the copy is on its way. None: tensors come from page files.

    Attributes:
        on_demand_bytes: that ops had to fetch themselves, since no plan had brought them; without what they gathered.
        gatherer: brings those that are gathered.
        updates: those that are made beside compute; None: there are none.
    """

    def __init__(
        self,
        mover: Mover,
        lane: LoadLane,
        on_demand: OnDemand,
        follower: Callable[[], PlanView | None],
        held_below: Callable[[PagedTensor, str], AbstractContextManager[bool]] | None = None,
    ) -> None:
        self.on_demand_bytes = 0
        self.updates: UpdatesBeside | None = None
        self._mover = mover
        self._lane = lane
        self._on_demand = on_demand
        self._follower = follower
        self._held_below = held_below
        self.gatherer = Gatherer(mover, on_demand, follower, self.bring)

    def bring(self, tensor: PagedTensor, mode: AccessMode, name: str, enough: Callable[[], bool] = never) -> bool:
        """Make a tensor usable in this way for the op called ``name``, and pin it, or wait until it is ``enough``;
        returns whether it is pinned.

        Of a device, the lock is not held while what is below is waited for: copies up end meanwhile.

        Raises:
            BudgetError: it has no room beside what is held. StorageError: it cannot be read. Nothing was lost.
        """
        if self._held_below is None:
            if not self._bring(tensor, mode, name, enough):
                return False
            tensor.pins += 1
            return True
        while not self._pin_if_usable(tensor, mode):
            with self._held_below(tensor, name) as held, self._mover.changed:
                if held:
                    self._bring(tensor, mode, name, enough)
                    tensor.pins += 1
                    return True
                self._mover.monitor.wait_until(lambda: not tensor.moving, tensor.name, tensor.n_bytes)
                self._mover.monitor.check()
        return True

    def _pin_if_usable(self, tensor: PagedTensor, mode: AccessMode) -> bool:
        with self._mover.changed:
            usable = is_usable(tensor, mode) and tensor.id not in self._lane
            tensor.pins += usable
            return usable

    def announce(self, tensors: Sequence[TensorId]) -> None:
        """See `Driver.announce`."""
        follower = self._follower()
        if follower is None:
            return
        with self._mover.changed:
            self._mover.monitor.check()
            follower.announce(tensors)
            for tensor in map(self._mover.tensors.__getitem__, tensors):
                # One that waits in the lane is about to get the place that the plan has for it.
                if tensor.frame is None and tensor.id not in self._lane and tensor.state is Residency.STORED:
                    self._on_demand.begin_early(tensor, follower)

    def _bring(self, tensor: PagedTensor, mode: AccessMode, name: str, enough: Callable[[], bool]) -> bool:
        if self.updates is not None and tensor.updates and not enough():
            self.updates.finish(tensor)
        follower = self._follower()
        planned = follower is not None and follower.planned
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
                if self.updates is not None and self.updates.busy:
                    return True  # no load that one of them waits for is to be taken out
                self._lane.free(tensor)
            return tensor.id not in self._lane and not tensor.moving

        while True:
            if not usable():
                self._lane.pump()  # which begins nothing between a failed copy and its being told of
            self._mover.monitor.wait_until(lambda: enough() or usable() or hopeless(), tensor.name, tensor.n_bytes)
            if is_usable(tensor, mode):
                return True
            if enough():
                return False
            if self.updates is None or not self.updates.busy:
                break
            self.updates.finish()  # what leaves for a tensor that is fetched must not be one of theirs
        self.on_demand_bytes += 0 if mode is AccessMode.CREATE else tensor.n_bytes
        by_plan = follower if follower is not None and follower.moves else None
        if by_plan is not None and mode is not AccessMode.CREATE:  # nothing is to be brought for that
            by_plan.missed(name, tensor)
        self._on_demand.fetch(tensor, name, fresh=mode is AccessMode.CREATE, by_plan=by_plan)
        return True


class Pinner:
    """Pins tensors for ops. Training thread only, with the mover's lock held in host memory (waiting gives it up).

    Args:
        mover: owner of residency in the tier.
        on_demand: moves tensors that stand in each other's way.
        bring: makes one tensor usable for an op, which is called by name, and pins it; see `Bringer.bring`.
        lane: planned loads, which may wait for what is unpinned.
        held_for: has what the tensors of an op are copied from where they can be, all at once.
        gatherer: brings those that are gathered.
    """

    def __init__(
        self,
        mover: Mover,
        on_demand: OnDemand,
        bring: Callable[[PagedTensor, AccessMode, str, Callable[[], bool]], bool],
        lane: LoadLane,
        held_for: Callable[[Sequence[Access], str], AbstractContextManager[None]],
        gatherer: Gatherer,
    ) -> None:
        self._mover = mover
        self._on_demand = on_demand
        self._bring = bring
        self._lane = lane
        self._held_for = held_for
        self._gatherer = gatherer
        self._sequence = 0

    def pin(self, name: str, accesses: Sequence[Access], enough: Callable[[], bool] = never) -> list[PagedTensor]:
        """Pin the tensors of an op once they are usable; those that are not when it is ``enough`` are left out."""
        wholes = [access for access in accesses if access.tensor in self._mover.gathered]
        held = self._pin_own(name, [access for access in accesses if access not in wholes], enough)
        if wholes:
            held = self._pin_gathered(name, accesses, wholes, held)
        self.used(accesses)
        with self._mover.changed:
            for access in accesses:
                if access.mode in CHANGES:
                    self._mover.touch(self._mover.tensors[access.tensor])
        return held

    def _pin_own(self, name: str, accesses: Sequence[Access], enough: Callable[[], bool]) -> list[PagedTensor]:
        """Those that this rank brings itself."""
        held: list[PagedTensor] = []
        try:
            for access in accesses:
                tensor = self._mover.tensors[access.tensor]
                if self._bring(tensor, access.mode, name, enough):
                    held.append(tensor)
        except BudgetError:
            self.unpin(held)
            with self._held_for(accesses, name), self._mover.changed, self._lane.paused():
                held = self._pack(name, accesses)
        except BaseException:
            self.unpin(held)
            raise
        return held

    def _pin_gathered(
        self, name: str, accesses: Sequence[Access], wholes: Sequence[Access], own: list[PagedTensor]
    ) -> list[PagedTensor]:
        """Those that are gathered, beside an op's ``own`` ones; returns all. Where one finds no room on any rank, all
        ranks place all of them anew."""
        held = list(own)
        try:
            for access in wholes:
                tensor = self._mover.tensors[access.tensor]
                self._gatherer.bring(tensor, name)
                held.append(tensor)
        except BudgetError:
            self.unpin(held)
            with self._held_for(accesses, name), self._mover.changed, self._lane.paused():
                self._lane.refuse_gathers()
                self._mover.gathered.let_leave()  # all of them are asked for anew
                held = self._pack(name, accesses)
        except BaseException:
            self.unpin(held)
            raise
        return held

    def used(self, accesses: Sequence[Access]) -> None:
        """The tensors of an op are those used last."""
        self._sequence += 1
        with self._mover.changed:
            for access in accesses:
                self._mover.tenants.used(self._mover.tensors[access.tensor], self._sequence)

    def unpin(self, held: Sequence[PagedTensor]) -> None:
        """Tensors may move again, unless views of them live on."""
        with self._mover.changed:
            for tensor in held:
                tensor.pins -= 1
            if self._lane.stuck:
                self._lane.pump()

    def _pack(self, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """Pin tensors that stood in each other's way: move them out and place them anew, side by side.

        Those of which a view lives stay where they are.
        """
        own = [self._mover.tensors[access.tensor] for access in accesses]
        wholes = [tensor for tensor in own if tensor.id in self._mover.gathered]
        for tensor in own:
            if not tensor.held:
                self._on_demand.move_out(tensor)
        modes = {access.tensor: access.mode for access in accesses}
        held: list[PagedTensor] = []
        try:
            for tensor in sorted(wholes, key=lambda t: (-t.n_frames, t.id)):  # in the order of all ranks
                self._gatherer.bring(tensor, name, lowest=True)
                held.append(tensor)
            for tensor in sorted((t for t in own if t not in wholes), key=lambda t: (not t.held, -t.n_frames)):
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
