"""The order in which a CUDA device is given copies, against streams that only note what they are given."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pagemem import cuda
from pagemem.accelerator import REACHED
from pagemem.arena import HostArena
from pagemem.cuda import CudaCopy, CudaDevice, CudaMark
from pagemem.errors import DeviceError

PAGE_BYTES = 64 << 10


class Stream:
    """Notes events recorded on it and waited for by it."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def __repr__(self) -> str:
        return self.name


class Event:
    """Named by its stream and the number of events before it."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        self.timed, self.name, self.done = enable_timing, "nothing", False

    def record(self, stream: Stream) -> None:
        self.name = f"{stream.name} {len(stream.log)}"
        stream.log.append(f"event {self.name}")

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, later: Event) -> float:
        assert self.timed and later.timed
        return 2.5


class FakeCuda:
    """As much of `torch.cuda` as `pagemem.cuda` uses to order and to pin."""

    Event = Event
    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self, refusal: int = 0) -> None:
        self.log: list[str] = []
        self.refusal = refusal
        self.compute = self.current = Stream(self.log, "compute")
        self._names = iter(("up", "down"))

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return 1

    def current_stream(self, _: torch.device) -> Stream:
        return self.current

    def Stream(self, _: torch.device) -> Stream:  # noqa: N802, as torch names it
        return Stream(self.log, next(self._names))

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def device(self, _: torch.device) -> Iterator[None]:
        yield

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:  # noqa: N802
        self.log.append(f"pin {address:#x} {n_bytes}")
        return self.refusal

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.log.append(f"unpin {address:#x}")
        return 0


def device_on(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    monkeypatch.setattr(cuda, "_CUDA", fake)
    return CudaDevice()


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
    copy = device.copy_up(torch.ones(8, dtype=torch.uint8), into, device.mark())
    device.follow(copy)
    assert fake.log == ["event compute 0", "up waits for compute 0", "event up 2", "copy", "event up 4", "compute waits for up 4"]
    assert bool((into == 1).all()) and not copy.reached()
    copy.wait()
    assert copy.reached() and isinstance(copy, CudaCopy) and copy.seconds() == 0.0025


def test_a_copy_into_host_memory_comes_behind_compute_so_far_and_compute_goes_on_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    device = device_on(fake, monkeypatch)
    into: Any = torch.zeros(8, dtype=torch.uint8).as_subclass(Bytes)
    into.log = fake.log
    mark = device.copy_out(torch.ones(8, dtype=torch.uint8), into)
    assert fake.log == ["event compute 0", "down waits for compute 0", "copy", "event down 3"]
    assert bool((into == 1).all()) and not mark.reached()
    device.follow(mark)
    assert fake.log[-1] == "compute waits for down 3"


def test_compute_is_timed_where_it_is_given_and_waited_for_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    device = device_on(fake, monkeypatch)
    begun, ended = device.stamp(), device.stamp()
    assert fake.log == ["event compute 0", "event compute 1"] and not ended.query()
    assert device.seconds(begun, ended) == 0.0025 and ended.query() and not begun.query()


def test_marks_of_other_devices_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_on(FakeCuda(), monkeypatch)
    assert isinstance(device.mark(), CudaMark)
    with pytest.raises(TypeError, match="no mark of a CUDA device"):
        device.follow(REACHED)


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
    with pytest.warns(RuntimeWarning, match="cannot be pinned .CUDA error 2.*ulimit -l"):
        arena = HostArena(1, PAGE_BYTES, device.pin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = arena.resized(2)
    arena.close()
    again.close()
    assert not any(entry.startswith("unpin") for entry in fake.log)
