"""Page files in a dictionary, with the contract of the real ones: on threads, or each transfer held until a gate is
opened."""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pagemem.frames.page import Extent, FrameId

Done = Callable[[BaseException | None], None]
Part = Callable[[Sequence[tuple[int, int]]], None]
Route = tuple[Extent, ...]
TIMEOUT_S = 30.0


class FakePageFiles(ABC):
    """Extents kept as bytes."""

    def __init__(self) -> None:
        self.n_frames = 0
        self.content: dict[tuple[FrameId, int], bytes] = {}
        self.n_reads = 0
        self.n_writes = 0

    def grow(self, n_frames: int) -> None:
        """Have at least ``n_frames`` frames."""
        self.n_frames = max(self.n_frames, n_frames)

    def route(self, extents: Sequence[Extent]) -> Route:
        """What `read` and `write` are given again and again for the same extents."""
        return tuple(extents)

    def read(
        self, route: Route, into: memoryview, done: Done, *, background: bool = False, part: Part | None = None
    ) -> None:
        """Fill ``into``; an extent that was never written fails."""
        self.n_reads += 1
        self.begin("read", route, into, done, part)

    def write(self, route: Route, source: memoryview, done: Done, *, background: bool = False) -> None:
        """Keep the bytes of ``source``."""
        self.n_writes += 1
        self.begin("write", route, source, done)

    @abstractmethod
    def begin(self, kind: str, route: Route, buffer: memoryview, done: Done, part: Part | None = None) -> None:
        """Begin a transfer; ``done`` must not be called on this thread."""

    def copy(self, kind: str, route: Route, buffer: memoryview) -> BaseException | None:
        """Copy bytes one way or the other."""
        assert sum(extent.length_bytes for extent in route) == len(buffer)
        begin = 0
        for extent in route:
            end = begin + extent.length_bytes
            assert 0 <= extent.frame < self.n_frames, "a frame that the files do not have"
            place = (extent.frame, extent.offset_bytes)
            if kind == "write":
                self.content[place] = bytes(buffer[begin:end])
            elif len(self.content.get(place, b"")) == extent.length_bytes:
                buffer[begin:end] = self.content[place]
            else:
                return AssertionError(f"{extent} was never written")
            begin = end
        return None


class ThreadedPageFiles(FakePageFiles):
    """Transfers are made at once, in order, on one thread for reads and one for writes."""

    def __init__(self) -> None:
        super().__init__()
        self._threads = {kind: ThreadPoolExecutor(1, f"fake-{kind}") for kind in ("read", "write")}
        self._errors: list[BaseException] = []

    def begin(self, kind: str, route: Route, buffer: memoryview, done: Done, part: Part | None = None) -> None:
        """Queue a transfer; all of it comes at once."""
        self._threads[kind].submit(self._serve, kind, route, buffer, done)

    def _serve(self, kind: str, route: Route, buffer: memoryview, done: Done) -> None:
        try:
            done(self.copy(kind, route, buffer))
        except BaseException as error:
            self._errors.append(error)

    def close(self) -> None:
        """End the threads; raises what a callback raised."""
        for thread in self._threads.values():
            thread.shutdown()
        if self._errors:
            raise self._errors[0]


class Held:
    """A transfer that has been asked for and is neither made nor reported before the test says so."""

    def __init__(
        self, files: FakePageFiles, kind: str, route: Route, buffer: memoryview, done: Done, part: Part | None
    ) -> None:
        self.kind = kind
        self.route = route
        self.ended = False
        self._files, self._buffer, self._done, self._part = files, buffer, done, part

    def arrive(self, extent: int) -> None:
        """Let one extent of a read be there, and say so; on the calling thread."""
        lengths = [extent.length_bytes for extent in self.route]
        start = sum(lengths[:extent])
        end = start + lengths[extent]
        assert (
            self._part is not None
            and self._files.copy(self.kind, self.route[extent : extent + 1], self._buffer[start:end]) is None
        )
        self._part([(start, end)])

    def open(self) -> None:
        """Let it happen, whole, and be reported; on the calling thread."""
        self.ended = True
        self._done(self._files.copy(self.kind, self.route, self._buffer))

    def fail(self, error: BaseException) -> None:
        """Let it end with an error; a read has spoilt half of the host bytes by then."""
        self.ended = True
        if self.kind == "read":
            half = len(self._buffer) // 2
            self._buffer[:half] = b"\xee" * half
        self._done(error)


class GatedPageFiles(FakePageFiles):
    """Every transfer waits for the test: `take` the next one, then `Held.open` it or let it `Held.fail`."""

    def __init__(self) -> None:
        super().__init__()
        self._asked: queue.SimpleQueue[Held] = queue.SimpleQueue()
        self._every: list[Held] = []

    def begin(self, kind: str, route: Route, buffer: memoryview, done: Done, part: Part | None = None) -> None:
        """Hold a transfer."""
        held = Held(self, kind, route, buffer, done, part)
        self._every.append(held)
        self._asked.put(held)

    def take(self, kind: str) -> Held:
        """The next transfer asked for, which must be of this kind."""
        held = self._asked.get(timeout=TIMEOUT_S)
        assert held.kind == kind, f"a {held.kind} was asked for, not a {kind}"
        return held

    def idle(self) -> bool:
        """Whether nothing was asked for that has not been taken."""
        return self._asked.empty()

    def fail_all(self, error: BaseException) -> None:
        """Let every transfer fail that has not ended, so that nobody waits for it."""
        for held in self._every:
            if not held.ended:
                held.fail(error)
