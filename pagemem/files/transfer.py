"""What I/O threads do with a transfer: move its requests' bytes, keep and verify checksums, report the end.

A transfer is a list of jobs, a move for each request. With threads for what follows a move, a write's checksums are
jobs of their own, computed beside it, and what comes after a move (verifying a read, telling of the end) is done by the
thread that moved only if no other request waits for it: the disk is asked for the next request first. Without such
threads one job does all of a request, checksums of a write first: that wakes the fewest threads, which is what counts
while all cores compute.

A read may tell of its bytes as they come, request by request, for whoever goes on with them before all are there.

Invariants
    1. ``done`` is called exactly once, after all jobs ended, with no lock held and no reference to the buffer kept.
    2. A checksum becomes visible only when the whole write has succeeded; an extent never written cannot be read, nor,
       where there are no checksums to tell, one that a failed write may have torn.
    3. ``part`` is told of bytes only once they are verified, before ``done`` is called.
    4. The first error is the one reported. Jobs that had not begun by then do nothing.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from pagemem.errors import ChecksumError, StorageError
from pagemem.files.backend import Direction, RawBackend, transfer
from pagemem.files.checksums import DigestArray, ExtentIndex, digests
from pagemem.files.rate_limit import TokenBucket
from pagemem.files.requests import Request, Route
from pagemem.files.stats import IoMeter
from pagemem.units import BLOCK_BYTES

Done = Callable[[BaseException | None], None]
#: Told of [start, end) in the buffer, on an I/O thread, as often as bytes come.
Part = Callable[[Sequence[tuple[int, int]]], None]


def flat_bytes(buffer: memoryview) -> memoryview:
    """The buffer's bytes as a view of our own, which can be released without touching the caller's.

    Raises:
        ValueError: it is not contiguous or not aligned.
    """
    if not buffer.c_contiguous:
        raise ValueError("the buffer is not contiguous; pass one run of bytes")
    flat = buffer.cast("B")
    address = np.frombuffer(flat, dtype=np.uint8).__array_interface__["data"][0] if flat.nbytes else 0
    if address % BLOCK_BYTES:
        raise ValueError(f"the buffer's address {address:#x} is not a multiple of {BLOCK_BYTES}; slice an mmap at one")
    return flat


class Completion:
    """Tells of a transfer's end, once: the first call does, later ones do nothing. Any thread.

    Attributes:
        begun: whether whoever makes the transfer is certain to call this. Where `read` or `write` raises after that, as
            it may when a signal's handler raises, the transfer goes on all the same.
    """

    __slots__ = ("_tell", "begun")

    def __init__(self, tell: Done) -> None:
        self.begun = False
        self._tell = [tell]

    def __call__(self, error: BaseException | None) -> None:
        try:
            tell = (
                self._tell.pop()
            )  # one instruction: of two threads, or of a thread and what interrupts it, one has it
        except IndexError:
            return
        tell(error)


class Job(enum.Enum):
    """What is to be done with one request: MOVE its bytes, FINISH what was moved, DIGEST what is written."""

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    MOVE = "move"
    FINISH = "finish"
    DIGEST = "digest"


class Transfer:
    """One read or write under way: its extents, their checksums, its buffer, and how many of its jobs are left.

    Args:
        buffer: a view of its own, released when the transfer ends.
        n_jobs: how many jobs it has, >= 1.
        part: is told of what has been read; None: nobody is.
    """

    def __init__(
        self, direction: Direction, route: Route, buffer: memoryview, done: Done, n_jobs: int, part: Part | None = None
    ) -> None:
        self.direction = direction
        self.table = route.table
        self.buffer = buffer
        self.done = done
        self.part = part
        self.sums: DigestArray = np.zeros(len(route.table), dtype=np.uint64)
        self.error: BaseException | None = None
        self._lock = threading.Lock()  # guards what is left, and the error
        self._jobs_left = n_jobs
        self._parts_left = {int(r.rows[0]): r.n_parts for r in route.requests if r.n_parts > 1 and r.leads}

    def whole(self, request: Request) -> bool:
        """Note that a request's bytes are there; returns whether all bytes of its extents are."""
        if request.n_parts == 1:
            return True
        row = int(request.rows[0])
        with self._lock:
            self._parts_left[row] -= 1
            return self._parts_left[row] == 0

    def tell_part(self, request: Request) -> None:
        """Say which bytes are there, after the last of a request's parts."""
        if self.part is None:
            return
        if request.n_parts == 1:
            self.part(request.spans)
        else:
            row = int(request.rows[0])
            start = int(self.table.starts[row])
            self.part([(start, start + int(self.table.lengths[row]))])

    def job_ended(self, error: BaseException | None) -> bool:
        """Note a job's end, keep the first error; returns whether it was the last one."""
        with self._lock:
            self.error = self.error or error
            self._jobs_left -= 1
            return self._jobs_left == 0


Work = tuple[Transfer, Request, Job]
#: One job, until somebody takes it out: queued twice, it is done once.
Ticket = list[Work]


