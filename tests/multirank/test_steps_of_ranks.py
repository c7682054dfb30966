"""Steps of several ranks, each with its own driver, memory and page files: gathers and sums over all ranks are tasks of
the one plan, which is the same on all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from fake_ranks import Meeting
from rank_rigs import PAGE_BYTES, RankRig, cut, on_ranks, right

from pagemem.errors import BudgetError, RankError, StorageError
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag, Tier
from scheduler import knobs
from scheduler.execution.plan_follower import Mode
from scheduler.planning.plan import Plan
from scheduler.planning.task import Task, TaskKind

#: Three units forward and backward; each one's gradient is summed over all ranks, and updates the own shard.
STEP = (
    "Pr", "Qr", "Rr",
    "Rr Wc", "Wx Is", "u: Cw Ix Zw",
    "Qr Vc", "Vx Hs", "u: Bw Hx Yw",
    "Pr Uc", "Ux Gs", "u: Aw Gx Xw",
)  # fmt: skip
ABOVE = tuple(" ".join(word.lower() if word[0] in "PQR" else word for word in op.split()) for op in STEP)


@pytest.fixture(autouse=True, scope="module")
def quick_plans() -> Iterator[None]:
    """One plan, not the best of several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs, "KEPT_SHARES", ())
        yield


def planned(step: tuple[str, ...]) -> Callable[[RankRig], Plan]:
    """Trace a step, plan it, follow it; every read of an op is checked by the rig."""

    def body(r: RankRig) -> Plan:
        follower, memories = r.driver.follower, r.driver.memories
        for _ in range(4):
            r.step(*step)
        before_bytes = memories.on_demand_bytes
        for memory in memories.all:
            memory.mover.tenants.reset_touched()
        for _ in range(4):
            r.step(*step)
        assert (follower.mode, follower.planned_steps, follower.deviations) == (Mode.PLANNED, 7, 0)
        assert memories.on_demand_bytes == before_bytes, "the plan brings all"
        plan = follower.plan
        assert plan is not None
        for memory in memories.all:
            assert memory.mover.tenants.touched_frames <= plan.peaks[memory.tier] <= memory.mover.arena.n_frames
        r.read_all()
        return plan

    return body


def of_kind(plan: Plan, kind: TaskKind) -> list[Task]:
    return [task for task in (*plan.tasks, *plan.carried) if task.kind is kind]


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_planned_steps_of_host_memory(n_ranks: int) -> None:
    first, *others = right(on_ranks(n_ranks, planned(STEP), n_frames=9))
    assert isinstance(first, Plan) and all(other == first for other in others)
    gathers = of_kind(first, TaskKind.GATHER)
    assert len({task.tensor for task in gathers}) == 3
    assert len(of_kind(first, TaskKind.REDUCE_SCATTER)) == 3 * first.n_steps
    assert any(task.trigger < task.needed_at for task in gathers), "gathers begin ahead of their ops"
    assert of_kind(first, TaskKind.LOAD) and of_kind(first, TaskKind.STORE), "beside moves of the disk"


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_planned_steps_over_devices(n_ranks: int) -> None:
    first, *others = right(on_ranks(n_ranks, planned(ABOVE), n_frames=9, device_frames=5))
    assert isinstance(first, Plan) and all(other == first for other in others)
    gathers = of_kind(first, TaskKind.GATHER)
    assert {task.tier for task in gathers} == {Tier.DEVICE} and of_kind(first, TaskKind.UPLOAD)
    assert any(task.trigger < task.needed_at for task in gathers)


def test_where_all_is_there_it_is_gathered_once_after_each_change() -> None:
    meeting = Meeting(2)

    def body(r: RankRig) -> int:
        for _ in range(5):
            r.step(*STEP)
        before = sum(what == "gather" for _, what in meeting.log)
        for _ in range(3):
            r.step(*STEP)
        return sum(what == "gather" for _, what in meeting.log) - before

    # Rank 0 writes the log; gathers for its next step may be in it.
    assert right(on_ranks(2, body, n_frames=30, meeting=meeting))[0] in range(7, 12)


@pytest.mark.parametrize("what", ["gather", "reduce", "exchange", "agree"])
@pytest.mark.parametrize("step", [ABOVE, STEP], ids=["device", "host"])
def test_a_collective_that_fails_ends_the_steps_of_all_ranks(what: str, step: tuple[str, ...]) -> None:
    meeting, counts = Meeting(3), {1: 0}

    def broken(rank: int, called: str) -> None:
        if (rank, called) == (1, what):
            counts[1] += 1
            if counts[1] == 7:
                raise OSError("the cable is cut")

    def body(r: RankRig) -> None:
        for _ in range(20):
            r.step(*step)

    meeting.broken = broken
    found = on_ranks(3, body, n_frames=9, meeting=meeting, **({"device_frames": 5} if step is ABOVE else {}))
    assert all(isinstance(error, RankError | OSError) for error in found), found
    assert isinstance(found[0], RankError) and isinstance(found[2], RankError)


