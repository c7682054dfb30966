"""What a plan is made of: movements and other work, each on a lane. Pure data.

A *lane* is an ordered queue that does one thing at a time: compute itself, a direction of the disk or of the link to a
device, the network, the worker that makes updates. A *task* is one entry of such a queue.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier

#: ``needed_at`` of a task for whose end no op waits, and ``frame`` of one that takes no frames.
NO_OP: Final = -1
NO_FRAME: Final = FrameId(-1)


class TaskKind(enum.Enum):
    """What a task does to a tensor.

    LOAD and STORE: page files and host memory. UPLOAD and DOWNLOAD: host memory and a device. GATHER: makes a tensor of
    the shards of all ranks; REDUCE_SCATTER: the own shard of the sum of all ranks' tensors; FILL: the parts of the
    other ranks, in a tensor of which every rank has its own. UPDATE: a worker changes it beside compute. DROP: its
    frames are emptied, for something that is known at run time only.
    """

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    LOAD = "load"
    STORE = "store"
    UPLOAD = "upload"
    DOWNLOAD = "download"
    GATHER = "gather"
    REDUCE_SCATTER = "reduce_scatter"
    FILL = "fill"
    UPDATE = "update"
    DROP = "drop"


#: Kinds that take the frames of their window from whoever has them, once that may leave.
ARRIVALS: Final = frozenset({TaskKind.LOAD, TaskKind.UPLOAD, TaskKind.GATHER, TaskKind.DROP})


class Lane(enum.Enum):
    """What can be busy."""

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    COMPUTE = "compute"
    SSD_READ = "ssd_read"
    SSD_WRITE = "ssd_write"
    H2D = "h2d"
    D2H = "d2h"
    COMM = "comm"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work of a plan.

    Attributes:
        kind: what is done.
        tensor: to what.
        tier: where its content is after.
        lane: who does it.
        n_bytes: of the tensor. A ``fresh`` task moves none of them.
        trigger: the op of the cycle that lets it start: when it begins or, ``behind`` it, when it is over.
        frame: the first frame in ``tier`` that the content comes to; `NO_FRAME` where it comes to none: to page files,
            or to memory that is not paged.
        needed_at: the op that waits for its end; `NO_OP` where none does. It may lie in the next cycle (``>=
            len(keys)``): the reader runs ahead of the step's end.
        fresh: only the frames are wanted, not the content.
        after: other tasks that have to be over before, by their places in the plan.
    """

    kind: TaskKind
    tensor: TensorId
    tier: Tier
    lane: Lane
    n_bytes: int
    trigger: int
    frame: FrameId = NO_FRAME
    needed_at: int = NO_OP
    fresh: bool = False
    behind: bool = False
    after: tuple[int, ...] = ()


def load_task(
    tensor: TensorId, n_bytes: int, frame: FrameId, trigger: int, needed_at: int, *, fresh: bool = False
) -> Task:
    """Bring a tensor of ``n_bytes`` bytes from the page files into the host frames from ``frame`` on, in time for op
    ``needed_at``."""
    return Task(
        TaskKind.LOAD, tensor, Tier.HOST, Lane.SSD_READ, n_bytes, trigger, frame=frame, needed_at=needed_at, fresh=fresh
    )


def store_task(tensor: TensorId, n_bytes: int, trigger: int) -> Task:
    """Copy a tensor of ``n_bytes`` bytes to the page files once op ``trigger`` begins: it has changed for the last time
    before it must leave."""
    return Task(TaskKind.STORE, tensor, Tier.SSD, Lane.SSD_WRITE, n_bytes, trigger)
