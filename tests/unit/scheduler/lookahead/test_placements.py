"""What a plan has where amid its cycle, and when tensors are used next."""

from __future__ import annotations

import random

import pytest

from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.lookahead.next_uses import NEVER, NextUses
from scheduler.lookahead.placements import loads_to_enter
from scheduler.lookahead.planner import make_plan
from scheduler.planning.bounds import Replay
from scheduler.planning.machine import TierSpec
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace
from scheduler.planning.work import Work

MODES = {"r": AccessMode.READ, "w": AccessMode.MODIFY, "c": AccessMode.CREATE, "x": AccessMode.CONSUME}


def trace(*ops: str) -> Trace:
    """Ops as ``"Ar Bw"``; A is tensor 0."""
    return Trace(
        tuple(
            Op(
                (OpKind.FORWARD, (index, text)),
                text,
                tuple(Access(TensorId(ord(word[0]) - ord("A")), MODES[word[1]]) for word in text.split()),
                duration_s=1e-3,
                until=index,
            )
            for index, text in enumerate(ops)
        )
    )


def test_the_next_use_is_looked_for_in_a_cycle() -> None:
    uses = NextUses(trace("Ar", "Br", "Ac", "Ax"))
    a, b, c = TensorId(0), TensorId(1), TensorId(2)
    assert [uses.next(a, at) for at in range(4)] == [
        (0, AccessMode.READ),
        (1, AccessMode.CREATE),
        (0, AccessMode.CREATE),
        (0, AccessMode.CONSUME),
    ]
    assert [uses.distance(a, at) for at in range(5)] == [0, NEVER, NEVER, 0, 0], "what is there before c is not wanted"
    assert [uses.distance(b, at) for at in (0, 1, 2, 6)] == [1, 0, 3, 3]
    assert uses.next(c, 0) is None and uses.distance(c, 0) == NEVER


@pytest.mark.parametrize("seed", range(12))
def test_entering_a_plan_at_any_op_puts_everything_where_following_it_does(seed: int) -> None:
    """A replay of the plan knows what is where when each op begins; so must the loads that enter there."""
    chosen = random.Random(seed)
    ops = [
        " ".join(f"{letter}{chosen.choice('rrw')}" for letter in chosen.sample("ABCDEFG", chosen.choice((1, 2))))
        for _ in range(10)
    ]
    step = trace(*ops)
    n_bytes = {tensor: 4096 * (1 + tensor % 2) for tensor in step.tensors()}
    tier = TierSpec(5, 4096, 1e8, 1e8)
    plan = make_plan(step, n_bytes, tier)
    uses, tiers = NextUses(step), dict.fromkeys(n_bytes, Tier.HOST)
    entered_at: list[int] = []

    class Walk(Replay):
        def _perform(self, op: Op, position: int, until: int) -> None:
            super()._perform(op, position, until)
            following = position + 1
            if following < len(plan.keys):
                loads = loads_to_enter(plan, uses, n_bytes, tier.page_bytes, following, tiers)[Tier.HOST]
                assert {task.tensor: task.frame for task in loads} == self.where, f"at op {following}"
                entered_at.append(following)

    Walk(Work.of(step, n_bytes, tier), plan).cycle()
    assert entered_at == list(range(1, len(plan.keys)))
