"""Plans of a rank whose tensors are sharded: moves of shards and gathers of unsharded tensors, in one memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.units import ceil_div
from scheduler.planning.bounds import Replay, check_bounds
from scheduler.planning.gathers import Link, ShardedPlan, gather_trace, plan_sharded, shard_trace
from scheduler.planning.lookahead import TierSpec
from scheduler.planning.planner import make_plan
from scheduler.planning.simulator import simulate
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace

PAGE_BYTES = 1 << 16
Work = tuple[Trace, dict[TensorId, TensorId], dict[TensorId, int]]


def training_step(sizes: list[int], n_ranks: int, op_s: float = 1.0, *, clipped: bool = False) -> Work:
    """Forward and backward over layers of so many pages, each updated after its backward or, clipped, before its
    forward."""
    n_layers = len(sizes)
    shards = {TensorId(whole): TensorId(n_layers + whole) for whole in range(n_layers)}
    n_bytes = {TensorId(whole): pages * PAGE_BYTES for whole, pages in enumerate(sizes)}
    n_bytes |= {shard: ceil_div(n_bytes[whole], n_ranks) for whole, shard in shards.items()}
    states = {shard: TensorId(2 * n_layers + whole) for whole, shard in shards.items()}
    n_bytes |= {state: 2 * n_bytes[shard] for shard, state in states.items()}
    steps: list[tuple[OpKind, str, list[Access]]] = []

    def update(layer: int) -> None:
        shard = shards[TensorId(layer)]
        steps.append(
            (
                OpKind.UPDATE,
                f"update {layer}",
                [Access(shard, AccessMode.MODIFY), Access(states[shard], AccessMode.MODIFY)],
            )
        )

    for layer in range(n_layers):
        if clipped:
            update(layer)
        steps.append((OpKind.FORWARD, f"forward {layer}", [Access(TensorId(layer), AccessMode.READ)]))
    for layer in reversed(range(n_layers)):
        steps.append((OpKind.BACKWARD, f"backward {layer}", [Access(TensorId(layer), AccessMode.READ)]))
        if not clipped:
            update(layer)
    ops = [Op((kind, name), name, tuple(accesses), op_s, index) for index, (kind, name, accesses) in enumerate(steps)]
    return Trace(tuple(ops)), shards, n_bytes


def unsharded_pages(plan: ShardedPlan, n_bytes: dict[TensorId, int]) -> float:
    """Unsharded pages gathered in a step."""
    return sum(n_bytes[load.tensor] for load in plan.gathers.loads) / PAGE_BYTES / plan.gathers.n_steps


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.integers(2, 8),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from([0.2, 5.0, 500.0]),
)
def test_both_parts_fit_and_hold(
    sizes: list[int], n_ranks: int, n_frames: int, clipped: bool, pages_per_s: float
) -> None:
    trace, shards, n_bytes = training_step(sizes, n_ranks, clipped=clipped)
    machine = TierSpec(n_frames, PAGE_BYTES, 2.0 * PAGE_BYTES, 2.0 * PAGE_BYTES)
    try:
        plan = plan_sharded(trace, shards, n_bytes, machine, Link(n_ranks, pages_per_s * PAGE_BYTES))
    except BudgetError as error:
        least = max(sizes) + max(
            ceil_div(2 * n_bytes[s], PAGE_BYTES) + ceil_div(n_bytes[s], PAGE_BYTES) for s in shards.values()
        )
        assert n_frames < least and error.smallest_bytes > 0
        return
    below, above = shard_trace(trace, shards), gather_trace(trace, shards)
    first, second = replace(machine, n_frames=plan.first_frame), replace(machine, n_frames=n_frames - plan.first_frame)
    check_bounds(replace(plan.shards, n_frames=plan.first_frame), below, n_bytes, first)
    report = check_bounds(plan.gathers, above, n_bytes, second)
    assert report.written_bytes == 0 and not plan.gathers.stores, "an unsharded tensor is a copy"
    assert plan.shards.keys[: len(trace.ops)] == plan.gathers.keys == trace.keys
    assert plan.step_s >= trace.compute_s - 1e-9


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(2, 8))
def test_ranks_with_the_same_figures_gather_in_the_same_order(sizes: list[int], n_ranks: int) -> None:
    machine, link = TierSpec(30, PAGE_BYTES, 1e9, 1e9), Link(n_ranks, 1e9)
    plans = [plan_sharded(*training_step(sizes, n_ranks), machine, link) for _ in range(2)]
    assert plans[0].gathers.loads == plans[1].gathers.loads and plans[0] == plans[1]


def test_gathers_run_ahead_in_the_memory_that_is_left() -> None:
    """A layer is gathered while the one before it computes; with room for one alone each is waited for."""
    trace, shards, n_bytes = training_step([2] * 6, 2)
    link = Link(2, 2.0 * PAGE_BYTES)  # a page a second received, two of an unsharded tensor gathered: half an op each

    def planned(n_frames: int) -> ShardedPlan:
        return plan_sharded(trace, shards, n_bytes, TierSpec(n_frames, PAGE_BYTES, 1e12, 1e12), link)

    tight, roomy = planned(2 + 3), planned(60)
    waits_s = [plan.gathers.step_s - plan.gathers.compute_s for plan in (tight, roomy)]
    assert waits_s[0] > 4 * waits_s[1], "six layers, of which each but the last is gathered twice"
    assert unsharded_pages(tight, n_bytes) == 2 * 11 and unsharded_pages(roomy, n_bytes) == 2 * 6, (
        "with room for all, once after each update"
    )
    machine = TierSpec(60 - roomy.first_frame, PAGE_BYTES, link.unsharded_bytes_per_s, link.unsharded_bytes_per_s)
    simulated = simulate(roomy.gathers, gather_trace(trace, shards), n_bytes, machine)
    assert simulated.step_s == pytest.approx(roomy.gathers.step_s)


def test_an_unsharded_tensor_is_gathered_after_its_update_and_not_before() -> None:
    trace, shards, n_bytes = training_step([1] * 4, 4, clipped=True)
    plan = plan_sharded(trace, shards, n_bytes, TierSpec(40, PAGE_BYTES, 1e12, 1e12), Link(4, 1e12))
    updated_at = {op.name: index for index, op in enumerate(trace.ops) if op.kind is OpKind.UPDATE}
    for load in plan.gathers.loads:
        assert load.trigger > updated_at[f"update {load.tensor}"] and load.needed_at == load.trigger


def test_memory_goes_to_whichever_part_it_saves_more_for() -> None:
    """A slow disk and a fast link: unsharded tensors have the least room; a fast disk and a slow link: shards."""
    trace, shards, n_bytes = training_step([4] * 8, 4)
    slow, fast = 1.0 * PAGE_BYTES, 1e12
    rooms = {}
    for name, disk, link in (("disk", slow, fast), ("link", fast, slow)):
        plan = plan_sharded(trace, shards, n_bytes, TierSpec(32, PAGE_BYTES, disk, disk), Link(4, link))
        rooms[name] = 32 - plan.first_frame
    assert rooms["disk"] < rooms["link"]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(2, 4))
def test_an_op_that_reads_an_unsharded_tensor_reads_its_shard(sizes: list[int], n_ranks: int) -> None:
    """And what is not unsharded stays as it is; with room for all of it the plan of that holds."""
    trace, shards, n_bytes = training_step(sizes, n_ranks)
    below = shard_trace(trace, shards)
    machine = TierSpec(sum(ceil_div(n, PAGE_BYTES) for n in n_bytes.values()), PAGE_BYTES, 1e9, 1e9)
    Replay(below, make_plan(below, n_bytes, machine), n_bytes, PAGE_BYTES).cycle()
    assert [len(op.accesses) for op in below.ops] == [len(op.accesses) for op in trace.ops]
    assert not any(access.tensor in shards for op in below.ops for access in op.accesses)


def test_what_cannot_be_is_refused() -> None:
    trace, shards, n_bytes = training_step([3, 1], 2)
    with pytest.raises(BudgetError, match="need .* bytes of") as caught:
        plan_sharded(trace, shards, n_bytes, TierSpec(2, PAGE_BYTES, 1e9, 1e9), Link(2, 1e9))
    assert caught.value.smallest_bytes == 3 * PAGE_BYTES
    changed = Trace((Op((OpKind.FORWARD, 0), "edit", (Access(TensorId(0), AccessMode.MODIFY),)),))
    with pytest.raises(ValueError, match="edit: an unsharded tensor is only read"):
        gather_trace(changed, shards)
    for n_ranks, bytes_per_s in ((1, 1e9), (2, 0.0), (2, float("nan"))):
        with pytest.raises(ValueError, match="two or more ranks"):
            Link(n_ranks, bytes_per_s)
