"""The memory of a CUDA device and the order of what is done in it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch

from pagemem.devices import cuda
from pagemem.devices.arena import HostArena
from pagemem.devices.cuda import CudaArena, CudaDevice
from pagemem.devices.staging import StagingBuffer
from pagemem.errors import DeviceError
from pagemem.frames.page import FrameId, TensorId

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
    assert arena.locate(lease) == (FrameId(3), 128)
    assert arena.locate(torch.ones(1, device="cuda")) is None


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


def test_a_copy_up_begins_after_its_mark_and_compute_after_the_copy(
    device: CudaDevice, arena: CudaArena, host: HostArena
) -> None:
    into, source = arena.view(FrameId(0), 0, torch.uint8, PAGE_BYTES), host.view(FrameId(0), 0, torch.uint8, PAGE_BYTES)
    into.fill_(1)
    source.fill_(2)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    before = into.clone()
    copy = device.copy_up(source, into, device.record_event())
    assert not copy.reached(), "nobody waited for it"
    device.wait_for(copy)
    after = into.clone()
    copy.wait()
    assert copy.seconds() > 0
    assert bool((before == 1).all()) and bool((after == 2).all())


def test_a_copy_into_host_memory_has_what_compute_was_given_before_it(device: CudaDevice) -> None:
    source = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    into = torch.empty(1 << 16, dtype=torch.uint8, pin_memory=True)
    torch.cuda._sleep(LONG)
    source.add_(3)
    event = device.copy_out(source, into)
    assert not event.reached()
    device.wait_for(event)
    source.fill_(9)  # compute goes on behind the copy
    event.wait()
    torch.cuda.synchronize()
    assert bool((into == 3).all())


def test_compute_on_another_stream_is_refused(device: CudaDevice) -> None:
    device.check()
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(DeviceError, match="on one stream"):
        device.check()


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="numbered from 0"):
        CudaDevice(torch.cuda.device_count())


def test_memory_pinned_in_pieces_is_copied_across_their_bounds(
    device: CudaDevice, arena: CudaArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "PIN_BYTES", 4 * PAGE_BYTES)
    for _ in range(2):  # what is unpinned can be pinned again
        host = HostArena(N_FRAMES, PAGE_BYTES, device.pin)
        assert len(device._cuts) == N_FRAMES // 4 - 1
        there, here = (each.view(FrameId(2), 0, torch.uint8, 11 * PAGE_BYTES) for each in (arena, host))
        assert here.is_pinned()
        here.random_()
        device.copy_up(here, there, device.record_event()).wait()
        assert torch.equal(there.cpu(), here)
        there.add_(1)
        before = here.clone()
        device.copy_out(there, here).wait()
        assert torch.equal(here, before + 1)
        del here
        host.close()
        assert not device._cuts


def test_a_child_takes_nothing_of_pinned_memory(device: CudaDevice, arena: CudaArena, host: HostArena) -> None:
    """Otherwise the device goes on reading the pages that the parent had before it wrote to them."""
    there, here = (each.view(FrameId(0), 0, torch.uint8, each.n_bytes) for each in (arena, host))
    here.fill_(1)
    ready, release = os.pipe()
    child = os.fork()
    if not child:
        os.close(release)
        os.read(ready, 1)
        os._exit(0)
    os.close(ready)
    here.fill_(2)
    device.copy_up(here, there, device.record_event()).wait()
    right = bool((there == 2).all())
    os.close(release)
    os.waitpid(child, 0)
    assert right


def test_a_staging_buffer_is_pinned_and_takes_what_it_says(device: CudaDevice) -> None:
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    buffer = StagingBuffer(1 << 20, device.pin)
    span = buffer.take(1000)
    assert span is not None and span.is_pinned()
    source = torch.full((1000,), 7, dtype=torch.uint8, device="cuda")
    device.copy_out(source, span).wait()
    assert bool((span == 7).all())
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == before, "nothing of it is torch's"
    del span
    buffer.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
def test_a_thread_that_joins_another_device_uses_that() -> None:
    found: list[int] = []

    def work() -> None:
        CudaDevice(1).use_in_thread()
        found.append(torch.cuda.current_device())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1] and torch.cuda.current_device() == 0
