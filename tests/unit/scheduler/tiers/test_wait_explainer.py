"""Why a wait waits: each obstacle is built by hand, with copies that end when the test says."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest
from fake_page_files import TIMEOUT_S
from gated_mover import PAGE_BYTES, Gates, opened

from pagemem.devices.accelerator import RamDevice
from pagemem.devices.arena import HostArena
from pagemem.errors import StorageError
from pagemem.frames.page import FrameId
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.telemetry.events import Event, EventKind, NullSink
from pagemem.telemetry.recorder import UNKNOWN_CAUSE, Recorder, WaitCause
from pagemem.tier import Tag, Tier
from scheduler.planning.task import Task, load_task
from scheduler.tiers.load_lane import LoadLane
from scheduler.tiers.wait_explainer import (
    ARRIVING,
    BEHIND,
    COMMITTING,
    COPYING,
    IN_USE,
    MAKING_ROOM,
    MAKING_ROOM_FIRST,
    NO_PLACE,
    READING,
    UPDATING,
    WRITING,
    DeviceCauses,
    WaitExplainer,
)  # fmt: skip


def load(gates: Gates, name: str, frame: int) -> Task:
    """A planned load of the tensor of this name."""
    tensor = next(tensor for tensor in gates.mover.tensors.values() if tensor.name == name)
    return load_task(tensor.id, tensor.n_bytes, FrameId(frame), 0, 0)


def cause(gates: Gates, lane: LoadLane, name: str) -> WaitCause:
    """Asked as a recorder asks."""
    with gates.mover.changed:
        return WaitExplainer(gates.mover, lane)(name)


def test_under_way_in_either_direction() -> None:
    with opened() as gates:
        lane = LoadLane(gates.mover)
        gates.stored(1, "a")
        lane.submit([load(gates, "a", 0)])
        assert cause(gates, lane, "a") == WaitCause("read", READING)
        gates.files.take("read").open()
        b = gates.dirty(2, frame=1, name="b")
        gates.mover.start_store(b)
        assert cause(gates, lane, "b") == WaitCause("write", WRITING)
        assert cause(gates, lane, "commit of b") == WaitCause("write", COMMITTING)
        gates.files.take("write").open()
        assert cause(gates, lane, "nobody") == cause(gates, lane, "a") == UNKNOWN_CAUSE


def test_an_update_that_a_worker_has_yet_to_make() -> None:
    with opened() as gates:
        lane, tensor = LoadLane(gates.mover), gates.dirty(1, name="a")
        tensor.updates = 1
        assert cause(gates, lane, "a") == WaitCause("update", UPDATING) == cause(gates, lane, "update of a")
        tensor.updates = 0


def test_a_load_waits_for_the_tenant_of_its_place_and_others_behind_it() -> None:
    with opened() as gates:
        lane = LoadLane(gates.mover)
        gates.stored(1, "a")
        gates.stored(2, "b")
        gates.dirty(3, name="tenant")
        lane.submit([load(gates, "a", 0), load(gates, "b", 1)])
        assert cause(gates, lane, "a") == WaitCause("write", MAKING_ROOM, "tenant")
        assert cause(gates, lane, "b") == WaitCause("write", MAKING_ROOM_FIRST, "tenant")
        gates.files.take("write").open()
        for name in ("a", "b"):
            assert cause(gates, lane, name) == WaitCause("read", READING)
            gates.files.take("read").open()


def test_a_load_waits_for_what_is_still_being_read_into_its_place() -> None:
    with opened() as gates:
        lane = LoadLane(gates.mover)
        for name in ("tenant", "a", "b"):
            gates.stored(1, name)
        lane.submit([load(gates, "tenant", 0), load(gates, "a", 0), load(gates, "b", 1)])
        assert cause(gates, lane, "a") == WaitCause("read", ARRIVING, "tenant")
        assert cause(gates, lane, "b") == WaitCause("read", BEHIND, "tenant")
        for _ in range(3):
            gates.files.take("read").open()


def test_a_place_in_use_is_named() -> None:
    with opened() as gates:
        lane = LoadLane(gates.mover)
        gates.stored(1, "a")
        tenant = gates.dirty(2, name="tenant")
        tenant.pins += 1
        lane.submit([load(gates, "a", 0)])
        assert cause(gates, lane, "a") == WaitCause("none", IN_USE, "tenant")
        tenant.pins -= 1
        lane.clear()


def test_what_nobody_has_begun_to_bring_in_has_no_place_yet() -> None:
    with opened() as gates:
        lane = LoadLane(gates.mover)
        gates.stored(1, "a")
        gates.mover.start_store(gates.dirty(2, name="b"))
        assert cause(gates, lane, "a") == WaitCause("write", NO_PLACE, "b")
        gates.files.take("write").open()


def test_a_tensor_made_or_made_anew_later_is_known_by_its_name() -> None:
    with opened() as gates:
        lane = LoadLane(gates.mover)
        first = gates.dirty(1, name="a")
        causes = WaitExplainer(gates.mover, lane)
        gates.mover.forget(first)
        with gates.mover.changed:
            assert causes("a") == UNKNOWN_CAUSE
        for _ in range(2):
            again = gates.dirty(2, name="a")
            gates.mover.start_store(again)
            with gates.mover.changed:
                assert causes("a") == WaitCause("write", WRITING)
            gates.files.take("write").open()
            gates.mover.forget(again)


class Watched:
    """A recorder of a mover's waits, which says when one has begun."""

    def __init__(self, gates: Gates) -> None:
        self.lane = LoadLane(gates.mover)
        self.causes = WaitExplainer(gates.mover, self.lane)
        self.begun = threading.Event()
        self.gates = gates
        self.recorder = Recorder(self._explain)
        self.held = gates.mover.watch(self.recorder)

    def _explain(self, name: str) -> WaitCause:
        self.begun.set()
        return self.causes(name)

    def wait(self, tensor: PagedTensor) -> Future[None]:
        """Have the training thread wait for a tensor; returns once it does."""
        self.begun.clear()
        waiting = self.gates.training.submit(self._wait, tensor)
        assert self.begun.wait(TIMEOUT_S)
        return waiting

    def _wait(self, tensor: PagedTensor) -> None:
        self.gates.mover.monitor.wait_until(lambda: tensor.readable, tensor.name, tensor.n_bytes)
        self.recorder.emit(self.gates.log.of(EventKind.WAIT)[-1])  # The mover's sink is a log here.


