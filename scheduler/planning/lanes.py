"""When ops and moves begin and end, given bandwidths: three lanes, compute, ssd_read, ssd_write. Pure.

Each serves in order: ops in the order of the trace, loads and stores in the order of the plan. So the order of events
never depends on how long one takes, and each begins at the latest of what it waits for:

    op       the op before has ended; its loads have; the copies out of what it changes have
    load     the op that triggers it has been reached; the load before has its window; every tenant of its own has been
             stored; then ssd_read is free
    store    the op that triggers it has been reached; ssd_write is free

A load of frames alone (`fresh`) needs its window and no lane. Times are whole nanoseconds, rounded up.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from pagemem.frames.page import TensorId
from scheduler.planning.lookahead import TierSpec
from scheduler.planning.task import Lane
from scheduler.planning.trace import AccessMode, Op

NS: Final = 1_000_000_000


#: The lanes that are followed here.
LANES: Final = (Lane.COMPUTE, Lane.SSD_READ, Lane.SSD_WRITE)


@dataclass(frozen=True, slots=True)
class SimulatedWait:
    """An op that began later than the one before it ended.

    Attributes:
        op: its index in the cycle.
        tensor: what it waited for.
        lane: the lane that made it late: ``ssd_write`` also where a load waited for frames to be stored first.
    """

    op: int
    name: str
    seconds: float
    tensor: TensorId
    lane: Lane


@dataclass(slots=True)
class Times:
    """A tensor's times. ``by`` is the lane that made ``ready_ns`` as late as it is."""

    ready_ns: int = 0
    by: Lane = Lane.SSD_READ
    stored_ns: int = 0


def _ceil_ns(seconds: float) -> int:
    return math.ceil(round(seconds * NS, 3))  # Without what binary fractions add to decimal ones.


@dataclass(slots=True)
class SimulatedLanes:
    """The three lanes and the clock of the training thread, told of each move and op of a replay.

    Attributes:
        window_ns: when the last load's window was free; ``window_by`` is the lane that made it so late.
        waits: of the ops since the list was last replaced.
    """

    n_bytes: Mapping[TensorId, int]
    tier: TierSpec
    times: dict[TensorId, Times] = field(default_factory=lambda: defaultdict(Times))
    free_ns: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(LANES, 0))
    busy_ns: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(LANES, 0))
    now_ns: int = 0
    window_ns: int = 0
    window_by: Lane = Lane.SSD_READ
    waits: list[SimulatedWait] = field(default_factory=list)

    def serve(self, lane: Lane, tensor: TensorId, from_ns: int) -> int:
        """Move a tensor over a lane, at ``from_ns`` or once the lane is free; returns when that is over."""
        bytes_per_s = self.tier.read_bytes_per_s if lane is Lane.SSD_READ else self.tier.write_bytes_per_s
        takes_ns = _ceil_ns(self.n_bytes[tensor] / bytes_per_s)
        self.free_ns[lane] = max(self.free_ns[lane], from_ns) + takes_ns
        self.busy_ns[lane] += takes_ns
        return self.free_ns[lane]

    def store(self, tensor: TensorId) -> None:
        """A changed tensor is copied out."""
        self.times[tensor].stored_ns = self.serve(Lane.SSD_WRITE, tensor, self.now_ns)

    def leave(self, tenants: Collection[TensorId]) -> None:
        """Tenants leave the window of the next load."""
        # The loads before the next one have their windows already: the lane starts them in order.
        if self.now_ns >= self.window_ns:
            self.window_ns, self.window_by = self.now_ns, Lane.SSD_READ
        for tenant in sorted(tenants):
            if self.times[tenant].stored_ns > self.window_ns:
                self.window_ns, self.window_by = self.times[tenant].stored_ns, Lane.SSD_WRITE

    def load(self, tensor: TensorId, *, fresh: bool) -> None:
        """A tensor comes into the window that was left."""
        times = self.times[tensor]
        times.ready_ns, times.by = self.window_ns, self.window_by
        if not fresh:
            if self.free_ns[Lane.SSD_READ] > self.window_ns:
                times.by = Lane.SSD_READ
            times.ready_ns = self.serve(Lane.SSD_READ, tensor, self.window_ns)

    def perform(self, op: Op, position: int) -> None:
        """An op of the cycle waits for its tensors and runs."""
        begin_ns, cause, by = self.now_ns, None, Lane.COMPUTE
        for access in op.accesses:
            times = self.times[access.tensor]
            moves = [(times.ready_ns, times.by)]
            if access.mode is not AccessMode.READ:
                moves.append((times.stored_ns, Lane.SSD_WRITE))
            for ready_ns, lane in moves:
                if ready_ns > begin_ns:
                    begin_ns, cause, by = ready_ns, access.tensor, lane
        if cause is not None:
            self.waits.append(SimulatedWait(position, op.name, (begin_ns - self.now_ns) / NS, cause, by))
        takes_ns = _ceil_ns(op.duration_s)
        self.busy_ns[Lane.COMPUTE] += takes_ns
        self.now_ns = begin_ns + takes_ns
