"""Loads of tensors from source files, on I/O threads of their own, under the limit and the counts of the page files."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

import numpy as np

from pagemem.errors import StorageError
from pagemem.files.rate_limit import TokenBucket
from pagemem.files.stats import IoMeter
from pagemem.files.threads import IoPool
from pagemem.files.transfer import Completion, Done, Part, flat_bytes
from pagemem.sources.source_files import Origin, SourceFile, SourceRead
from pagemem.sources.source_reader import CHUNK_BYTES, Bounce, Bytes, SourceReader, bounce_bytes
from pagemem.units import BLOCK_BYTES


class _Load:
    """One load under way. ``done`` is called once, after its last read, with no reference to the buffer kept."""

    def __init__(self, origin: Origin, buffer: memoryview, done: Done, part: Part | None, n_reads: int) -> None:
        self.origin = origin
        self.into: Bytes | None = np.frombuffer(buffer, dtype=np.uint8)
        self.done = done
        self.part = part
        self.error: BaseException | None = None
        self._lock = threading.Lock()  # guards what is left, and the error
        self._reads_left = n_reads

    def read_ended(self, error: BaseException | None) -> None:
        """Note a read's end; tell of the load's after the last one."""
        with self._lock:
            self.error = self.error or error
            self._reads_left -= 1
            is_last = self._reads_left == 0
        if is_last:
            self.into = None
            self.done(self.error)


#: One read, until somebody takes it out: queued twice, it is made once. The first of a load zeroes what none covers.
_Ticket = list[tuple[_Load, SourceRead, bool]]


class SourceFiles:
    """The source files of one engine. Any thread.

    Threads are started, and files opened, when the first tensor is to be read from one.

    Args:
        meter: counts what is read. throttle: waited for before each read; None: no limit.
        n_threads: reads under way at a time.
        chunk_bytes: most bytes of a read; each thread has as many for a buffer, see `enlarge_buffers`.
    """

    def __init__(
        self,
        meter: IoMeter,
        throttle: TokenBucket | None = None,
        *,
        n_threads: int = 4,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.reader = SourceReader(chunk_bytes)
        self._meter = meter
        self._throttle = throttle
        self._n_threads = n_threads
        self._lock = threading.Lock()  # guards _pool, _closed, and that nothing is queued once closed
        self._pool: IoPool[_Ticket] | None = None
        self._closed = False
        self._bounces: deque[Bounce] = deque()
        self._failure: BaseException | None = None

    def open(self, files: Iterable[SourceFile]) -> None:
        """Be ready to read from files.

        Raises:
            StorageError: one cannot be opened or is not as it was, the system starts no more threads, or this is
                closed.
        """
        for file in files:
            self.reader.open(file)
        with self._lock:
            if self._closed:
                raise StorageError("the source files are closed; nothing can be read from them")
            if self._pool is None:
                # A thread that waits for tokens has taken them already: whoever comes next waits behind it.
                n_background = 1 if self._throttle is not None else self._n_threads
                self._pool = IoPool("pagemem-source", self._n_threads, self._serve, self._note_failure, n_background)

    def larger_buffers(self, most_bytes: int) -> int:
        """Bytes that buffers for longer reads would take, at most ``most_bytes``; 0 where nothing is read, or reads
        would be no longer."""
        if self._pool is None or self._chunk_within(most_bytes) <= self.reader.chunk_bytes:
            return 0
        return self._n_threads * bounce_bytes(self._chunk_within(most_bytes))

    def enlarge_buffers(self, n_bytes: int) -> None:
        """Make reads as long as buffers of ``n_bytes`` in all allow, see `larger_buffers`; while no load is under
        way."""
        self.reader.chunk_bytes = self._chunk_within(n_bytes)
        self._bounces.clear()

    def _chunk_within(self, n_bytes: int) -> int:
        each_bytes = n_bytes // self._n_threads // BLOCK_BYTES * BLOCK_BYTES
        return min(CHUNK_BYTES, each_bytes - bounce_bytes(0))

    def read(
        self, origin: Origin, into: memoryview, done: Done, *, background: bool = False, part: Part | None = None
    ) -> None:
        """Begin to fill ``into`` with what an origin says; returns at once. As `PageFiles.read`.

        Raises:
            StorageError: this is closed; nothing was begun and ``done`` will not be called.
        """
        reads = self.reader.plan(origin)
        load = _Load(origin, flat_bytes(into), done, part, len(reads))
        tickets: list[_Ticket] = [[(load, read, place == 0)] for place, read in enumerate(reads)]
        with self._lock:
            if self._closed or self._pool is None:
                raise StorageError("the source files are closed; no load can begin")
            if isinstance(done, Completion):
                done.begun = True
            try:
                self._queue(self._pool, tickets, background=background)
            except BaseException:  # a signal's handler raised: half a load would never end
                self._queue(self._pool, tickets, background=background)
                raise

    def _queue(self, pool: IoPool[_Ticket], tickets: list[_Ticket], *, background: bool) -> None:
        for ticket in tickets:
            if ticket:
                pool.submit(ticket, background=background)

    def _serve(self, ticket: _Ticket) -> None:
        try:
            load, read, first = ticket.pop()
        except IndexError:
            return
        error: BaseException | None = None
        if load.error is None:
            try:
                self._move(load, read, first=first)
            except BaseException as raised:  # whatever it is goes to done: a lost error would block a waiter for ever
                error = raised.with_traceback(None)  # which would keep the buffer
        load.read_ended(error)

    def _move(self, load: _Load, read: SourceRead, *, first: bool) -> None:
        assert load.into is not None
        spans = [(piece.at_bytes, piece.end_bytes) for piece in read.pieces]
        if first:
            for begin, end in load.origin.gaps():
                load.into[begin:end] = 0
                spans.append((begin, end))
        n_bytes, moved_bytes = read.end_bytes - read.begin_bytes, 0
        bounce = self._take_bounce()
        self._meter.begin()
        try:
            if self._throttle is not None:
                self._throttle.take(n_bytes)
            self.reader.move(read, bounce, load.into)
            moved_bytes = n_bytes
        finally:
            self._meter.end(moved_bytes)
            self._bounces.append(bounce)
        if load.part is not None:
            load.part(spans)

    def _take_bounce(self) -> Bounce:
        """One that no other thread uses; there are as many as threads."""
        with self._lock:
            if not self._bounces:
                self._bounces.extend(Bounce.several(self._n_threads, self.reader.chunk_bytes))
            return self._bounces.pop()

    def _note_failure(self, failure: BaseException) -> None:
        self._failure = self._failure or failure

    def close(self) -> None:
        """Complete what is queued, end the threads, close the files. Idempotent.

        Raises:
            BaseException: the first one that a ``done`` callback raised, on the first call only.
        """
        with self._lock:
            self._closed = True
        if self._pool is not None:
            self._pool.close()
        self.reader.close()
        self._bounces.clear()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
