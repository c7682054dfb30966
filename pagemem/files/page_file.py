"""The SSD tier: fixed frames in one preallocated file per path, moved by owned I/O threads.

    OPEN --close--> CLOSING --threads joined, files closed--> CLOSED

Invariants
    1. Every frame below `n_frames` has its room on the disk; growing adds whole slabs on all paths or nothing at all.
    2. Nothing is queued once CLOSING, so every transfer that was begun completes before the threads end.
    3. What one transfer does, and when its ``done`` is called: `pagemem.files.transfer`.

Which tensor owns which frame, and what must wait for what, is the allocator's and the mover's business: two transfers
under way must not touch the same bytes unless both read.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Sequence
from typing import Final

import numpy as np

from pagemem.errors import StorageError
from pagemem.files.backend import Direction, choose_backend
from pagemem.files.checksums import DigestArray, ExtentIndex
from pagemem.files.file_set import FileSet
from pagemem.files.rate_limit import TokenBucket
from pagemem.files.requests import Route, plan_requests, tabulate
from pagemem.files.stats import IoMeter
from pagemem.files.striping import Striping
from pagemem.files.threads import IoPool
from pagemem.files.transfer import Completion, Done, Job, Part, Ticket, TransferServer, flat_bytes
from pagemem.folders.run_directory import RunDirectory
from pagemem.frames.page import Extent
from pagemem.state_machine import StateMachine
from pagemem.units import MiB, ceil_div

PAGE_FILE_NAME: Final = "pages.bin"
SLAB_BYTES: Final = 64 * MiB


class FilesState(enum.Enum):
    """OPEN takes transfers; CLOSING completes those queued; CLOSED has no thread and no descriptor."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


_MOVES: Final = StateMachine(
    "page files", {FilesState.OPEN: {FilesState.CLOSING}, FilesState.CLOSING: {FilesState.CLOSED}}
)


