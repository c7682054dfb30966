"""The planner's moves against the fewest possible, found by trying every eviction, on small random steps that
repeat."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from pagemem.knobs import MANY_TENANTS
from scheduler.lookahead.planner import make_plan
from scheduler.planning.machine import TierSpec
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace

PAGE_BYTES = 1 << 16
N_TRACES = 200
#: Reads cost no time, so that the planner weighs nothing but what is moved.
FAST = 1e15

#: Tensors in host memory, in order, and whether each has changed since it was stored.
State = tuple[tuple[int, bool], ...]


def random_trace(rng: random.Random) -> tuple[Trace, int]:
    """A step of up to nine ops on up to six tensors of one page, and fewer frames than would hold all."""
    n_tensors = rng.randint(3, 6)
    ops = []
    for index in range(rng.randint(4, 9)):
        chosen = rng.sample(range(n_tensors), rng.choice([1, 1, 2]))
        accesses = tuple(Access(tensor, rng.choice([AccessMode.READ, AccessMode.MODIFY])) for tensor in chosen)
        ops.append(Op((OpKind.FORWARD, index), f"op {index}", accesses, 1.0, index))
    trace = Trace(tuple(ops))
    least = max(len(op.accesses) for op in ops)
    return trace, rng.randint(least, max(least, len(trace.tensors()) - 1))


def after_step(trace: Trace, n_frames: int, start: State) -> dict[State, int]:
    """Every state in which a step from ``start`` can end, and the fewest pages moved on the way."""
    front: dict[State, int] = {start: 0}
    for op in trace.ops:
        needed = {access.tensor for access in op.accesses}
        following: dict[State, int] = {}
        for state, moved in front.items():
            held = dict(state)
            missing = len(needed - held.keys())
            for leaving in itertools.combinations(held.keys() - needed, max(0, len(held) + missing - n_frames)):
                kept = {tensor: dirty for tensor, dirty in held.items() if tensor not in leaving}
                for access in op.accesses:
                    kept[access.tensor] = kept.get(access.tensor, False) or access.mode is AccessMode.MODIFY
                end = tuple(sorted(kept.items()))
                cost = moved + missing + sum(held[tensor] for tensor in leaving)
                following[end] = min(cost, following.get(end, cost))
        front = following
    return front


def fewest_pages(trace: Trace, n_frames: int) -> float:
    """Pages moved in a step on average, at best and in the long run: the least mean cycle (Karp, 1978) over all
    states."""
    ends: dict[State, dict[State, int]] = {}
    unseen: list[State] = [()]
    while unseen:
        state = unseen.pop()
        if state not in ends:
            ends[state] = after_step(trace, n_frames, state)
            unseen += ends[state]
    number = {state: index for index, state in enumerate(ends)}
    n = len(number)
    cost = np.full((n, n), np.inf)
    for state, following in ends.items():
        for end, moved in following.items():
            cost[number[state], number[end]] = moved
    walks = np.full((n + 1, n), np.inf)
    walks[0, number[()]] = 0
    for steps in range(n):
        walks[steps + 1] = (walks[steps][:, None] + cost).min(axis=0)
    means = [
        max((walks[n, end] - walks[k, end]) / (n - k) for k in range(n) if np.isfinite(walks[k, end]))
        for end in range(n)
        if np.isfinite(walks[n, end])
    ]
    return float(min(means))


def planned_pages(trace: Trace, n_frames: int) -> float:
    """Pages that the plan moves in a step, its share of restoring a placement included."""
    plan = make_plan(trace, dict.fromkeys(trace.tensors(), PAGE_BYTES), TierSpec(n_frames, PAGE_BYTES, FAST, FAST))
    return plan.moved_bytes / PAGE_BYTES


def test_the_search_finds_what_is_known() -> None:
    """Three tensors that change in turn, two frames: one stays, the others are read and written."""
    ops = tuple(Op((OpKind.FORWARD, k), f"op {k}", (Access(k, AccessMode.MODIFY),), 1.0, k) for k in range(3))
    assert fewest_pages(Trace(ops), 3) == 0
    assert fewest_pages(Trace(ops), 2) == 3, "1.5 reads a step, as each eviction frees one frame, and as many writes"
    assert fewest_pages(Trace(ops), 1) == 6


@pytest.mark.parametrize(("seed", "many_tenants"), [(1, MANY_TENANTS), (2, MANY_TENANTS), (1, 0)])
def test_moves_are_near_the_fewest_possible(seed: int, many_tenants: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagemem.knobs.MANY_TENANTS", many_tenants)
    rng = random.Random(seed)
    cases = [random_trace(rng) for _ in range(N_TRACES)]
    fewest = [fewest_pages(*case) for case in cases]
    planned = [planned_pages(*case) for case in cases]
    assert all(ours >= best - 1e-9 for ours, best in zip(planned, fewest, strict=True)), "the search missed something"
    assert sum(planned) <= 1.05 * sum(fewest), f"{sum(planned) / sum(fewest):.3f}"
