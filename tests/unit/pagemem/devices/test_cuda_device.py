"""The order in which a CUDA device is given copies, against streams that only note what they are given."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import PAGE_BYTES, FakeCuda, Stream, device_on

from pagemem.devices import cuda
from pagemem.devices.accelerator import REACHED
from pagemem.devices.arena import HostArena
from pagemem.devices.cuda import CudaCopy, CudaDevice, CudaEvent
from pagemem.errors import DeviceError
from pagemem.frames.page import FrameId
from pagemem.units import format_bytes


class Bytes(torch.Tensor):
    """Notes when it is copied into."""

    log: list[str]

    def copy_(self, other: torch.Tensor, non_blocking: bool = False) -> Any:
        assert non_blocking, "nobody waits for a copy"
        self.log.append("copy")
        return super().copy_(other)


def test_a_copy_up_comes_between_the_mark_it_follows_and_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    device = device_on(fake, monkeypatch)
    into: Any = torch.zeros(8, dtype=torch.uint8).as_subclass(Bytes)
    into.log = fake.log
    copy = device.copy_up(torch.ones(8, dtype=torch.uint8), into, device.record_event())
    device.wait_for(copy)
    assert fake.log == [
        "event compute 0",
        "up waits for compute 0",
        "event up 2",
        "copy",
        "event up 4",
        "compute waits for up 4",
    ]
    assert bool((into == 1).all()) and not copy.reached()
    copy.wait()
    assert copy.reached() and isinstance(copy, CudaCopy) and copy.seconds() == 0.0025


def test_a_copy_into_host_memory_comes_behind_compute_so_far_and_compute_goes_on_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    device = device_on(fake, monkeypatch)
    into: Any = torch.zeros(8, dtype=torch.uint8).as_subclass(Bytes)
    into.log = fake.log
    event = device.copy_out(torch.ones(8, dtype=torch.uint8), into)
    assert fake.log == ["event compute 0", "down waits for compute 0", "copy", "event down 3"]
    assert bool((into == 1).all()) and not event.reached()
    device.wait_for(event)
    assert fake.log[-1] == "compute waits for down 3"


def test_compute_is_timed_where_it_is_given_and_waited_for_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    device = device_on(fake, monkeypatch)
    begun, ended = device.stamp(), device.stamp()
    assert fake.log == ["event compute 0", "event compute 1"] and not ended.query()
    assert device.seconds(begun, ended) == 0.0025 and ended.query() and not begun.query()


def test_marks_of_other_devices_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_on(FakeCuda(), monkeypatch)
    assert isinstance(device.record_event(), CudaEvent)
    with pytest.raises(TypeError, match="no event of a CUDA device"):
        device.wait_for(REACHED)


def test_it_is_the_current_device_and_stream_of_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    device = device_on(fake, monkeypatch)
    assert device.torch_device == torch.device("cuda", 1)
    device.check()
    fake.current = Stream(fake.log, "another")
    with pytest.raises(DeviceError, match="used on another, but the engine was made on compute"):
        device.check()


def test_a_number_that_no_device_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_CUDA", FakeCuda())
    with pytest.raises(DeviceError, match=r'"cuda:2", but there are 2, numbered from 0'):
        CudaDevice(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use CUDA here")
def test_without_cuda_it_says_so() -> None:
    with pytest.raises(DeviceError, match='Set device to "cpu"'):
        CudaDevice()


def test_an_arena_is_pinned_once_and_unpinned_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    arena = HostArena(4, PAGE_BYTES, device_on(fake, monkeypatch).pin)
    pinned = f"pin {arena.address:#x} {4 * PAGE_BYTES}"
    assert fake.log == [pinned]
    arena.close()
    arena.close()
    assert fake.log == [pinned, f"un{pinned.rpartition(' ')[0]}"]


def test_memory_that_cannot_be_pinned_is_used_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(refusal=2)
    device = device_on(fake, monkeypatch)
    monkeypatch.setattr(CudaDevice, "_forget_refusal", lambda self: None)
    with pytest.warns(RuntimeWarning, match="cannot be pinned .CUDA error 2.*Lower memory.ram"):
        arena = HostArena(1, PAGE_BYTES, device.pin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = HostArena(2, PAGE_BYTES, device.pin)
    arena.close()
    again.close()
    assert not any(entry.startswith("unpin") for entry in fake.log)


# ---- more than one piece --------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory is pinned four frames at a time."""
    monkeypatch.setattr(cuda, "PIN_BYTES", 4 * PAGE_BYTES)
    monkeypatch.setattr(CudaDevice, "_forget_refusal", lambda self: None)