def test_the_recorder_joins_a_wait_with_its_cause_and_keeps_what_was_held() -> None:
    with opened() as gates:
        a = gates.stored(1, "a")
        watched = Watched(gates)
        assert watched.held == {(Tier.SSD, Tag.PARAM): PAGE_BYTES}
        watched.lane.submit([load(gates, "a", 0)])
        waiting = watched.wait(a)
        gates.files.take("read").open()
        waiting.result()
        gates.mover.drop(a)
        assert gates.mover.watch(None) == watched.held
        gates.mover.forget(a)  # Nobody is told.
        recording = watched.recorder.finish(watched.held)
    (wait,) = recording.waits
    assert (wait.name, wait.cause, wait.training) == ("a", WaitCause("read", READING), False)
    assert recording.begin_s <= wait.start_s <= wait.end_s <= recording.end_s
    host = [sample.total_bytes for sample in recording.timeline.samples(Tier.HOST)]
    assert host == [0, PAGE_BYTES, 0] and recording.timeline.peak(Tier.SSD).total_bytes == PAGE_BYTES
    assert recording.n_calls == 4  # Two changes, the wait's beginning and its end.
    assert recording.spent_s > 0 and recording.training_spent_s < recording.spent_s


def test_a_thread_that_performs_ops_has_the_place_of_the_training_thread() -> None:
    """The backward pass of a device is on a thread of autograd's, while the training thread does nothing."""
    recorder = Recorder(lambda _: UNKNOWN_CAUSE)

    def waits(name: str) -> None:
        recorder.waits(name)
        recorder.emit(Event(EventKind.WAIT, name, 0, 1.0, 2.0))

    def backward() -> None:
        recorder.ends()
        waits("in the backward pass")
        recorder.begins("backward", "layer", "tensor", 1)

    waits("in the forward pass")
    for target in (lambda: waits("beside it"), backward):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    recording = recorder.finish({})
    assert [(wait.name, wait.training) for wait in recording.waits] == [
        ("in the forward pass", True), ("beside it", False), ("in the backward pass", True),
    ]  # fmt: skip
    assert 0 < recording.training_spent_s <= recording.spent_s


def test_the_cause_of_a_wait_that_failed_is_no_others() -> None:
    with opened() as gates:
        a = gates.stored(1, "a")
        watched = Watched(gates)
        watched.lane.submit([load(gates, "a", 0)])
        waiting = watched.wait(a)
        gates.files.take("read").fail(StorageError("gone"))
        with pytest.raises(StorageError, match="gone"):
            waiting.result()
        gates.mover.watch(None)
        late = Event(EventKind.WAIT, "update of a", 0, watched.recorder.finish({}).begin_s, 0.0)
        gates.training.submit(watched.recorder.emit, late).result()
        (wait,) = watched.recorder.finish({}).waits
        assert wait.cause == WaitCause("update", "the updater had yet to get that far")


def test_of_the_device_it_is_the_copy_once_host_memory_has_the_tensor_and_what_that_waits_for_before() -> None:
    with opened() as gates:
        arena = HostArena(2, PAGE_BYTES)
        lower, lane = gates.stored(1, "a"), LoadLane(gates.mover)
        device = DeviceMover(arena, gates.mover, RamDevice(), NullSink())
        tensor = device.mirror(lower)
        causes = DeviceCauses(device, WaitExplainer(gates.mover, lane))
        device.start_load(tensor, FrameId(0))  # the copy waits for host memory
        lane.submit([load(gates, "a", 0)])
        with device.changed:
            assert causes("a") == WaitCause("read", READING)
        with gates.mover.changed:
            lower.uploads += 1  # as while it is being copied
            assert causes("a") == WaitCause("h2d", COPYING)
            lower.uploads -= 1
        gates.files.take("read").open()
        device.monitor.wait_until(lambda: tensor.readable, "a")
        assert causes("a") == UNKNOWN_CAUSE and causes("nobody") == UNKNOWN_CAUSE
        device.close()
        arena.close()
