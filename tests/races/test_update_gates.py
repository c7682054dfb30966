"""Updates that a worker makes: nobody sees what they change before, nothing that they need leaves, and what cannot go
on by itself is made by whoever waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from gated_mover import Gates, opened

from pagemem.errors import StorageError
from pagemem.frames.page import FrameId
from pagemem.residency.paged_tensor import PagedTensor, Residency
from scheduler.planning.task import load_task
from scheduler.planning.trace import Access, AccessMode
from scheduler.tiers.memories import Memories
from scheduler.tiers.update_lane import UpdateLane

R = Residency


class Updates:
    """A lane of updates over a gated mover; each update adds one to its tensors, once the test lets it."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self.memories = Memories(gates.mover, lambda: None)
        self.lane: UpdateLane = self.memories.add_worker(1)
        self.let, self.under_way = threading.Event(), threading.Event()
        self.lane._hold = self._wait
        self.told: list[str] = []

    def _wait(self, _: str) -> None:
        self.under_way.set()
        assert self.let.wait(30)

    def submit(self, *tensors: PagedTensor, fails: BaseException | None = None) -> bool:
        def work() -> None:
            if fails is not None:
                raise fails
            for tensor in tensors:
                self.gates.view(tensor).add_(1)

        accesses = [Access(tensor.id, AccessMode.MODIFY) for tensor in tensors]
        names = ", ".join(tensor.name for tensor in tensors)
        return self.lane.submit(names, accesses, work, lambda: None, lambda _: self.told.append(names))

    def load(self, tensor: PagedTensor, frame: int) -> None:
        """What the plan triggers."""
        self.memories.host.lane.submit([load_task(tensor.id, tensor.n_bytes, FrameId(frame), 0, 1)])

    def reads(self, tensor: PagedTensor) -> Callable[[], int]:
        """Have the training thread use a tensor in an op; returns what waits for that, and tells what it saw."""

        def use() -> int:
            with self.gates.mover.changed:
                held = self.memories.host.pinner.pin("op", [Access(tensor.id, AccessMode.READ)])
            value = int(self.gates.view(tensor)[0])
            self.memories.unpin(held)
            return value

        future = self.gates.training.submit(use)
        return lambda: future.result(30)


@pytest.fixture
def updates() -> Iterator[Updates]:
    with opened() as gates:
        made = Updates(gates)
        try:
            yield made
        finally:
            made.let.set()
            made.lane.close()


def test_whoever_uses_a_tensor_waits_for_its_update_alone(updates: Updates) -> None:
    first, second, other = (updates.gates.dirty(0, frame, name) for frame, name in enumerate(("a", "b", "c")))
    assert updates.submit(first) and updates.submit(second)
    assert updates.under_way.wait(30)
    assert updates.reads(other)() == 0
    assert not first.readable and not second.readable and other.readable
    reading = updates.reads(first)
    updates.let.set()
    assert reading() == 1
    updates.lane.finish()
    assert updates.gates.holds(second, 1) and updates.told == ["a", "b"]
    assert first.readable and not first.updates


def test_what_a_plan_stores_meanwhile_is_stored_once_it_is_updated(updates: Updates) -> None:
    tensor = updates.gates.dirty(0, name="a")
    assert updates.submit(tensor)
    assert updates.under_way.wait(30)
    tensor.to_store = tensor.updates > 0
    assert updates.gates.files.idle()
    updates.let.set()
    updates.lane.finish()
    updates.gates.files.take("write").open()
    assert tensor.state is R.CLEAN and updates.gates.holds(tensor, 1)


