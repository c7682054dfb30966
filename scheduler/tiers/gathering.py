"""Having gathered tensors where ops use them, which all ranks must do alike.

What a rank finds in its memory depends on the time that its copies took; whether it gathers must not. So it follows
from what all ranks share, the ops and the plan:

- A gather that a plan triggers takes its place in the order of all ranks at once, and its tensor is *kept*: nothing but
  the plan makes it leave. Where every rank could make it, ops use it without asking anybody.
- Any other use takes part in a gather of its own: those that have the tensor say so, and where all do nothing is moved.
  Where all have it in the place that the plan has for it, it is kept from then on.
- A gather that any rank refuses is made on none; an op's that is refused finds no room on a rank, and all place the
  op's tensors anew.
- Kept tensors are let go of where a step differs from its plan, and when it is left.
"""

from __future__ import annotations

from collections.abc import Callable

from pagemem.errors import BudgetError
from pagemem.ranks.comm_lane import Outcome
from pagemem.residency.gather_ticket import GatherTicket
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor
from scheduler.planning.trace import AccessMode
from scheduler.tiers.on_demand import OnDemand, PlanView


class Gatherer:
    """Brings the gathered tensors of one tier for ops. Training thread only.

    Args:
        mover: owner of residency in the tier.
        on_demand: finds places. follower: the plans of what the op under way belongs to; None: it is not recorded.
        bring: makes a shard usable and pins it.

    Attributes:
        on_demand_bytes: that ops had to gather themselves.
    """

    def __init__(
        self,
        mover: Mover,
        on_demand: OnDemand,
        follower: Callable[[], PlanView | None],
        bring: Callable[[PagedTensor, AccessMode, str], bool],
    ) -> None:
        self.on_demand_bytes = 0
        self._mover = mover
        self._on_demand = on_demand
        self._follower = follower
        self._bring = bring

    def bring(self, tensor: PagedTensor, name: str, *, lowest: bool = False) -> None:
        """Have a tensor in its frames for the op called ``name``, and pin it.

        Args:
            lowest: in the first window there is.

        Raises:
            BudgetError: it, or its shard, has no room beside what is held, here or on another rank: raised on all.
            RankError: another rank failed. StorageError: the shard cannot be read. Nothing was lost.
        """
        wholes, monitor = self._mover.gathered, self._mover.monitor
        with self._mover.changed:
            monitor.wait_until(lambda: wholes.is_settled(tensor), tensor.name, tensor.n_bytes)
            if tensor.kept_at is not None and wholes.is_whole(tensor):
                tensor.pins += 1
                return
            tensor.kept_at = None
            follower = self._follower()
            by_plan = follower if follower is not None and follower.moves else None
            wholes.places[tensor.id] = None if by_plan is None else by_plan.frame_for(tensor.id)
            if wholes.is_whole(tensor):
                self._finish(wholes.ticket(tensor, has=True))
                return
            self.on_demand_bytes += wholes.layout(tensor).n_bytes
            if by_plan is not None:
                by_plan.missed(name, tensor)
            n_tickets = wholes.n_tickets
        try:
            self._gather(tensor, name, by_plan, lowest)
        except BudgetError as error:
            with self._mover.changed:
                if wholes.n_tickets == n_tickets:  # it is this rank that has no room
                    ticket = wholes.ticket(tensor, refused=True)
                    monitor.wait_until(lambda: ticket.over, tensor.name, tensor.n_bytes)
            raise error

    def _gather(self, tensor: PagedTensor, name: str, by_plan: PlanView | None, lowest: bool) -> None:
        """Gather a tensor and pin it, with its shard in memory."""
        shard = self._mover.gathered.shard(tensor)
        if lowest:
            self._bring_lowest(shard, name)
        else:
            self._bring(shard, AccessMode.READ, name)
        try:
            with self._mover.changed:
                if tensor.frame is not None:
                    self._finish(self._mover.gathered.ticket(tensor, fills=True))
                    return
                self._on_demand.fetch(tensor, name, fresh=False, lowest=lowest, by_plan=by_plan)
                tensor.pins += 1
        finally:
            with self._mover.changed:
                shard.pins -= 1
                self._mover.monitor.notify()

    def _bring_lowest(self, shard: PagedTensor, name: str) -> None:
        """Have a shard in the lowest place, so that the rest is in one piece, and pin it."""
        with self._mover.changed:
            if not shard.held:
                self._on_demand.move_out(shard)
            self._on_demand.fetch(shard, name, fresh=False, lowest=True)
            shard.pins += 1

    def _finish(self, ticket: GatherTicket) -> None:
        """Pin a tensor that has its frames, and wait until all ranks have it. With the lock held."""
        ticket.tensor.pins += 1
        try:
            self._await(ticket)
        except BaseException:
            ticket.tensor.pins -= 1
            raise

    def _await(self, ticket: GatherTicket) -> None:
        self._mover.monitor.wait_until(lambda: ticket.over, ticket.name, ticket.tensor.n_bytes)
        if ticket.outcome is Outcome.REFUSED:
            raise ticket.shortage()
        if ticket.error is not None:
            raise ticket.error