class PageFiles:
    """The page files of one SSD tier, striped over run directories.

    `read` and `write` may be called on any thread, also from ``done``; the others on any but an I/O thread, except
    `grow`, which is free of that limit too.

    Args:
        directories: one per path, open for as long as this is; they are not closed here.
        page_bytes: size of a frame, a power of two from 64 KiB to 64 MiB.
        checksums: whether to compute an xxh3 of every extent written and verify it on reading.
        direct: True or False forces O_DIRECT or aiofiles, None probes.
        threads_per_path: requests under way at a time on one path, in each direction.
        finishing_threads: threads beside them, of all paths together, for what need not keep a thread from the next
            request: checksums, and telling of the end. They are worth it while cores are idle. None: half of those per
            path, but at least one; 0: who moves does that, too.
        max_request_bytes: longest single request to the system, a multiple of 4096. Each one wakes a thread or two.
        limit_mb_per_s: caps reads and writes together, in 10^6 bytes a second, to model a slower disk.
        slab_bytes: the step by which the tier grows, over all paths together.

    Raises:
        StorageError: a page file cannot be opened, O_DIRECT is forced and refused, or the system starts no more
            threads. No thread and no descriptor is left then.

    Attributes:
        n_frames: frames that have their room on the disk.
        backend_name: ``"direct"`` or ``"aiofiles"``.
        failure: the first exception a ``done`` callback raised; also raised by `close`.
        reads, writes: what was moved so far, and how long it took; source files count here, too.
        throttle: limits what is moved; source files have the same.
    """

    def __init__(
        self,
        directories: Sequence[RunDirectory],
        *,
        page_bytes: int,
        checksums: bool = True,
        direct: bool | None = None,
        threads_per_path: int = 4,
        finishing_threads: int | None = None,
        max_request_bytes: int = 16 * MiB,
        limit_mb_per_s: float | None = None,
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        self._striping = Striping(len(directories))
        self.throttle = None if limit_mb_per_s is None else TokenBucket(limit_mb_per_s * 1e6)
        self.page_bytes = page_bytes
        self.paths = [str(directory.path / PAGE_FILE_NAME) for directory in directories]
        self._max_request_bytes = max_request_bytes
        self.checksums = checksums
        self._slab_frames = max(1, slab_bytes // page_bytes)
        self.n_frames = 0
        self._index = ExtentIndex()
        self.reads, self.writes = IoMeter(), IoMeter()
        self.failure: BaseException | None = None
        self._state = FilesState.OPEN
        self._state_lock = threading.Lock()  # guards _state, failure, and that nothing is queued once CLOSING
        self._grow_lock = threading.Lock()
        self._close_lock = threading.Lock()
        n_workers = threads_per_path * len(directories)
        folders = [directory.path for directory in directories]
        made = choose_backend(folders, direct=direct, n_workers=n_workers)
        self.backend_name = made.name
        self._files = FileSet(made, self.paths, page_bytes)
        self._pools: dict[tuple[Direction, int], IoPool[Ticket]] = {}
        self._finishing: IoPool[Ticket] | None = None
        if finishing_threads is None:
            finishing_threads = max(1, threads_per_path // 2) * len(directories)
        hand_on = self._hand_on if finishing_threads else None
        meters = {Direction.READ: self.reads, Direction.WRITE: self.writes}
        self._server = TransferServer(
            made, self.paths, self._index, meters, self.throttle, hand_on, checksums=checksums
        )
        self._start_threads(threads_per_path, finishing_threads)

    # ---- what there is -----------------------------------------------------------------------------------------

    def grow(self, n_frames: int) -> None:
        """Have at least ``n_frames`` frames in all, rounded up to whole slabs.

        Raises:
            DiskFullError: a path has no room for its part; no path has grown, the frames there were stay usable.
            StorageError: a file cannot be lengthened for another reason; the same holds.
        """
        with self._grow_lock:
            if n_frames <= self.n_frames:
                return
            n_frames = ceil_div(n_frames, self._slab_frames) * self._slab_frames
            self._files.lengthen(self._striping.file_frames(self.n_frames), self._striping.file_frames(n_frames))
            self._index.grow(n_frames)
            self.n_frames = n_frames

    # ---- transfers ---------------------------------------------------------------------------------------------

    def route(self, extents: Sequence[Extent]) -> Route:
        """The requests that move these extents; worth keeping by who moves them often. Any thread.

        Raises:
            ValueError: an extent is empty, not aligned, or outside its page or the frames there are.
        """
        table = tabulate(extents, self._striping, self.page_bytes, self.n_frames)
        requests = plan_requests(table, len(self.paths), self.page_bytes, self._max_request_bytes)
        return Route(table, tuple(requests), int(table.lengths.sum()))

    def sums(self, route: Route) -> DigestArray:
        """The checksums with which a route's extents were last written; zeros where checksums are off. Any thread.

        Raises:
            StorageError: one of them was not written, or not exactly so.
        """
        known, sums = self._index.look_up(route.table.keys)
        if not known.all():
            raise StorageError(f"an extent at frame {route.table.frames[int(np.argmin(known))]} was never written")
        return sums

    def remember(self, route: Route, sums: DigestArray) -> None:
        """Take extents for written with these checksums, by an earlier run. Any thread."""
        self._index.record(route.table.keys, sums)

    def read(
        self,
        where: Route | Sequence[Extent],
        into: memoryview,
        done: Done,
        *,
        background: bool = False,
        part: Part | None = None,
    ) -> None:
        """Begin reading extents into a buffer, one after another; returns at once.

        Args:
            where: the extents or their route, exactly as they were written: same frame, offset and length.
            into: writable, contiguous, at an address that is a multiple of 4096, as long as the extents together. It
                must stay alive and untouched until ``done``.
            done: called once, on an I/O thread, with None or with the first error: `StorageError` (the system failed,
                or an extent was never written) or `ChecksumError`. The buffer's content is undefined after an error.
                It must be cheap and should not raise, see `failure`.
            background: give way to transfers that are not.
            part: called before ``done``, also on I/O threads and as cheap, with [start, end) in ``into`` of bytes that
                are there and verified; in any order, each once, all of them if there is no error.

        Raises:
            ValueError: extents or buffer are not as said; nothing was begun and ``done`` will not be called.
            StorageError: the page files are closed; likewise.
        """
        if into.readonly:
            raise ValueError("the buffer to read into is read-only; pass a writable one")
        self._begin(Direction.READ, where, into, done, background, part)

    def write(
        self, where: Route | Sequence[Extent], source: memoryview, done: Done, *, background: bool = False
    ) -> None:
        """Begin writing a buffer to extents, one after another; returns at once.

        Arguments and exceptions are those of `read`. After an error (`StorageError`, `DiskFullError`) the extents hold
        neither the old nor the new bytes for certain; a read of them then raises unless the old ones are intact.
        """
        self._begin(Direction.WRITE, where, source, done, background)

    def _begin(
        self,
        direction: Direction,
        where: Route | Sequence[Extent],
        buffer: memoryview,
        done: Done,
        background: bool,
        part: Part | None = None,
    ) -> None:
        route = where if isinstance(where, Route) else self.route(where)
        flat = flat_bytes(buffer)
        if flat.nbytes != route.n_bytes:
            raise ValueError(f"the extents hold {route.n_bytes} bytes, the buffer {flat.nbytes}; they must be equal")
        tickets = self._server.work(direction, route, flat, done, part)
        with self._state_lock:
            if self._state is not FilesState.OPEN:
                raise StorageError(f"the page files are {self._state.value}; no transfer can begin")
            if isinstance(done, Completion):
                done.begun = True
            try:
                self._queue(tickets, background=background)
            except BaseException:  # a signal's handler raised: half a transfer would never end
                self._queue(tickets, background=background)
                raise

    def _queue(self, tickets: Sequence[Ticket], *, background: bool) -> None:
        """Queue jobs, perhaps for the second time."""
        for ticket in list(tickets):
            for under_way, request, job in ticket:
                if self._finishing is not None and job is not Job.MOVE:
                    self._finishing.submit(ticket)
                else:
                    self._pools[under_way.direction, request.path].submit(ticket, background=background)

    def _hand_on(self, ticket: Ticket) -> bool:
        """Leave what follows a request to another thread where the caller's next one waits already."""
        ((under_way, request, _),) = ticket
        if self._finishing is None or not self._pools[under_way.direction, request.path].has_waiting:
            return False
        self._finishing.submit(ticket)
        return True

    def _note_failure(self, failure: BaseException) -> None:
        with self._state_lock:
            self.failure = self.failure or failure

    def _start_threads(self, threads_per_path: int, finishing_threads: int) -> None:
        # A thread that waits for tokens has taken them already: whoever comes next waits behind it.
        n_background = 1 if self.throttle is not None else max(1, threads_per_path // 2)
        try:
            for direction in Direction:
                for path in range(len(self.paths)):
                    name = f"pagemem-{direction.name.lower()}-{path}"
                    pool = IoPool(name, threads_per_path, self._server, self._note_failure, n_background)
                    self._pools[direction, path] = pool
            if finishing_threads:
                self._finishing = IoPool("pagemem-finish", finishing_threads, self._server, self._note_failure)
        except BaseException:
            self.close()
            raise

    # ---- files -------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make durable every write whose ``done`` was called before, in files that are still those that were opened.

        Raises:
            StorageError: a file could not be synced, or was removed, replaced or cut: nothing is known of what was
                written since the last sync, and a later one says nothing about that; see
                `pagemem.residency.disk_versions`.
        """
        self._files.sync()
        self._files.check(self._striping.file_frames(self.n_frames))

    def close(self) -> None:
        """Complete what is queued, end and join all threads, close all files. Idempotent; the files stay on the disk.

        Raises:
            BaseException: the first one a ``done`` callback raised, or that a file could not be closed, on the first
                call only; all is closed then too.
        """
        with self._close_lock:
            if self._state is FilesState.CLOSED:
                return
            if self._state is FilesState.OPEN:  # else a signal's handler raised in an earlier call
                self._become(FilesState.CLOSING)
            for pool in (*self._pools.values(), self._finishing):  # the last one takes what the others leave to it
                if pool is not None:
                    pool.close()
            try:
                self._files.close()
            except StorageError as error:
                self._note_failure(error)
            self._become(FilesState.CLOSED)
        if self.failure is not None:
            raise self.failure

    def _become(self, state: FilesState) -> None:
        with self._state_lock:
            self._state = _MOVES.move(self._state, state)
