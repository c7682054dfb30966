"""The plan of a round of updates, followed: what stays, what passes through, what is read early, slices out of turn,
and what happens when a copy fails."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from cross_references import check_mover
from event_log import EventLog
from fake_page_files import TIMEOUT_S, FakePageFiles, GatedPageFiles, ThreadedPageFiles
from torch import Tensor
from training_rig import PAGE_BYTES, pattern

from pagemem.devices.arena import HostArena
from pagemem.errors import StorageError
from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.host_mover import HostMover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.telemetry.events import EventKind
from pagemem.tier import Tag, Tier
from scheduler.execution.round_follower import RoundFollower
from scheduler.planning.machine import Machine
from scheduler.planning.task import Lane
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace
from scheduler.planning.update_round import WINDOWS, RoundUnit, UpdateRound, least_frames

#: Frames below the updater's, which the training thread uses.
SHARED = 4


class Cycle:
    """Slices of some numbers of pages in ``n_frames`` frames; each visit checks and changes what a slice holds.

    Args:
        sizes: pages of each slice; a pair is a slice of two tensors.
    """

    def __init__(self, files: FakePageFiles, sizes: Sequence[int | tuple[int, int]], n_frames: int) -> None:
        self.log = EventLog()
        self.mover = HostMover(HostArena(SHARED + n_frames, PAGE_BYTES), files, self.log)  # type: ignore[arg-type]
        self.slices: list[tuple[PagedTensor, ...]] = []
        for number, size in enumerate(sizes):
            pages = size if isinstance(size, tuple) else (size,)
            self.slices.append(
                tuple(self.mover.create(f"{number}.{k}", Tag.MOMENT, n * PAGE_BYTES) for k, n in enumerate(pages))
            )
        self.first_frame = self.mover.tenants.set_aside(n_frames)
        ops = tuple(
            Op((OpKind.UPDATE, number), f"slice {number}", tuple(Access(t.id, AccessMode.MODIFY) for t in tensors),
               0.0, number, Lane.UPDATE)
            for number, tensors in enumerate(self.slices)
        )  # fmt: skip
        units = tuple(RoundUnit(op.name, TensorId(1000 + n), range(n, n + 1)) for n, op in enumerate(ops))
        n_bytes = {tensor.id: tensor.n_bytes for tensors in self.slices for tensor in tensors}
        updates = UpdateRound(Trace(ops), n_bytes, self.first_frame, n_frames, units)
        self.follower = RoundFollower(self.mover, updates, Machine(PAGE_BYTES, {Tier.HOST: SHARED}, {}))
        self._salts = dict.fromkeys(n_bytes, 0)
        self._salt = 0

    @property
    def streamed(self) -> set[TensorId]:
        """Tensors that the plan has leave."""
        return {task.tensor for task in self.follower.plan.stores}

    def view(self, tensor: PagedTensor) -> Tensor:
        """A tensor's host bytes."""
        assert tensor.frame is not None
        return self.mover.arena.view(tensor.frame, 0, torch.int32, tensor.n_bytes // 4)

    def check(self, tensor: PagedTensor) -> None:
        """It holds what was written last."""
        assert torch.equal(self.view(tensor), pattern(tensor.n_bytes, self._salts[tensor.id])), (
            f"{tensor.name} holds something else"
        )

    def write(self, tensor: PagedTensor) -> None:
        """Put something new into it."""
        self._salt += 1
        self._salts[tensor.id] = self._salt
        self.view(tensor).copy_(pattern(tensor.n_bytes, self._salt))

    def visit(self, number: int, *following: int) -> None:
        """What the updater does with a slice."""
        with self.follower.held(number, following):
            for tensor in self.slices[number]:
                assert tensor.frame is not None and tensor.frame >= self.first_frame and tensor.pins == 1
                self.check(tensor)
                self.write(tensor)

    def go_round(self, times: int) -> None:
        """Visit all slices, with the next two known."""
        count = len(self.slices)
        for _ in range(times):
            for number in range(count):
                self.visit(number, (number + 1) % count, (number + 2) % count)
                check_mover(self.mover)

    def states(self) -> list[str]:
        """Where each slice's first tensor is."""
        return [tensors[0].state.value for tensors in self.slices]


@contextmanager
def streaming(sizes: Sequence[int | tuple[int, int]], n_frames: int) -> Iterator[tuple[Cycle, ThreadedPageFiles]]:
    """A round over page files whose copies are made at once."""
    files = ThreadedPageFiles()
    cycle = Cycle(files, sizes, n_frames)
    try:
        yield cycle, files
    finally:
        cycle.mover.monitor.settle()
        files.close()
        check_mover(cycle.mover)
        cycle.mover.arena.close()


class Gated:
    """A round over page files whose copies wait for the test; the updater's side runs on a thread of its own.

    Args:
        n_tensors: of a page each, in every slice.
    """

    def __init__(self, count: int, n_tensors: int = 1) -> None:
        self.files = GatedPageFiles()
        size = (1, 1) if n_tensors == 2 else 1
        self.cycle = Cycle(self.files, [size] * count, WINDOWS * n_tensors)
        self._updater = ThreadPoolExecutor(1, "updater")
        for number in range(count):
            self.cycle.visit(number)
            for _ in range(n_tensors):
                self.files.take("write").open()

    def begin(self, number: int, *following: int) -> Future[None]:
        """Begin a visit."""
        return self._updater.submit(self.cycle.visit, number, *following)

    def close(self) -> None:
        """Let everything end."""
        self.files.fail_all(StorageError("the test is over"))
        self._updater.shutdown()
        check_mover(self.cycle.mover)
        self.cycle.mover.arena.close()


@pytest.fixture
def five() -> Iterator[Gated]:
    """Five slices that were visited once: the last three are in memory, the others were stored and left."""
    gated = Gated(5)
    try:
        assert gated.cycle.states() == ["stored"] * 2 + ["clean"] * 3
        yield gated
    finally:
        gated.close()


@pytest.fixture
def pairs() -> Iterator[Gated]:
    """Five slices of two tensors, likewise."""
    gated = Gated(5, 2)
    try:
        assert gated.cycle.states() == ["stored"] * 2 + ["clean"] * 3
        yield gated
    finally:
        gated.close()


@pytest.mark.parametrize(
    ("sizes", "frames"), [([], 0), ([2], 2), ([2, 3], 5), ([2, 3, 1], 6), ([2, 3, 1, 4], 10), ([2, 3, 1, 4, 3], 12)]
)
def test_least_frames(sizes: list[int], frames: int) -> None:
    assert least_frames(sizes) == frames


def test_where_all_slices_fit_nothing_is_ever_copied() -> None:
    with streaming([1, 2, (1, 1), 3], 8) as (cycle, files):
        assert not cycle.streamed
        cycle.go_round(3)
        assert files.n_reads == files.n_writes == 0
        assert cycle.states() == ["dirty"] * 4


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_as_many_slices_as_fit_stay_and_the_others_pass_through(kept: int) -> None:
    sizes: list[int | tuple[int, int]] = [2, 1, (1, 1), 2, 1, (1, 1), 2]
    frames = WINDOWS * 2 + sum(sum(s) if isinstance(s, tuple) else s for s in sizes[:kept])
    with streaming(sizes, frames) as (cycle, files):
        # Of small slices there may be room for another one beside the three.
        passing, most = len(cycle.streamed), sum(len(tensors) for tensors in cycle.slices[kept:])
        assert most - 2 <= passing <= most
        cycle.go_round(4)
        cycle.mover.monitor.settle()
        assert files.n_writes == 4 * passing
        # The first time there is nothing to read; at the end two are fetched for a fifth time.
        assert 0 < files.n_reads <= 3 * passing + 2 * 2
        stay = [tensor for tensors in cycle.slices for tensor in tensors if tensor.id not in cycle.streamed]
        assert [tensor.state for tensor in stay] == [Residency.DIRTY] * len(stay)
        assert not cycle.log.of(EventKind.WAIT), "the updater's waits are not the training thread's"


def test_any_order_of_visits_is_served() -> None:
    with streaming([1, (1, 2), 3, 2, 1, 1], 3 * WINDOWS) as (cycle, _):
        for number in [5, 0, 2, 2, 1, 5, 4, 3, 0, 0, 1, 2, 4, 5, 3, 1]:
            cycle.visit(number, (number * 2) % 6, (number + 3) % 6)
            check_mover(cycle.mover)


def test_what_is_visited_out_of_turn_costs_one_read_and_the_plan_goes_on_behind_it() -> None:
    with streaming([1] * 12, WINDOWS) as (cycle, files):
        cycle.go_round(2)
        cycle.mover.monitor.settle()
        before = files.n_reads
        for place, number in enumerate(order := [0, 1, 2, 7, 8, 9, 10, 11, 3, 4, 5, 6]):
            cycle.visit(number, *order[place + 1 : place + 3])
        cycle.mover.monitor.settle()
        assert files.n_reads - before <= 12, "nothing was read twice"


def test_a_slice_without_states_takes_no_frames() -> None:
    with streaming([(), ()], 0) as (cycle, _):  # type: ignore[list-item]
        assert cycle.follower.n_frames == 0
        with cycle.follower.held(0, [1]):
            pass


def test_what_comes_next_is_read_early_and_not_twice(five: Gated) -> None:
    five.cycle.visit(4, 0)
    five.files.take("write").open()
    five.files.take("read").open()
    assert five.files.idle()
    five.cycle.visit(0)
    five.files.take("write").open()


def test_a_visit_waits_for_a_read_that_is_under_way(five: Gated) -> None:
    five.cycle.visit(4, 0)
    five.files.take("write").open()
    read = five.files.take("read")
    visit = five.begin(0)
    assert not visit.done()
    read.open()
    visit.result(TIMEOUT_S)
    five.files.take("write").open()


def test_a_slice_in_use_stays_while_what_is_to_have_its_place_waits(five: Gated) -> None:
    cycle = five.cycle
    with cycle.follower.held(4, [0]):  # a round later the plan has slice 0 where slice 4 still is
        tensor = cycle.slices[4][0]
        assert five.files.idle() and tensor.readable and tensor.pins == 1
        cycle.write(tensor)
    five.files.take("write").open()
    five.files.take("read").open()
    assert cycle.states() == ["clean", "stored", "clean", "clean", "stored"]


@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_a_tensor_that_the_training_thread_moved_elsewhere_comes_back(dirty: bool, kept: bool) -> None:
    with streaming([(1, 1), 1, 2, 1, 2], 6 + (2 if kept else 0)) as (cycle, _):
        cycle.go_round(2)
        cycle.mover.monitor.settle()
        tensor = cycle.slices[0][1]
        if tensor.state is Residency.DIRTY:
            cycle.mover.store_all()
        if tensor.frame is not None:
            cycle.mover.drop(tensor)
        cycle.mover.start_load(tensor, FrameId(1))
        cycle.mover.monitor.settle()
        cycle.check(tensor)
        if dirty:
            cycle.mover.touch(tensor)
            cycle.write(tensor)
        cycle.go_round(2)
        assert cycle.mover.host.owner(FrameId(1)) is None


def test_a_read_that_fails_is_raised_and_can_be_tried_again(five: Gated) -> None:
    visit = five.begin(0)
    five.files.take("read").fail(StorageError("the disk is gone"))
    with pytest.raises(StorageError):
        visit.result(TIMEOUT_S)
    assert five.cycle.states()[0] == "stored"
    with pytest.raises(StorageError, match="the disk is gone"):
        five.cycle.mover.monitor.check()
    again = five.begin(0)
    five.files.take("read").open()
    again.result(TIMEOUT_S)
    five.files.take("write").open()


def test_after_a_failure_that_another_thread_was_told_of_a_visit_goes_on(five: Gated) -> None:
    """What was queued rests until somebody knows of the failure, and nobody else would begin it again."""
    cycle = five.cycle
    with cycle.mover.changed:
        cycle.mover.monitor.note_failure(StorageError("another's"))
        with pytest.raises(StorageError, match="another's"):
            cycle.mover.monitor.check()
    visit = five.begin(1)
    five.files.take("read").open()
    visit.result(TIMEOUT_S)
    five.files.take("write").open()


def test_what_is_taken_away_while_another_one_comes_is_brought_again(pairs: Gated) -> None:
    """As the training thread does with the master of an edited parameter that it places elsewhere."""
    mover, (slow, quick) = pairs.cycle.mover, pairs.cycle.slices[0]
    visit = pairs.begin(0)
    reads = [pairs.files.take("read") for _ in range(2)]
    reads[1].open()
    mover.monitor.wait_until(lambda: quick.state is Residency.CLEAN, quick.name)
    mover.drop(quick)
    reads[0].open()
    pairs.files.take("read").open()
    visit.result(TIMEOUT_S)
    assert slow.state is quick.state is Residency.STORING
    for _ in range(2):
        pairs.files.take("write").open()


def test_a_write_that_fails_is_raised_before_anything_else_is_begun(five: Gated) -> None:
    cycle = five.cycle
    five.begin(4).result(TIMEOUT_S)
    five.files.take("write").fail(OSError(errno.EIO, "the disk is gone"))
    assert cycle.states()[4] == "dirty"
    with pytest.raises(OSError, match="the disk is gone"):
        five.begin(0).result(TIMEOUT_S)
    assert five.files.idle() and cycle.states()[4] == "dirty"
    cycle.check(cycle.slices[4][0])
    visit = five.begin(4)
    visit.result(TIMEOUT_S)
    five.files.take("write").open()
    again = five.begin(0)
    five.files.take("read").open()
    again.result(TIMEOUT_S)
    five.files.take("write").open()
