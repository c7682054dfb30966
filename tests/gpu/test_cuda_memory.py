"""The memory of a CUDA device and the order of what is done in it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from pagemem.arena import HostArena
from pagemem.cuda import CudaArena, CudaDevice
from pagemem.errors import DeviceError
from pagemem.page import FrameId, TensorId

PAGE_BYTES = 64 << 10
N_FRAMES = 16
#: Device clock cycles, some tens of milliseconds of them.
LONG = 50_000_000


@pytest.fixture
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture
def arena(device: CudaDevice) -> Iterator[CudaArena]:
    made = device.make_arena(N_FRAMES, PAGE_BYTES)
    assert isinstance(made, CudaArena)
    yield made
    made.close()


@pytest.fixture
def host(device: CudaDevice) -> Iterator[HostArena]:
    made = HostArena(N_FRAMES, PAGE_BYTES, device.pin)
    yield made
    torch.cuda.synchronize()
    made.close()


def test_a_view_and_a_lease_are_the_same_bytes(arena: CudaArena) -> None:
    view = arena.view(FrameId(3), 128, torch.float32, 256)
    lease = arena.lease(TensorId(7), FrameId(3), 128, torch.float32, 256)
    view.fill_(2.5)
    assert lease.device.type == "cuda" and lease.dtype is torch.float32
    assert bool((lease == 2.5).all()) and lease.data_ptr() == view.data_ptr()
    assert arena.locate(lease.data_ptr()) == (FrameId(3), 128)
    assert arena.locate(torch.ones(1, device="cuda").data_ptr()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_lease_ends_with_its_last_alias(arena: CudaArena, dtype: torch.dtype) -> None:
    lease = arena.lease(TensorId(7), FrameId(0), 0, dtype, 64)
    alias = lease.view(8, 8).t().detach()
    saved = (alias.requires_grad_() * 2).sum()
    del lease, alias
    gc.collect()
    assert arena.ended_leases() == []
    del saved
    gc.collect()
    assert arena.ended_leases() == [TensorId(7)]


def test_files_do_not_reach_it(arena: CudaArena) -> None:
    with pytest.raises(TypeError, match="files are not read into it"):
        arena.buffer(FrameId(0), PAGE_BYTES)


def test_an_arena_that_does_not_fit_is_refused(device: CudaDevice) -> None:
    with pytest.raises(MemoryError, match="lower memory.device"):
        device.make_arena(1 << 30, PAGE_BYTES)


def test_host_memory_is_pinned_until_the_arena_is_closed(device: CudaDevice) -> None:
    made = HostArena(N_FRAMES, PAGE_BYTES, device.pin)
    view = made.view(FrameId(1), 0, torch.uint8, PAGE_BYTES)
    assert view.is_pinned()
    del view
    made.close()
    again = HostArena(N_FRAMES, PAGE_BYTES, device.pin)  # the same addresses, as like as not
    again.close()


def test_a_copy_up_begins_after_its_mark_and_compute_after_the_copy(device: CudaDevice, arena: CudaArena, host: HostArena) -> None:
    into, source = arena.view(FrameId(0), 0, torch.uint8, PAGE_BYTES), host.view(FrameId(0), 0, torch.uint8, PAGE_BYTES)
    into.fill_(1)
    source.fill_(2)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    before = into.clone()
    copy = device.copy_up(source, into, device.mark())
    assert not copy.reached(), "nobody waited for it"
    device.follow(copy)
    after = into.clone()
    copy.wait()
    assert copy.seconds() > 0
    assert bool((before == 1).all()) and bool((after == 2).all())


def test_a_copy_down_has_what_compute_was_given_before_it(device: CudaDevice) -> None:
    values = torch.zeros(1 << 16, device="cuda")
    torch.cuda._sleep(LONG)
    values.add_(3)
    brought, there = device.copy_down(values)
    assert brought.is_pinned() and not there.reached()
    del values  # its memory is not given to others before the copy is made
    torch.full((1 << 16,), 9.0, device="cuda")
    there.wait()
    assert bool((brought == 3).all())


def test_a_copy_into_host_memory_has_what_compute_was_given_before_it(device: CudaDevice) -> None:
    source = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    into = torch.empty(1 << 16, dtype=torch.uint8, pin_memory=True)
    torch.cuda._sleep(LONG)
    source.add_(3)
    mark = device.copy_out(source, into)
    assert not mark.reached()
    device.follow(mark)
    source.fill_(9)  # compute goes on behind the copy
    mark.wait()
    torch.cuda.synchronize()
    assert bool((into == 3).all())


def test_compute_on_another_stream_is_refused(device: CudaDevice) -> None:
    device.check()
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(DeviceError, match="on one stream"):
        device.check()


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="numbered from 0"):
        CudaDevice(torch.cuda.device_count())
