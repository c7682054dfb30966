"""Phase 2 of the schedule: where sharded tensors are all-gathered, and how early. Pure.

Each of some ranks has a *shard* of every sharded tensor, an equal part, in its pages; phase 1 moves shards. An op needs
the *unsharded* tensor: an all-gather makes it, in frames of its own. It is a copy: dropped when its frames are wanted,
gathered once more for its next use, out of date once its shards are updated. That is what copies on a device are to
host pages, so the same reader plans them, at the pace of the link and in the memory that phase 1 does not have. How
much that is to be, it finds by trying: what the neediest op takes, and multiples of it, in which gathers run ahead of
their ops; phase 1 has less then to keep what it saves moves by. The quickest by prediction is taken.

Ranks that gather in different orders wait for each other for ever. A plan depends on its arguments alone: ranks that
are given the same step, sizes and figures have the same plan. The engine is one process so far, which has nothing to
gather.

Source: Angel-PTM (VLDB 2023), unified scheduling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from pagemem.errors import BudgetError
from pagemem.frames.page import FrameId, TensorId
from pagemem.units import ceil_div
from scheduler.planning.bounds import check_bounds
from scheduler.planning.lookahead import TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.planner import cost_s, make_plan
from scheduler.planning.trace import ENDS, Access, AccessMode, Op, Trace

#: Rooms for unsharded tensors that are tried, in multiples of what the neediest op takes; beside them, room for all.
ROOMS: Final = (1, 2, 3, 4, 6)


@dataclass(frozen=True, slots=True)
class Link:
    """What joins the ranks.

    Attributes:
        n_ranks: that shards are spread over, >= 2.
        bytes_per_s: that each rank receives in an all-gather, > 0.
    """

    n_ranks: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        if self.n_ranks < 2 or not self.bytes_per_s > 0:
            raise ValueError(
                f"{self.n_ranks} ranks at {self.bytes_per_s} bytes/s; there must be two or more ranks, and some "
                "bandwidth"
            )

    @property
    def unsharded_bytes_per_s(self) -> float:
        """Unsharded bytes gathered in a second: a rank receives all but its own shard."""
        return self.bytes_per_s * self.n_ranks / (self.n_ranks - 1)


@dataclass(frozen=True, slots=True)
class ShardedPlan:
    """One rank's plan of a step, in two parts with one numbering of ops.

    Attributes:
        shards: phase 1, in the frames below ``first_frame``: loads and stores of shards and everything else that is not
            gathered.
        gathers: phase 2: its loads are all-gathers; frames are counted from ``first_frame`` on.
    """

    shards: Plan
    gathers: Plan
    first_frame: int

    @property
    def step_s(self) -> float:
        """Seconds of one step, predicted: what it computes and the waits for either part."""
        return self.shards.step_s + self.gathers.step_s - self.gathers.compute_s


def plan_sharded(
    trace: Trace, shards: Mapping[TensorId, TensorId], n_bytes: Mapping[TensorId, int], tier: TierSpec, link: Link
) -> ShardedPlan:
    """Plan one rank's step: the moves of its shards, and the gathers of unsharded tensors.

    Args:
        trace: ops read unsharded tensors, and read or change shards and any other tensors.
        shards: the shard of each unsharded tensor.
        n_bytes: of unsharded tensors, shards and all other tensors.
        tier: of one rank; its bandwidths are of page files.

    Returns:
        The plan, both parts checked; together they need no more frames than there are.

    Raises:
        BudgetError: the unsharded tensors of one op and the shards of another do not fit together.
        ValueError: an unsharded tensor is changed: updates change shards.
    """
    below, above = shard_trace(trace, shards), gather_trace(trace, shards)
    found: list[ShardedPlan] = []
    short: BudgetError | None = None
    for room in _rooms(above, n_bytes, tier.page_bytes):
        try:
            found.append(_with_room(below, above, n_bytes, tier, link, room))
        except BudgetError as error:
            short = short or error
    if not found:
        assert short is not None
        raise short
    return min(found, key=lambda plan: plan.step_s + cost_s(plan.shards) - plan.shards.step_s)


def gather_trace(trace: Trace, shards: Mapping[TensorId, TensorId]) -> Trace:
    """The step as unsharded tensors see it: an op that changes a shard makes the tensor gathered from it out of date.

    Raises:
        ValueError: an op changes an unsharded tensor.
    """
    unsharded = {shard: tensor for tensor, shard in shards.items()}

    def seen(op: Op) -> Iterator[Access]:
        for access in op.accesses:
            if access.tensor in shards:
                if access.mode is not AccessMode.READ:
                    raise ValueError(
                        f"{op.name}: an unsharded tensor is only read, updates change its shards; it is to "
                        f"{access.mode.value} {access.tensor}"
                    )
                yield access
            elif access.tensor in unsharded and access.mode is not AccessMode.READ:
                yield Access(unsharded[access.tensor], AccessMode.RENEW)

    return Trace(tuple(replace(op, accesses=tuple(seen(op))) for op in trace.ops))


def shard_trace(trace: Trace, shards: Mapping[TensorId, TensorId]) -> Trace:
    """The step as shards see it: an op that reads an unsharded tensor reads its shard, which is free again when the
    gather is done."""
    made = []
    for index, op in enumerate(trace.ops):
        accesses = [Access(shards.get(access.tensor, access.tensor), access.mode) for access in op.accesses]
        only_unsharded = all(access.tensor in shards for access in op.accesses)
        made.append(replace(op, accesses=tuple(dict.fromkeys(accesses)), until=index if only_unsharded else op.until))
    return Trace(tuple(made))


def _rooms(above: Trace, n_bytes: Mapping[TensorId, int], page_bytes: int) -> list[int]:
    """Numbers of frames for unsharded tensors that are worth trying, the least first."""

    def frames(tensor: TensorId) -> int:
        return ceil_div(n_bytes[tensor], page_bytes)

    least = max((sum(frames(a.tensor) for a in op.accesses if a.mode not in ENDS) for op in above.ops), default=0)
    every = sum(frames(tensor) for tensor in above.tensors())
    return sorted({min(multiple * least, every) for multiple in ROOMS} | {every})


def _with_room(
    below: Trace, above: Trace, n_bytes: Mapping[TensorId, int], tier: TierSpec, link: Link, room: int
) -> ShardedPlan:
    """The plan with at least so many frames for unsharded tensors; they get what phase 1 leaves beside."""
    if room > tier.n_frames:
        need_bytes = room * tier.page_bytes
        raise BudgetError(
            f"the unsharded tensors of one op need {need_bytes} bytes of pages at once, the budget holds "
            f"{tier.n_frames * tier.page_bytes}; raise memory.ram",
            need_bytes,
        )
    first = replace(tier, n_frames=tier.n_frames - room)
    shards = make_plan(below, n_bytes, first)
    check_bounds(shards, below, n_bytes, first)
    placed = [*shards.initial.items(), *((load.tensor, load.frame) for load in shards.loads)]
    first_frame = max((frame + ceil_div(n_bytes[tensor], tier.page_bytes) for tensor, frame in placed), default=0)
    rate = link.unsharded_bytes_per_s
    left = TierSpec(tier.n_frames - first_frame, tier.page_bytes, rate, rate)
    gathers = make_plan(above, n_bytes, left, single_step_cycle=True)
    check_bounds(gathers, above, n_bytes, left)
    return ShardedPlan(shards, gathers, FrameId(first_frame))
