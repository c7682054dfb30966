"""What tensors are made of: page files, a tensor one tier below, the shards of all ranks. Pure data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.planning.task import Lane, TaskKind

#: The lane of each kind of task. A `DROP` is in the lane of what its frames are wanted for.
LANE_OF: Final[Mapping[TaskKind, Lane]] = {
    TaskKind.LOAD: Lane.SSD_READ,
    TaskKind.STORE: Lane.SSD_WRITE,
    TaskKind.UPLOAD: Lane.H2D,
    TaskKind.DOWNLOAD: Lane.D2H,
    TaskKind.GATHER: Lane.COMM,
    TaskKind.REDUCE_SCATTER: Lane.COMM,
    TaskKind.FILL: Lane.COMM,
    TaskKind.UPDATE: Lane.UPDATE,
}
#: Kinds of tasks that make a tensor of another one.
COPIES: Final = (TaskKind.UPLOAD, TaskKind.GATHER)


@dataclass(frozen=True, slots=True)
class TensorSource:
    """What a tensor is made of, if not of its page files.

    Attributes:
        kind: UPLOAD: a tensor of the device is a copy of one of host memory; GATHER: one is made of the shards of all
            ranks, in the tier where the own shard is.
        tensor: what is read here: the tensor of host memory, or the own shard.
        moved_bytes: over the lane; of a GATHER, those of all ranks.
    """

    kind: TaskKind
    tensor: TensorId
    moved_bytes: int

    def tier_below(self, tier: Tier) -> Tier:
        """Where it lies, if what is made of it is in ``tier``."""
        return Tier.HOST if self.kind is TaskKind.UPLOAD else tier


def chain_of(tensor: TensorId, sources: Mapping[TensorId, TensorSource]) -> Iterator[TensorId]:
    """A tensor, what it is made of, and so on down to what has page files.

    Raises:
        ValueError: it is made of itself.
    """
    seen: set[TensorId] = set()
    found: TensorId | None = tensor
    while found is not None:
        if found in seen:
            raise ValueError(f"tensor {tensor} is made of itself; its source must be another tensor")
        seen.add(found)
        yield found
        source = sources.get(found)
        found = None if source is None else source.tensor
