"""What all ranks have in common, so that they plan and follow alike: agreed upon at the end of a step. Training thread
only, with no lock held: other ranks may be waiting for a vote of this one's comm lane, which needs the movers'."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from pagemem.errors import RankError
from pagemem.ranks.comm_lane import CommLane
from scheduler.planning.plan import Plan
from scheduler.planning.task import Lane
from scheduler.planning.trace import TraceRecorder


class RankAgreement:
    """Of one driver with those of the other ranks.

    Args:
        lane: connects them.

    Attributes:
        bytes_per_s: of lanes, as rank 0 had them when the ranks agreed last.
        link_bytes_per_s: of the comm lane, where that is known beforehand.
    """

    def __init__(self, lane: CommLane) -> None:
        self.lane = lane
        self.bytes_per_s: dict[Lane, float] = {}
        self.link_bytes_per_s: float | None = None
        self._digested: Plan | None = None
        self._digest = 0

    @property
    def comm_bytes_per_s(self) -> float | None:
        """Of the comm lane, as known or so far; None: it has not moved anything."""
        if self.link_bytes_per_s is not None:
            return self.link_bytes_per_s
        return self.lane.moved_bytes / self.lane.busy_s if self.lane.busy_s else None

    def end_step(
        self, recorder: TraceRecorder, plan: Plan | None, speeds: dict[Lane, float], *, differs: bool, timed: bool
    ) -> bool:
        """A step has ended: give its ops the times, and lanes the bandwidths, that rank 0 has.

        Args:
            recorder: the ops. plan: that was followed, if one was. speeds: of this rank's lanes.
            differs: whether the step was not as the plan has it. timed: whether the ops' times are wanted.

        Returns:
            Whether it was not on any rank.

        Raises:
            RankError: the ranks have performed other ops, or follow other plans; the message says which rank.
        """
        performed = recorder.performed
        ops = zlib.crc32(repr(performed).encode())
        said = [float(differs), float(len(performed)), float(ops), float(self._digest_of(plan))]
        found = self.lane.collectives.agree(said)
        for rank, other in enumerate(found):
            if list(other[1:3]) != list(found[0][1:3]):
                raise RankError(
                    f"rank {rank} made {other[1]:.0f} ops in this step, and rank 0 {found[0][1]:.0f}, which are not "
                    f"the same; this is rank {self.lane.collectives.rank}, with {performed[-1:]} as its last one"
                )
            if other[3] != found[0][3]:
                raise RankError(f"ranks {rank} and 0 follow different plans; give all ranks the same sizes and budgets")
        differs = any(other[0] for other in found)
        recorder.resolve_times(timed=timed, assumed=not differs)
        self._take(recorder, speeds)
        return differs

    def _take(self, recorder: TraceRecorder, speeds: dict[Lane, float]) -> None:
        ops = recorder.ops
        times = [op.duration_s for op in ops]
        first: Sequence[float] = self.lane.collectives.agree(
            [*speeds.values(), *times, *(float(op.until) for op in ops)]
        )[0]
        self.bytes_per_s = dict(zip(speeds, first, strict=False))
        for op, seconds, until in zip(ops, first[len(speeds) :], first[len(speeds) + len(ops) :], strict=False):
            op.duration_s, op.until = seconds, int(until)

    def _digest_of(self, plan: Plan | None) -> int:
        if plan is None:
            return 0
        if plan is not self._digested:
            self._digested, self._digest = plan, zlib.crc32(repr((plan.initial, plan.tasks)).encode())
        return self._digest