class TransferServer:
    """Serves jobs of transfers; called by any number of I/O threads at a time.

    Args:
        paths: names of the backend's files, by index.
        index: what was written so far; consulted by reads, extended by writes that succeed.
        throttle: waited for before each request; None: no limit.
        hand_on: takes over a FINISH job, to serve it on another thread, or returns False: the caller serves it at once.
            None: there is no other thread, one job does all of a request.
        checksums: whether to compute and verify them; extents are recorded as written either way.
    """

    def __init__(
        self,
        backend: RawBackend,
        paths: Sequence[str],
        index: ExtentIndex,
        meters: Mapping[Direction, IoMeter],
        throttle: TokenBucket | None,
        hand_on: Callable[[Ticket], bool] | None,
        *,
        checksums: bool,
    ) -> None:
        self._backend = backend
        self._paths = paths
        self._index = index
        self._meters = meters
        self._throttle = throttle
        self._hand_on = hand_on
        self._checksums = checksums

    def work(
        self, direction: Direction, route: Route, buffer: memoryview, done: Done, part: Part | None = None
    ) -> list[Ticket]:
        """A new transfer's jobs, to be served in this order or beside each other."""
        jobs = [(request, Job.MOVE) for request in route.requests]
        if direction is Direction.WRITE and self._checksums and self._hand_on is not None:
            jobs += [(request, Job.DIGEST) for request in route.requests if request.leads]
        under_way = Transfer(direction, route, buffer, done, len(jobs), part)
        if direction is Direction.READ:
            self._look_up(under_way)
        return [[(under_way, request, job)] for request, job in jobs]

    def __call__(self, ticket: Ticket) -> None:
        """Serve one job, and complete its transfer if it was the last. Raises only what ``done`` raises."""
        try:
            under_way, request, job = ticket.pop()
        except IndexError:
            return
        error: BaseException | None = None
        if under_way.error is None:
            try:
                self._do(under_way, request, job)
                if job is Job.MOVE:
                    if self._hand_on is not None and self._hand_on([(under_way, request, Job.FINISH)]):
                        return  # the job goes on elsewhere
                    self._finish(under_way, request)
            except BaseException as raised:  # whatever it is goes to done: a lost error would block a waiter for ever
                error = raised
        if under_way.job_ended(error):
            self._complete(under_way)

    def _do(self, under_way: Transfer, request: Request, job: Job) -> None:
        if job is Job.FINISH:
            self._finish(under_way, request)
            return
        with_sums = under_way.direction is Direction.WRITE and self._checksums and self._hand_on is None
        if job is Job.DIGEST or (with_sums and request.leads):
            under_way.sums[request.rows] = self._digests(under_way, request)
        if job is Job.MOVE:
            self._move(under_way, request)

    def _finish(self, under_way: Transfer, request: Request) -> None:
        # The parts of a cut extent end in any order: the last one sees all its bytes.
        if under_way.direction is Direction.READ and under_way.whole(request):
            if self._checksums:
                self._verify(under_way, request)
            under_way.tell_part(request)

    def _complete(self, under_way: Transfer) -> None:
        if under_way.direction is Direction.WRITE:
            if under_way.error is None:
                self._index.record(under_way.table.keys, under_way.sums)
            elif not self._checksums:  # with them, a read finds out which of the old extents are still intact
                self._index.forget(under_way.table.keys)
        under_way.buffer.release()
        under_way.done(under_way.error)

    def _look_up(self, under_way: Transfer) -> None:
        """Put the checksums to be found into a read; one of an extent never written has failed before it begins.

        Here, not between two requests: the disk would wait for it.
        """
        table = under_way.table
        known, under_way.sums = self._index.look_up(table.keys)
        if not known.all():
            row = int(np.argmin(known))
            under_way.error = StorageError(
                f"{self._paths[table.paths[row]]}: frame {table.frames[row]}, offset {table.offsets[row]}, "
                f"{table.lengths[row]} bytes: no such extent was written"
            )

    def _move(self, under_way: Transfer, request: Request) -> None:
        direction, moved_bytes = under_way.direction, 0
        buffers = [under_way.buffer[start:end] for start, end in request.spans]
        self._meters[direction].begin()
        try:
            if self._throttle is not None:
                self._throttle.take(request.n_bytes)
            call = self._backend.read_into if direction is Direction.READ else self._backend.write_from
            path = self._paths[request.path]
            transfer(partial(call, request.path), direction, path, request.position_bytes, buffers)
            moved_bytes = request.n_bytes
        finally:
            self._meters[direction].end(moved_bytes)
            for buffer in buffers:  # released by hand: an error's traceback would keep them, and so the caller's memory
                buffer.release()

    def _digests(self, under_way: Transfer, request: Request) -> DigestArray:
        return digests(under_way.buffer, under_way.table.starts[request.rows], under_way.table.lengths[request.rows])

    def _verify(self, under_way: Transfer, request: Request) -> None:
        found, expected = self._digests(under_way, request), under_way.sums[request.rows]
        right = found == expected
        if right.all():
            return
        table, at = under_way.table, int(np.argmin(right))
        row = int(request.rows[at])
        raise ChecksumError(
            f"{self._paths[request.path]}: frame {table.frames[row]} (file offset {table.positions[row]}, "
            f"{table.lengths[row]} bytes) was written with xxh3 {int(expected[at]):016x} and reads as "
            f"{int(found[at]):016x}: the disk or another program changed it. Go back to the last good state; check the "
            f"disk."
        )
