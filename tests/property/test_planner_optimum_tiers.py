"""What plans over two tiers move against the least possible, found by trying every eviction, on small random steps."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np

from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.lookahead.planner import plan_work
from scheduler.planning.machine import Machine
from scheduler.planning.sources import TensorSource
from scheduler.planning.task import Lane, TaskKind
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace
from scheduler.planning.work import Work

PAGE_BYTES = 1 << 16
N_TRACES = 60
UNITS = 3
#: Tensors: units in host memory, their copies on the device, and one that is saved and brought back.
SAVED = 2 * UNITS
#: What is in host memory and whether it is dirty, and which copies the device has.
State = tuple[tuple[tuple[int, bool], ...], tuple[int, ...]]
READ, MODIFY, CREATE, CONSUME = AccessMode.READ, AccessMode.MODIFY, AccessMode.CREATE, AccessMode.CONSUME


def random_work(rng: random.Random) -> Work:
    """Up to eight ops on up to three units of one page, some with a tensor that goes down and comes up again; fewer
    frames than would hold all. Lanes take no time, so that the planner weighs nothing but what is moved."""
    accesses: list[Access] = []
    for _ in range(rng.randint(3, 6)):
        unit = TensorId(rng.randrange(UNITS))
        use = rng.choice([Access(TensorId(unit + UNITS), READ, Tier.DEVICE)] * 3 + [Access(unit, MODIFY)])
        accesses.append(use)
    if rng.random() < 0.5:
        down, up = sorted(rng.sample(range(len(accesses) + 1), 2))
        accesses.insert(up, Access(TensorId(SAVED), CONSUME, Tier.HOST, TaskKind.UPLOAD))
        accesses.insert(down, Access(TensorId(SAVED), CREATE, Tier.HOST, TaskKind.DOWNLOAD))
    ops = tuple(Op((OpKind.FORWARD, i), f"op {i}", (use,), 1.0, i) for i, use in enumerate(accesses))
    frames = {Tier.HOST: rng.randint(1, 3), Tier.DEVICE: rng.randint(1, 2)}
    machine = Machine(PAGE_BYTES, frames, dict.fromkeys(Lane, 1e15))
    sources = {
        TensorId(unit + UNITS): TensorSource(TaskKind.UPLOAD, TensorId(unit), PAGE_BYTES) for unit in range(UNITS)
    }
    n_bytes = dict.fromkeys(map(TensorId, range(2 * UNITS + 1)), PAGE_BYTES)
    return Work.of(Trace(ops), n_bytes, machine, None, sources)


def with_in_host(
    host: dict[int, bool], tensor: int, n_frames: int, *, fresh: bool
) -> Iterator[tuple[dict[int, bool], int]]:
    """Every way to have a tensor in host memory, and the pages that it moves."""
    if tensor in host:
        yield dict(host), 0
        return
    for leaving in itertools.combinations(host, max(0, len(host) + 1 - n_frames)):
        kept = {other: dirty for other, dirty in host.items() if other not in leaving}
        yield {**kept, tensor: False}, sum(host[other] for other in leaving) + (not fresh)


def after_op(access: Access, state: State, frames: dict[Tier, int]) -> Iterator[tuple[State, int]]:
    """Every state in which an op can end, and the pages moved for it."""
    host, device = dict(state[0]), set(state[1])
    tensor = int(access.tensor)
    if access.tier is Tier.DEVICE:
        if tensor in device:
            yield state, 0
            return
        for there, moved in with_in_host(host, tensor - UNITS, frames[Tier.HOST], fresh=False):
            for leaving in itertools.combinations(device, max(0, len(device) + 1 - frames[Tier.DEVICE])):
                yield (tuple(sorted(there.items())), tuple(sorted({*device, tensor} - set(leaving)))), moved + 1
        return
    for there, moved in with_in_host(host, tensor, frames[Tier.HOST], fresh=access.mode is CREATE):
        if access.mode is CONSUME:
            del there[tensor]
        else:
            there[tensor] = True
        held = device - {tensor + UNITS} if access.mode is MODIFY else device
        yield (tuple(sorted(there.items())), tuple(sorted(held))), moved + (access.via is not None)


def after_step(work: Work, start: State) -> dict[State, int]:
    """Every state in which a step can end, and the fewest pages moved on the way."""
    front: dict[State, int] = {start: 0}
    for op in work.trace.ops:
        following: dict[State, int] = {}
        for state, moved in front.items():
            for end, more in after_op(op.accesses[0], state, dict(work.machine.n_frames)):
                following[end] = min(moved + more, following.get(end, moved + more))
        front = following
    return front


def fewest_pages(work: Work) -> float:
    """Pages moved in a step at best and in the long run: the least mean cycle (Karp, 1978) over all states."""
    begin: State = ((), ())
    ends: dict[State, dict[State, int]] = {}
    unseen = [begin]
    while unseen:
        state = unseen.pop()
        if state not in ends:
            ends[state] = after_step(work, state)
            unseen += ends[state]
    number = {state: index for index, state in enumerate(ends)}
    n = len(number)
    cost = np.full((n, n), np.inf)
    for state, following in ends.items():
        for end, moved in following.items():
            cost[number[state], number[end]] = moved
    walks = np.full((n + 1, n), np.inf)
    walks[0, number[begin]] = 0
    for steps in range(n):
        walks[steps + 1] = (walks[steps][:, None] + cost).min(axis=0)
    means = [
        max((walks[n, end] - walks[k, end]) / (n - k) for k in range(n) if np.isfinite(walks[k, end]))
        for end in range(n)
        if np.isfinite(walks[n, end])
    ]
    return float(min(means))


def test_moves_over_all_lanes_are_near_the_fewest_possible() -> None:
    rng = random.Random(1)
    works = [random_work(rng) for _ in range(N_TRACES)]
    fewest = [fewest_pages(work) for work in works]
    plans = [plan_work(work) for work in works]
    planned = [sum(plan.lane_bytes.values()) / PAGE_BYTES / plan.n_steps for plan in plans]
    missed = [(ours, best) for ours, best in zip(planned, fewest, strict=True) if ours < best - 1e-9]
    assert not missed, "the search missed something"
    assert sum(planned) <= 1.1 * sum(fewest), f"{sum(planned) / sum(fewest):.3f}"
