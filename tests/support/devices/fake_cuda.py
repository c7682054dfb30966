"""CUDA as `CudaDevice` calls it, without a GPU: every call is noted, nothing is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pagemem.devices import cuda
from pagemem.devices.cuda import CudaDevice

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

    def __init__(self, *, enable_timing: bool = False, blocking: bool = False) -> None:
        assert blocking, "a thread that waits for it would spin"
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
    """As much of `torch.cuda` as `pagemem.devices.cuda` uses to order and to pin."""

    Event = Event
    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self, refusal: int = 0, refused: int = 0) -> None:
        """``refusal``: the error of every pinning but the first ``refused``."""
        self.log: list[str] = []
        self.refusal, self.refused = refusal, refused
        self.stuck: set[int] = set()
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

    def Stream(self, _: torch.device) -> Stream:
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

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        self.log.append(f"pin {address:#x} {n_bytes}")
        self.refused -= 1
        return self.refusal if self.refused < 0 else 0

    def cudaHostUnregister(self, address: int) -> int:
        self.log.append(f"unpin {address:#x}")
        return 710 if address in self.stuck else 0

    def set_device(self, device: torch.device) -> None:
        self.log.append(f"set {device}")

    def mem_get_info(self, _: torch.device) -> tuple[int, int]:
        return 90 * PAGE_BYTES, 200 * PAGE_BYTES

    def memory_reserved(self, _: torch.device) -> int:
        return 30 * PAGE_BYTES

    def memory_allocated(self, _: torch.device) -> int:
        return 20 * PAGE_BYTES


def device_on(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    monkeypatch.setattr(cuda, "_CUDA", fake)
    return CudaDevice()