@pytest.mark.usefixtures("pieces")
def test_a_large_arena_is_pinned_in_pieces_that_begin_at_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    arena = HostArena(10, PAGE_BYTES, device_on(fake, monkeypatch).pin)
    starts = [arena.address + frame * PAGE_BYTES for frame in (0, 4, 8)]
    assert fake.log == [
        f"pin {start:#x} {frames * PAGE_BYTES}" for start, frames in zip(starts, (4, 4, 2), strict=True)
    ]
    fake.log.clear()
    arena.close()
    assert fake.log == [f"unpin {start:#x}" for start in reversed(starts)]


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.usefixtures("pieces")
def test_a_copy_of_two_pieces_is_two_copies(up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA refuses one of memory that was pinned in two calls."""
    fake = FakeCuda()
    device = device_on(fake, monkeypatch)
    arena = HostArena(10, PAGE_BYTES, device.pin)
    copied: list[tuple[int, int]] = []
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other, non_blocking: copied.append((self.numel(), other.numel()))
    )
    for frames, expected in [
        ((0, 4), [4]),
        ((1, 2), [2]),
        ((3, 6), [1, 4, 1]),
        ((4, 5), [4, 1]),
        ((0, 10), [4, 4, 2]),
        ((8, 2), [2]),
    ]:
        host = arena.view(FrameId(frames[0]), 0, torch.uint8, frames[1] * PAGE_BYTES)
        there = torch.empty_like(host)
        if up:
            device.copy_up(host, there, device.record_event())
        else:
            device.copy_out(there, host)
        assert copied == [(n * PAGE_BYTES, n * PAGE_BYTES) for n in expected], frames
        copied.clear()
    del host, there
    arena.close()
    assert not device._cuts


@pytest.mark.usefixtures("pieces")
def test_one_piece_that_is_refused_unpins_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(refusal=2, refused=2)
    device = device_on(fake, monkeypatch)
    with pytest.warns(RuntimeWarning, match="cannot be pinned"):
        arena = HostArena(10, PAGE_BYTES, device.pin)
    unpinned = [f"unpin {arena.address + 4 * PAGE_BYTES:#x}", f"unpin {arena.address:#x}"]
    assert fake.log[3:] == unpinned and not device._cuts
    arena.close()
    assert fake.log[3:] == unpinned


@pytest.mark.usefixtures("pieces")
def test_a_piece_that_cannot_be_unpinned_keeps_neither_the_others_nor_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    arena = HostArena(10, PAGE_BYTES, device_on(fake, monkeypatch).pin)
    fake.stuck = {arena.address, arena.address + 8 * PAGE_BYTES}
    fake.log.clear()
    with pytest.raises(RuntimeError, match=f"{arena.address + 8 * PAGE_BYTES:#x} cannot be unpinned: CUDA error 710"):
        arena.close()
    assert len(fake.log) == 3 and arena._map.closed
    arena.close()
    assert len(fake.log) == 3, "once"


def test_pinned_memory_is_not_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped(arena: HostArena) -> bool:
        bounds = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        return any(int(start, 16) <= arena.address < int(end, 16) for start, end in bounds)

    pinned, plain = HostArena(4, PAGE_BYTES, device_on(FakeCuda(), monkeypatch).pin), HostArena(4, PAGE_BYTES)
    assert mapped(pinned) and mapped(plain)
    child = os.fork()
    if not child:
        os._exit(mapped(pinned) + 2 * mapped(plain))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    pinned.close()
    plain.close()


# ---- threads, and what is left on the device ------------------------------------------------------------------------


def test_a_thread_that_works_for_a_device_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    device_on(fake, monkeypatch).use_in_thread()
    assert fake.log == ["set cuda:1"]


@pytest.mark.parametrize(("frames", "warned"), [(85, False), (86, True), (100, True), (101, False)])
def test_pages_that_leave_little_of_the_device_are_warned_of(
    frames: int, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 frames are free: 90 on the device, 10 that torch has got and does not use. More is refused by the device
    itself."""
    monkeypatch.setattr(cuda, "_CUDA", FakeCuda())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cuda.CudaArena(frames, PAGE_BYTES, torch.device("cpu"))
    assert [str(entry.message).partition(":")[0] for entry in caught] == warned * [
        f"memory.device is {format_bytes(frames * PAGE_BYTES)} of {format_bytes(100 * PAGE_BYTES)} free on cpu"
    ]
    assert all("Lower memory.device to at most" in str(entry.message) for entry in caught)