def test_a_rank_whose_disk_fails_ends_the_steps_of_all_ranks() -> None:
    def body(r: RankRig) -> None:
        for number in range(20):
            if number == 5 and r.rank == 1:
                r.files.content.clear()
            r.step(*STEP)

    found = on_ranks(2, body, n_frames=7)
    assert isinstance(found[1], KeyError | StorageError | AssertionError), found
    assert isinstance(found[0], RankError), found


def test_a_rank_that_makes_other_ops_is_told_of() -> None:
    def body(r: RankRig) -> None:
        for number in range(4):
            r.step(*STEP[:3], *(["Xr"] if number == 3 and r.rank else []))

    found = on_ranks(2, body, n_frames=9)
    assert all(isinstance(error, RankError) for error in found)
    assert any("rank 1 made 4 ops in this step, and rank 0 3" in str(error) for error in found)


def test_views_that_only_one_rank_has_leave_plans_equal() -> None:
    def body(r: RankRig) -> list[int]:
        for _ in range(3):
            view = None
            for op in STEP:
                r.op(op)
                if r.rank == 1 and op == "u: Bw Hx Yw":
                    view = r.lease("Y")
            del view  # after the last op, so that the end of the step is what tells
            r.driver.end_step(repeatable=True)
        r.step(*STEP)
        return [op.until for op in r.driver.follower.trace.ops]

    first, *others = right(on_ranks(3, body, n_frames=12))
    assert first == list(range(len(STEP))) and all(other == first for other in others), "as rank 0 has them"


def test_where_the_tensors_of_an_op_are_in_each_others_way_all_ranks_place_them_anew() -> None:
    def body(r: RankRig) -> None:
        for op in ("Xr", "Pr", "Yr" if r.rank else "Zr", "Qr", "Pr Qr"):  # five pages, of which a shard is one
            r.op(op)

    right(on_ranks(2, body, n_frames=5))


def test_where_one_rank_has_no_room_all_ranks_say_so() -> None:
    def body(r: RankRig) -> None:
        r.op("Xr")
        view = r.lease("X") if r.rank else None
        try:
            r.op("Pr Qr")
        finally:
            del view

    found = on_ranks(2, body, n_frames=5)
    assert all(isinstance(error, BudgetError) for error in found), found


def test_only_shards_are_changed() -> None:
    def body(r: RankRig) -> str:
        with pytest.raises(AssertionError, match="P is gathered and cannot be changed; change A"):
            r.op("Pw")
        with pytest.raises(ValueError, match="make it"):
            r.mover.gathered.add(r.mover.create("S", Tag.PARAM, PAGE_BYTES), "S", Tag.PARAM, cut(9 * 1024, 2, 0))
        r.tensors["P"].pins = 0
        return "said"

    assert right(on_ranks(2, body, n_frames=9)) == ["said"] * 2


def test_what_is_gathered_in_host_memory_is_not_copied_up() -> None:
    def body(r: RankRig) -> None:
        assert r.device is not None
        shard = r.tensors["A"]
        whole = r.mover.gathered.add(shard, "another", Tag.PARAM, r.layouts["A"])
        with pytest.raises(ValueError, match="copy its shard up and gather on the device"):
            r.device.mirror(whole)

    right(on_ranks(2, body, n_frames=9, device_frames=5))


def test_a_shard_that_changes_while_it_is_gathered_on_a_device_leaves_nothing_old() -> None:
    meeting, outdated = Meeting(2), threading.Event()

    def held_up(rank: int, called: str) -> None:
        if (rank, called) == (1, "exchange"):  # it has voted, and reads the shard
            assert outdated.wait(60)

    def body(r: RankRig) -> None:
        assert r.device is not None
        whole, shard, wholes = r.tensors["p"], r.tensors["a"], r.device.gathered
        r.op("ar")
        with r.device.changed:
            window = r.device.tenants.choose(whole.n_frames, len)
            assert window is not None and not window.tenants
            ticket = wholes.using = wholes.ticket(whole, planned=True)
            r.device.start_load(whole, window.first)
        while not (shard.uploads or ticket.over):  # nobody is told of a vote; rank 1 may come when rank 0 has gone on
            time.sleep(0.001)
        outdate = wholes.outdate

        def tell(tensor: PagedTensor) -> None:
            outdate(tensor)
            if not r.rank:
                outdated.set()

        wholes.outdate = tell  # type: ignore[method-assign]
        r.op("u: Aw")  # the copy on the device is renewed, once nobody reads it any more
        assert not wholes.is_whole(whole)
        r.op("pr")

    meeting.broken = held_up
    right(on_ranks(2, body, n_frames=9, meeting=meeting, device_frames=5))


def test_updates_beside_compute_and_ranks_are_refused_together() -> None:
    def body(r: RankRig) -> None:
        with pytest.raises(ValueError, match="update.worker: false"):
            r.driver.memories.add_worker(1)

    right(on_ranks(2, body, n_frames=9))