def test_an_update_waits_for_what_a_load_brings_and_keeps_it_from_later_loads(updates: Updates) -> None:
    tensor, later = updates.gates.stored(0, "a"), updates.gates.stored(5, "later")
    updates.load(tensor, 0)
    assert updates.submit(tensor)
    updates.load(later, 0)
    assert not updates.under_way.is_set()
    updates.gates.files.take("read").open()
    assert updates.under_way.wait(30)
    assert later.frame is None and tensor.frame == 0
    updates.let.set()
    updates.lane.finish()
    assert tensor.ssd_valid is False
    updates.gates.files.take("write").open()  # it leaves for the load behind it, changed
    updates.gates.files.take("read").open()
    assert later.frame == 0 and tensor.state is R.STORED


def test_what_a_load_before_it_moves_is_moved_first(updates: Updates) -> None:
    tensor, states = updates.gates.stored(0, "a"), updates.gates.stored(0, "states")
    updates.gates.mover.start_load(tensor, FrameId(0))
    updates.gates.files.take("read").open()
    updates.load(tensor, 1)  # out of the way of its states
    updates.load(states, 0)
    assert updates.submit(tensor, states)
    updates.gates.files.take("read").open()
    updates.gates.files.take("read").open()
    updates.let.set()
    updates.lane.finish()
    assert (tensor.frame, states.frame) == (1, 0) and updates.gates.holds(states, 1)
    assert not updates.lane.made_here


def test_what_nothing_brings_is_not_taken(updates: Updates) -> None:
    assert not updates.submit(updates.gates.stored(0, "a"))
    assert not updates.lane.busy


def test_whoever_waits_for_an_update_that_cannot_go_on_makes_it(updates: Updates) -> None:
    tensor = updates.gates.stored(0, "a")
    updates.load(tensor, 0)
    updates.let.set()
    assert updates.submit(tensor)
    updates.gates.files.take("read").fail(StorageError("a sector is gone"))
    with pytest.raises(StorageError, match="a sector is gone"):
        updates.lane.finish()
    assert tensor.updates == 1, "it is still to be made"
    finishing = updates.gates.training.submit(updates.lane.finish)
    updates.gates.files.take("read").open()
    finishing.result(30)
    assert updates.lane.made_here == 1 and updates.gates.holds(tensor, 1) and not tensor.updates


def test_the_error_of_an_update_is_the_training_threads(updates: Updates) -> None:
    tensor = updates.gates.dirty(0, name="a")
    updates.let.set()
    assert updates.submit(tensor, fails=ArithmeticError("no"))
    with pytest.raises(ArithmeticError, match="no"):
        updates.lane.finish()
        updates.gates.mover.monitor.check()
    assert not tensor.updates


def test_closing_waits_for_the_update_under_way_and_gives_up_those_behind_it(updates: Updates) -> None:
    first, second = (updates.gates.dirty(0, frame, name) for frame, name in enumerate("ab"))
    assert updates.submit(first) and updates.submit(second)
    assert updates.under_way.wait(30)
    closing = updates.gates.training.submit(updates.lane.close)
    while second.updates:
        pass
    updates.let.set()
    closing.result(30)
    assert updates.gates.holds(first, 1) and updates.gates.holds(second, 0)
    assert not updates.lane._thread.is_alive() and updates.told == ["a"]
    updates.lane.close()
    assert not updates.submit(first), "who is closed takes nothing"


def test_what_waits_to_be_moved_is_no_obstacle_for_whoever_makes_an_update(updates: Updates) -> None:
    """One tensor failed to come; another one is to give way to what is behind that in the lane."""
    states, tensor = updates.gates.stored(0, "states"), updates.gates.dirty(0, 0, "a")
    updates.let.set()
    updates.load(states, 1)
    updates.load(tensor, 2)
    assert updates.submit(tensor, states)
    updates.gates.files.take("read").fail(StorageError("a sector is gone"))
    with pytest.raises(StorageError, match="a sector is gone"):
        updates.lane.finish()
    finishing = updates.gates.training.submit(updates.lane.finish)
    while not updates.lane._taking_over:
        assert not finishing.done()
    for kind in ("write", "read", "read"):  # the one that moves, and the other one
        updates.gates.files.take(kind).open()
    finishing.result(30)
    assert tensor.frame == 2 and updates.gates.holds(states, 1) and not tensor.updates


