"""Gradients on their way down: which go on when, what memory they wait in, and for how long the device must keep its
own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gated_device import GatedEvent

from optim.gradient_downloads import Download, GradientDownloadQueue
from pagemem.budget import Budget
from pagemem.devices.accelerator import RamDevice
from pagemem.errors import NonFiniteError
from pagemem.tier import Tag, Tier

LIMIT, KEPT = 512, 256


class Device(RamDevice):
    """Copies down at once; that they are there is told when the test says so, in order."""

    stages_gradients = True

    def __init__(self) -> None:
        self.events: list[GatedEvent] = []
        self.waited: list[int] = []

    def copy_out(self, source: torch.Tensor, into: torch.Tensor) -> GatedEvent:
        into.copy_(source)
        event, number = GatedEvent(), len(self.events)
        wait = event.wait

        def waits() -> None:
            self.waited.append(number)
            event.open()
            wait()

        event.wait = waits  # type: ignore[method-assign]
        self.events.append(event)
        return event


class Updater:
    """Notes what it takes from the queue, and keeps it as long as it is told to."""

    def __init__(self, queue: GradientDownloadQueue) -> None:
        self.queue = queue
        self.taken: list[str] = []
        self.kept: list[torch.Tensor] = []
        self.keeps = False
        self.unit: Any = SimpleNamespace(device_resident=False)

    def take(self, downloads: Iterable[Download]) -> None:
        for download in downloads:
            slot: Any = download.slot
            self.taken.append(slot)
            if self.keeps:
                self.kept.append(download.gradient)
            assert torch.equal(download.gradient, values(slot, download.gradient.shape))
            assert download.gradient.is_contiguous()
            del download

    def gradient(self, slot: Any, gradient: torch.Tensor) -> None:
        self.take(self.queue.put(self.unit, slot, gradient, lambda unit, slot: True))

    def expect(self, loss: torch.Tensor, step: int) -> None:
        self.take(self.queue.expect(loss, step))

    def step(self) -> None:
        self.take(self.queue.take())
        self.queue.end_step()
        self.kept.clear()


def values(slot: str, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """What a gradient is made of: its own numbers, so that one in another's place is seen."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + 1000 * (ord(slot) - ord("a"))


class Rig:
    def __init__(self, limit: int = LIMIT) -> None:
        self.device, self.budget = Device(), Budget(Tier.HOST, limit + KEPT)
        self.gradients = GradientDownloadQueue(self.device, self.budget, limit, KEPT)
        self.updater = Updater(self.gradients)

    def gives(self, slot: str, *shape: int) -> weakref.ref[torch.Tensor]:
        """Deliver a gradient; returns what says whether the device's memory of it is still held."""
        gradient = values(slot, shape)
        self.updater.gradient(slot, gradient)
        held = self.gradients._waiting[-1].source if self.gradients._waiting else None
        return weakref.ref(gradient if held is None else held)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    assert made.budget.by_tag() == {Tag.GRAD: LIMIT + KEPT}, "all of the buffer"
    yield made
    made.gradients.close()
    made.gradients.close()
    assert made.budget.used_bytes == 0
    made.budget.close()


def test_older_ones_go_on_when_a_younger_one_needs_their_room(rig: Rig) -> None:
    for slot in "abcd":
        rig.gives(slot, 8, 4)
    assert not rig.updater.taken and rig.gradients.host_bytes == LIMIT
    rig.gives("e", 8, 4)
    assert rig.updater.taken == ["a"] and rig.device.waited == [0] and rig.gradients.host_bytes == LIMIT
    rig.gives("f", 16, 6)
    assert rig.updater.taken == ["a", "b", "c", "d"] and rig.gradients.host_bytes == LIMIT
    assert rig.budget.by_tag() == {Tag.GRAD: LIMIT + KEPT}, "the buffer neither grows nor shrinks"
    rig.updater.step()
    assert rig.updater.taken == list("abcdef") and rig.gradients.host_bytes == 0


def test_one_that_is_laid_out_otherwise_comes_row_by_row(rig: Rig) -> None:
    gradient = values("a", (4, 8)).t().contiguous().t()
    assert not gradient.is_contiguous()
    rig.updater.gradient("a", gradient)
    rig.updater.gradient("a", values("a", ()))
    rig.updater.gradient("a", values("a", (0, 3)))
    rig.updater.step()
    assert rig.updater.taken == ["a", "a", "a"]


