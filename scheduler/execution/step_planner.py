"""Making plans for the memory as it is: all tiers, their frames and tensors, and the bandwidths. Moves nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pagemem.errors import BudgetError
from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tier
from scheduler import knobs
from scheduler.execution.agreement import RankAgreement
from scheduler.execution.round_follower import RoundFollower
from scheduler.lookahead.planner import cost_s, plan_work
from scheduler.planning.bounds import check_work
from scheduler.planning.machine import Machine
from scheduler.planning.plan import Plan
from scheduler.planning.sources import TensorSource, chain_of
from scheduler.planning.task import Lane, TaskKind
from scheduler.planning.trace import Trace, TraceRecorder
from scheduler.planning.update_round import UpdateRound
from scheduler.planning.work import Work

#: Bandwidths from what is below a tier, and to it, in bytes/s.
Bandwidth = Callable[[], tuple[float, float]]
#: The lanes that fill a tier, and empty it.
_LANES: Mapping[Tier, tuple[Lane, Lane]] = {
    Tier.HOST: (Lane.SSD_READ, Lane.SSD_WRITE),
    Tier.DEVICE: (Lane.H2D, Lane.D2H),
}


class StepPlanner:
    """Makes plans for all tiers. Training thread only, with the movers' locks held.

    Args:
        mover: owner of residency in host memory.
        bandwidth: of the page files, asked for whenever a plan is made.

    Attributes:
        updates: follows the plan of updates that another thread makes beside the steps; None: there are none.
        ranks: with which all plans are to be equal; None: there are no others.
    """

    def __init__(self, mover: Mover, bandwidth: Bandwidth) -> None:
        self.ranks: RankAgreement | None = None
        self._movers: list[tuple[Mover, Bandwidth]] = [(mover, bandwidth)]
        self.updates: RoundFollower | None = None

    def add(self, mover: DeviceMover, bandwidth: Bandwidth) -> None:
        """Plan for a device, too, whose tensors are copied up from host memory."""
        self._movers.append((mover, bandwidth))

    def follow_updates(self, updates: UpdateRound) -> RoundFollower:
        """Have updates beside the steps be in the plan; returns what brings their tensors. Once, before the first op.

        Raises:
            BudgetError: one of them does not fit in the memory that the round has.
        """
        self.updates = RoundFollower(self._movers[0][0], updates, self.machine())
        return self.updates

    def machine(self, share: float | None = None) -> Machine:
        """The tiers and lanes, with a share of the bandwidths; None: with as much as a plan relies on."""
        share = knobs.RELIABLE_SHARE if share is None else share
        agreed = {} if self.ranks is None else self.ranks.bytes_per_s
        bytes_per_s = {lane: share * speed for lane, speed in (agreed or self.speeds()).items()}
        frames = {mover.tier: mover.tenants.n_shared_frames for mover, _ in self._movers}
        return Machine(self._movers[0][0].arena.page_bytes, frames, bytes_per_s)

    def speeds(self) -> dict[Lane, float]:
        """Bandwidths of this rank's lanes."""
        found = {
            lane: speed
            for mover, bandwidth in self._movers
            for lane, speed in zip(_LANES[mover.tier], bandwidth(), strict=True)
        }
        if self.ranks is not None:
            found[Lane.COMM] = self.ranks.comm_bytes_per_s or knobs.ASSUMED_COMM_BYTES_PER_S
        return found

    def agree(self, recorder: TraceRecorder, plan: Plan | None, *, differs: bool, timed: bool) -> bool:
        """As `RankAgreement.end_step`, if there are other ranks; returns whether the step is not as the plan has it."""
        if self.ranks is None or not recorder.ops:
            return differs
        return self.ranks.end_step(recorder, plan, self.speeds(), differs=differs, timed=timed)

    def tensor(self, tensor: TensorId) -> PagedTensor:
        """A tensor of any tier."""
        return next(mover.tensors[tensor] for mover, _ in self._movers if tensor in mover.tensors)

    def tiers(self) -> dict[TensorId, Tier]:
        """Of every tensor."""
        return {tensor: mover.tier for mover, _ in self._movers for tensor in mover.tensors}

    def n_bytes(self, trace: Trace) -> dict[TensorId, int]:
        """Sizes of what a step uses."""
        return {tensor: self.tensor(tensor).n_bytes for tensor in trace.tensors()}

    def work(self, trace: Trace, share: float | None = None) -> Work:
        """A step to be planned, or simulated; with a share of the bandwidths as for `machine`.

        Raises:
            ValueError: it cannot be planned at all, see `Work`.
        """
        resident = self.resident()
        used = dict.fromkeys([*trace.tensors(), *resident])
        sources = self.sources(used)
        tensors = dict.fromkeys(link for tensor in used for link in chain_of(tensor, sources))
        n_bytes = {tensor: self.tensor(tensor).n_bytes for tensor in tensors}
        tiers = self.tiers()
        work = Work.of(
            trace, n_bytes, self.machine(share), resident, sources, {tensor: tiers[tensor] for tensor in resident}
        )
        return work if self.updates is None else replace(work, updates=self.updates.beside(trace))

    def sources(self, tensors: Sequence[TensorId] | Mapping[TensorId, object]) -> dict[TensorId, TensorSource]:
        """What the tensors are made of that are copies of others, and what those are, and so on. One that is
        device-resident is none."""
        known: dict[TensorId, TensorSource] = {}
        for mover, _ in self._movers:
            for whole, shard, moved_bytes in mover.gathered.sources():
                known[whole.id] = TensorSource(TaskKind.GATHER, shard.id, moved_bytes)
        for mover, _ in self._movers[1:]:
            assert isinstance(mover, DeviceMover)
            for copy, lower in mover.pairs():
                if not copy.resident:
                    known[copy.id] = TensorSource(TaskKind.UPLOAD, lower.id, copy.n_bytes)
        return {link: known[link] for tensor in tensors for link in chain_of(tensor, known) if link in known}

    def plan(self, trace: Trace, *, fast: bool = False) -> Plan:
        """The plan for a step, checked.

        Args:
            fast: the first one that is found, not the best of several.

        Raises:
            BudgetError: there is none: the tensors of one op do not fit together.
            PlanError: it does not hold, which is a defect.
        """
        work = replace(self.work(trace), updates=None)
        plan = plan_work(work, fast=fast)
        check_work(plan, work)
        if self.updates is not None:
            plan = replace(plan, updates=self.updates.plan)  # Checked when it was made.
        return plan

    def cost_s(self, trace: Trace) -> float:
        """What a step would cost by a plan, roughly; infinite where there is none. Only to be compared with other
        steps'."""
        try:
            return cost_s(plan_work(replace(self.work(trace), updates=None), fast=True))
        except BudgetError:
            return math.inf

    def resident(self) -> dict[TensorId, FrameId]:
        """What is in a tier for good, and its first frames."""
        tensors = (tensor for mover, _ in self._movers for tensor in mover.tensors.values())
        return {t.id: t.frame for t in tensors if t.resident and t.frame is not None}