def test_a_load_behind_an_update_is_no_obstacle_for_whoever_makes_it(updates: Updates) -> None:
    """A disk error has cost an update its states; its other tensor is to move, once it is made, behind a load that
    waits for it."""
    tensor, states, later = updates.gates.dirty(0, 1, "a"), *map(updates.gates.stored, (0, 5), ("states", "later"))
    updates.let.set()
    updates.load(states, 0)
    assert updates.submit(tensor, states)
    updates.load(later, 1)
    updates.load(tensor, 2)
    updates.gates.files.take("read").fail(StorageError("a sector is gone"))
    with pytest.raises(StorageError, match="a sector is gone"):
        updates.lane.finish()
    finishing = updates.gates.training.submit(updates.lane.finish)
    updates.gates.files.take("read").open()
    finishing.result(10)
    assert updates.lane.made_here == 1 and updates.gates.holds(states, 1) and not tensor.updates


def test_what_telling_of_an_update_raises_costs_no_other_one_its_telling(updates: Updates) -> None:
    """As Ctrl-C does: gradients' room would never be given back."""
    tensors = [updates.gates.dirty(0, frame, name) for frame, name in enumerate("ab")]

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert updates.submit(tensors[0])
    updates.lane.when_done(interrupted)
    updates.lane.when_done(lambda: updates.told.append("after it"))
    assert updates.submit(tensors[1])
    updates.let.set()
    with pytest.raises(KeyboardInterrupt):
        updates.lane.finish()
    updates.lane.finish()
    assert updates.told == ["a", "after it", "b"]


def test_loads_go_on_for_whoever_waits_again_once_an_error_is_told_of(updates: Updates) -> None:
    first, second = updates.gates.stored(0, "first"), updates.gates.stored(0, "second")
    updates.let.set()
    updates.load(first, 0)
    assert updates.submit(first)
    updates.load(second, 0)  # in the place of the other one, once that is updated
    assert updates.submit(second)
    updates.gates.files.take("read").open()
    updates.lane.finish(first)
    updates.gates.files.take("write").fail(StorageError("a sector is gone"))
    with pytest.raises(StorageError, match="a sector is gone"):
        updates.lane.finish()
    finishing = updates.gates.training.submit(updates.lane.finish)
    for kind in ("write", "read"):
        updates.gates.files.take(kind).open()
    finishing.result(10)
    assert second.frame == 0 and updates.gates.holds(second, 1) and not second.updates


def test_a_load_that_waits_for_an_update_does_not_bring_what_it_lacks(updates: Updates) -> None:
    """The sum that an update consumes failed to come; its frames are next those of another one's, in the next step."""
    tensor = updates.gates.stored(0, "gradients")
    updates.let.set()
    updates.load(tensor, 0)
    assert updates.submit(tensor)
    updates.gates.mover.discard_soon(tensor)
    updates.load(tensor, 1)
    updates.gates.files.take("read").fail(StorageError("a sector is gone"))
    with pytest.raises(StorageError, match="a sector is gone"):
        updates.lane.finish()
    finishing = updates.gates.training.submit(updates.lane.finish)
    updates.gates.files.take("read").open()
    finishing.result(10)
    assert updates.lane.made_here == 1 and not tensor.updates


def test_loads_go_on_for_an_op_that_waits_for_one_once_an_error_is_told_of(updates: Updates) -> None:
    coming, leaving = updates.gates.stored(1, "coming"), updates.gates.dirty(0, 0, "leaving")
    updates.load(coming, 0)
    updates.gates.files.take("write").fail(StorageError("a sector is gone"))
    with pytest.raises(StorageError, match="a sector is gone"):
        updates.gates.mover.monitor.check()
    value = updates.reads(coming)
    for kind in ("write", "read"):
        updates.gates.files.take(kind).open()
    assert value() == 1 and leaving.frame is None
