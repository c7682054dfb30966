"""What the reader knows of each tensor before it reads: where it is, what brings it, when it is used. Pure."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.planning.sources import LANE_OF, chain_of
from scheduler.planning.task import Lane, TaskKind
from scheduler.planning.trace import CHANGES, AccessMode, Conditional
from scheduler.planning.work import Work


@dataclass(slots=True)
class TensorFacts:
    """What does not change of one tensor while a step is read.

    Attributes:
        kind: of the task that brings it: ``moved_bytes`` over ``lane``, in ``move_s``.
        back: kind of the task that brings it down when it has changed, and ``back_s`` its time.
        source: what it is made of; None: its page files.
        copies: what is made of it.
        uses: ops that use it, or that change what it is made of, in order. renewals: those that only do the latter.
    """

    tensor: TensorId
    n_bytes: int
    n_frames: int
    tier: Tier
    kind: TaskKind
    lane: Lane
    moved_bytes: int
    move_s: float
    back: TaskKind
    back_s: float
    source: TensorId | None = None
    copies: list[TensorId] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)
    renewals: set[int] = field(default_factory=set)

    def next_use(self, now: int, n_ops: int) -> float:
        """First op after ``now``, counted over all cycles of ``n_ops`` ops, that uses it as it is now; infinite when
        that is renewed before, or never used."""
        if not self.uses:
            return math.inf
        cycle, index = divmod(now, n_ops)
        place = bisect.bisect_right(self.uses, index)
        cycle, use = (cycle, self.uses[place]) if place < len(self.uses) else (cycle + 1, self.uses[0])
        return math.inf if use in self.renewals else cycle * n_ops + use


def room_of(op: int) -> TensorId:
    """What stands for the room of a conditional op in plans: a tensor of no bytes' content."""
    return TensorId(-1 - op)


def facts_of(work: Work) -> dict[TensorId, TensorFacts]:
    """Of every tensor of a step, rooms included."""
    found = {tensor: _fact(work, tensor) for tensor in work.tiers}
    for copy, source in work.sources.items():
        if copy in found:
            found[source.tensor].copies.append(copy)
    for index, op in enumerate(work.trace.ops):
        used: set[TensorId] = set()
        renewed: set[TensorId] = set()
        for access in op.accesses:
            own = found[access.tensor]
            if access.mode is AccessMode.DISCARD:
                renewed.add(access.tensor)
            else:
                used.add(access.tensor)
            if access.mode in CHANGES:
                renewed.update(_copies_of(access.tensor, found))
                renewed.update(list(chain_of(access.tensor, work.sources))[1:])
            if not own.uses or own.uses[-1] != index:
                own.uses.append(index)
        for tensor in renewed - used:
            facts = found[tensor]
            facts.renewals.add(index)
            if not facts.uses or facts.uses[-1] != index:
                facts.uses.append(index)
        if op.conditional is not None:
            found[room_of(index)] = _room(work, op.conditional, index)
    return found


def _copies_of(tensor: TensorId, facts: dict[TensorId, TensorFacts]) -> list[TensorId]:
    """What is made of a tensor, and of that, and so on."""
    found = list(facts[tensor].copies)
    for copy in found:
        found.extend(facts[copy].copies)
    return found


def _fact(work: Work, tensor: TensorId) -> TensorFacts:
    source, machine, n_bytes = work.sources.get(tensor), work.machine, work.n_bytes[tensor]
    kind, moved_bytes, back = TaskKind.LOAD, n_bytes, TaskKind.STORE
    if source is not None:
        kind, moved_bytes, back = source.kind, source.moved_bytes, TaskKind.DOWNLOAD
    lane = LANE_OF[kind]
    move_s, back_s = machine.seconds(lane, moved_bytes), machine.seconds(LANE_OF[back], n_bytes)
    return TensorFacts(
        tensor, n_bytes, work.frames(tensor), work.tiers[tensor], kind, lane, moved_bytes, move_s, back, back_s,
        source=None if source is None else source.tensor,
    )  # fmt: skip


def _room(work: Work, conditional: Conditional, index: int) -> TensorFacts:
    n_frames = work.room_frames(conditional)
    lane = Lane.H2D if conditional.tier is Tier.DEVICE else Lane.SSD_READ
    return TensorFacts(
        room_of(index), n_frames * work.page_bytes, n_frames, conditional.tier, TaskKind.DROP, lane, 0, 0.0,
        TaskKind.STORE, 0.0, uses=[index],
    )  # fmt: skip