def test_the_devices_memory_is_held_until_the_copy_is_made_and_no_longer(rig: Rig) -> None:
    first, second, third = rig.gives("a", 8), rig.gives("b", 8), rig.gives("c", 8)
    assert all(held() is not None for held in (first, second, third))
    rig.device.events[0].open()
    rig.device.events[2].open()
    rig.gives("d", 8)
    assert first() is None and second() is not None and third() is not None, (
        "copies are made in order: later ones are not asked for"
    )
    rig.device.events[1].open()
    rig.gives("e", 8)
    assert second() is None and third() is None


def test_gradients_that_the_updater_keeps_stay_in_the_buffer(rig: Rig) -> None:
    rig.updater.keeps = True
    for slot in "abcde":
        rig.gives(slot, 8, 4)
    rig.gives("f", 8, 4)
    assert rig.updater.taken == ["a", "b"] and len(rig.device.events) == 6, "room for those that are kept, too"
    assert all(torch.equal(kept, values(slot, kept.shape)) for slot, kept in zip("ab", rig.updater.kept, strict=True))
    rig.gives("g", 8, 4)
    # More is kept than was foretold: this one waits for the device, in memory of its own.
    assert rig.updater.taken == list("abcdef") and len(rig.device.events) == 6
    rig.updater.step()
    assert rig.updater.taken == list("abcdefg")
    rig.gives("h", 16, 8)
    assert len(rig.device.events) == 7, "the buffer is free again"


@pytest.mark.parametrize("limit", [0, 64])
def test_without_room_each_waits_for_the_device_and_goes_on_at_once(limit: int) -> None:
    device, budget = Device(), Budget(Tier.HOST, 64)
    gradients = GradientDownloadQueue(device, budget, limit, 0)
    updater = Updater(gradients)
    for slot in "ab":
        updater.gradient(slot, values(slot, (8, 4)))
    assert updater.taken == ["a", "b"] and not device.events and gradients.host_bytes == 0
    gradients.close()
    budget.close()


def test_memory_is_not_given_back_before_copies_of_gradients_that_were_dropped(rig: Rig) -> None:
    rig.updater.expect(torch.tensor(float("nan")), 1)
    rig.gives("a", 8)
    rig.gives("b", 8)
    with pytest.raises(NonFiniteError, match="loss of step 1 is nan"):
        rig.updater.step()
    assert not rig.updater.taken and rig.gradients.host_bytes == 0
    assert rig.device.waited == [0, 2], "the loss; and compute goes on behind the copies, whose memory is free then"
    rig.gradients.close()
    assert rig.device.waited == [0, 2, 2], "the last one is behind the others"


def test_losses_of_many_micro_batches_are_each_looked_at_before_their_gradients() -> None:
    """More than the page of losses holds: the oldest ones' gradients go on for it."""
    rig = Rig(100 * 64)
    for number in range(100):
        rig.updater.expect(torch.tensor(float(number)), 1)
        rig.gives(chr(ord("a") + number), 1)
        assert len(rig.updater.taken) == max(0, number - 63)
    assert rig.gradients._waiting[0].loss is not None and float(rig.gradients._waiting[0].loss.value) == 36.0
    rig.updater.expect(torch.tensor(float("inf")), 1)
    rig.gives("z", 1)
    with pytest.raises(NonFiniteError, match="loss of step 1 is inf"):
        rig.updater.step()
    assert len(rig.updater.taken) == 100
    rig.gradients.close()
    rig.budget.close()


def test_order_and_places_are_the_same_in_every_step(rig: Rig) -> None:
    rig.updater.keeps = True
    seen = []
    for _ in range(3):
        begun = len(rig.updater.taken)
        places = []
        for number, slot in enumerate("abcdefghij"):
            rig.gives(slot, 4 + 7 * number % 11, 3)
            places.append(
                rig.gradients._waiting[-1].gradient.data_ptr() if rig.gradients._waiting[-1].source is not None else 0
            )
        rig.updater.step()
        seen.append((rig.updater.taken[begun:], places))
    assert seen[0] == seen[1] == seen[2]
