"""Chooses the blocks that are recomputed because that costs less than paging what they save. Decided once, early in a
run.

    UNDECIDED --(cheaper by plan)--> TRIED --(the plan of such steps is cheaper, or is not: taken back)--> DECIDED
        \\-----(nothing is cheaper)----------------------------------------------------------------------> DECIDED

With a limit on saved tensors, those of the earliest blocks go to pages, and what that costs depends on the rest of the
step: nothing but copies where RAM has room, a wait where the disk is the bottleneck. So steps in which the first
quarter, half, three quarters or all of these blocks are recomputed are planned as well, from the times of the step as
it is, and the cheapest is tried.

Source: Angel-PTM (VLDB 2023), unified scheduling; the trade after T. Chen et al., arXiv:1604.06174, 2016.
"""

from __future__ import annotations

from typing import Final

from offload import knobs
from offload.activations.blocks import Block, Blocks
from pagemem.units import ceil_div
from scheduler.execution.driver import Driver
from scheduler.lookahead.planner import cost_s
from scheduler.planning.recomputation import ForwardPart, pages, recomputed
from scheduler.planning.trace import Trace

#: The first pass after a change is still sized by what the one before it has saved.
_UNSETTLED_STEPS: Final = 1


class RecomputeChoice:
    """Decides for one engine. Training thread only.

    Args:
        driver: has the trace and the plan of steps.
        limit_bytes: of saved tensors that stay.

    Attributes:
        open: something is left to decide. tried: recomputing some blocks was found cheaper.
    """

    def __init__(self, blocks: Blocks, driver: Driver, limit_bytes: int) -> None:
        self.blocks = blocks
        self.open, self.tried = True, False
        self._driver = driver
        self._limit_bytes = limit_bytes
        self._cost_before_s = 0.0

    def step_ended(self) -> None:
        """Between two steps: decide, once there is a plan made with the times of steps that followed one."""
        self.blocks.step_ended()
        if self.open and self._driver.follower.durations.complete:
            self.decide()

    def decide(self) -> bool:
        """Decide by the plan that there is, between two steps.

        Returns:
            Whether the next steps have other ops than those until now.
        """
        plan, trace = self._driver.follower.plan, self._driver.follower.trace
        assert plan is not None
        if self.tried:
            self.open = self.blocks.watching = False
            return cost_s(plan) > self._cost_before_s and self._recompute([])
        self._cost_before_s = cost_s(plan)
        chosen = self._cheapest(trace)
        self.tried = self.open = self.blocks.watching = bool(chosen)
        return self.tried and self._recompute(chosen)

    def _cheapest(self, trace: Trace) -> list[Block]:
        """The blocks to recompute so that a step costs least; none where the gain is too small."""
        eligible = [block for block in self.blocks if self._may_be_recomputed(block, trace)]
        chosen: list[Block] = []
        if not eligible or not self._holds(eligible[:1]):
            return chosen
        least_s = (1 - knobs.LEAST_RECOMPUTE_GAIN) * self._cost_s(trace, [])
        shares = knobs.RECOMPUTE_SHARES
        for n_blocks in dict.fromkeys(ceil_div(len(eligible) * share, shares) for share in range(1, shares + 1)):
            first = eligible[:n_blocks]
            if not self._holds(first):
                break
            found_s = self._cost_s(trace, first)
            if found_s < least_s:
                least_s, chosen = found_s, first
        return chosen

    def _may_be_recomputed(self, block: Block, trace: Trace) -> bool:
        parts = _parts(block)
        n_ops = len(trace.ops)
        return (
            bool(parts)
            and not block.has_side_effects
            and all(part.ops.stop <= n_ops and pages(trace, part) for part in parts)
        )

    def _holds(self, blocks: list[Block]) -> bool:
        """Whether the limit has room for what the blocks read and for all that one of them saves, while that is
        recomputed."""
        read_bytes = sum(max(call.input_bytes for call in block.past) for block in blocks)
        return read_bytes + max(call.saved_bytes for block in blocks for call in block.past) <= self._limit_bytes

    def _cost_s(self, trace: Trace, blocks: list[Block]) -> float:
        planner = self._driver.planner
        with self._driver.memories.locked():
            parts = [part for block in blocks for part in _parts(block)]
            return planner.cost_s(recomputed(trace, parts, planner.n_bytes(trace)))

    def _recompute(self, chosen: list[Block]) -> bool:
        for block in self.blocks:
            block.recomputes = block in chosen
        self._driver.invalidate_plan(_UNSETTLED_STEPS)
        return True


def _parts(block: Block) -> list[ForwardPart]:
    return [ForwardPart(call.ops, call.input_bytes) for call in block.past]
