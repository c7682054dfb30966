"""The h2d lane: a thread that gives a device copies of host pages to make, each once they are there.

A copy waits until the mover below has its tensor in host memory, which may be long after it was asked for, or never:
then whoever asked takes it back. Copies that wait for host pages are overtaken, so that one is in nobody's way. Of a
tensor that is being read from the page files, what has come is copied up while the rest is read: SSD, host and device
are one pipeline.

A device makes its copies later than they are enqueued, up and down. Who asked hears when one is, with an event to
put compute behind. The host pages stay as they are until the copy is made, which a second thread waits for, and a third
for copies down (`pagemem.devices.copy_ends`). It must not be the first: who asked may be told only after a lock is
free whose holder waits for those pages.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch

from pagemem.devices.accelerator import Accelerator, Copy, DeviceEvent
from pagemem.devices.copy_ends import CopyEnds
from pagemem.files.threads import small_stacks
from pagemem.files.transfer import Completion
from pagemem.residency.host_mover import HostMover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.residency.upload import OnEnqueued, Span, Upload, UploadState
from pagemem.telemetry.events import Event, EventKind, EventSink

#: How long the end of the program waits for each thread of an engine that nobody closed.
_EXIT_PATIENCE_S: Final = 10.0


class UploadQueue:
    """Copies tensors of one mover into device memory.

    Args:
        below: whose host pages are read.
        accelerator: makes the copies.
        on_failure: called on the first thread with what an ``on_enqueued`` raised; the thread goes on.
        sink: takes an UPLOAD for each copy.

    Raises:
        StorageError: the system starts no more threads.
    """

    def __init__(
        self, below: HostMover, accelerator: Accelerator, on_failure: Callable[[BaseException], None], sink: EventSink
    ) -> None:
        self._below = below
        self._accelerator = accelerator
        self._sink = sink
        self._on_failure = on_failure
        self._waiting: list[Upload] = []  # guarded by below.changed, as are the next four
        self._closing = False
        self._gate = threading.Event()
        self.copied_bytes = 0
        self.busy_s = 0.0
        self._up_ends, self._down_ends = (
            CopyEnds(f"pagemem-{way}-ends", self._enter_thread, below.monitor.note_failure) for way in ("h2d", "d2h")
        )
        below.monitor.on_change(self._look)
        below.on_part = self._look
        # Daemons, as I/O threads are: a program that dies without closing its engine must not hang on them.
        self._begins = threading.Thread(target=self._run, name="pagemem-h2d", daemon=True)
        started: list[CopyEnds] = []
        with small_stacks():
            try:
                for ends in (self._up_ends, self._down_ends):
                    ends.start()
                    started.append(ends)
                self._begins.start()
            except BaseException:
                for ends in started:
                    ends.end()
                raise
        self._at_exit = partial(_close_at_exit, weakref.ref(self), os.getpid())
        atexit.register(self._at_exit)

    def submit(
        self, tensor: PagedTensor, into: torch.Tensor, after: DeviceEvent, on_enqueued: OnEnqueued, end: Completion
    ) -> None:
        """Copy ``tensor`` into device memory once it is in host memory. Never blocks.

        Args:
            into: bytes, flat, as many as the tensor has.
            after: behind what used that memory last.
            on_enqueued: called on the copier's thread.
            end: what ``on_enqueued`` completes; begun once the copy is certain to be enqueued, or taken back.
        """
        upload = Upload(tensor, into, after, on_enqueued)
        with self._below.changed:
            end.begun = True
            self._waiting.append(upload)
            self._look()

    def begun(self, tensor: PagedTensor, copy: Copy) -> None:
        """Somebody else gave the device a copy up from a tensor's pages, having called `HostMover.begin_upload`."""
        made = partial(self._made, tensor, tensor.n_bytes, copy)
        self._up_ends.add(partial(self._over, made, partial(self._below.end_upload, tensor)), copy)

    def arrives(self, tensor: PagedTensor, event: DeviceEvent) -> None:
        """A copy down into the pages of a tensor, for which `HostMover.begin_arrival` was called, is enqueued on the
        device."""
        self._down_ends.add(partial(self._over, event.wait, partial(self._below.end_arrival, tensor)), event)

    def take_back(self, tensor: PagedTensor) -> bool:
        """Forget the copy of a tensor if it has not begun; returns whether it was forgotten. Any thread."""
        with self._below.changed:
            kept = [
                upload
                for upload in self._waiting
                if upload.tensor is not tensor or upload.state is not UploadState.WAITING
            ]
            found, self._waiting = len(kept) < len(self._waiting), kept
            return found

    def has(self, tensor: PagedTensor) -> bool:
        """Whether the copy of a tensor has not been given to the device wholly. With the lock held."""
        return any(upload.tensor is tensor for upload in self._waiting)

    def waits_for(self, tensor: PagedTensor) -> bool:
        """Whether the copy of a tensor has not begun. With the lock held."""
        return any(upload.tensor is tensor and upload.state is UploadState.WAITING for upload in self._waiting)

    def close(self, patience_s: float | None = None) -> None:
        """Make the copies that can be made, end and join the threads. Idempotent.

        Args:
            patience_s: how long to wait for each thread; None: until it ends.
        """
        atexit.unregister(self._at_exit)
        with self._below.changed:
            self._closing = True
        self._gate.set()
        self._begins.join(patience_s)
        for ends in (self._up_ends, self._down_ends):
            ends.end()
            ends.join(patience_s)

    def _look(self) -> None:
        if any(upload.can_go_on for upload in self._waiting):
            self._gate.set()

    def _enter_thread(self) -> None:
        """Have a thread's calls go to the device. One that failed fails again at the first copy."""
        try:
            self._accelerator.use_in_thread()
        except RuntimeError as failure:
            self._below.monitor.note_failure(failure)

    def _run(self) -> None:
        self._enter_thread()
        while True:
            with self._below.changed:
                upload = next((upload for upload in self._waiting if upload.can_go_on), None)
                if upload is None:
                    if self._closing:
                        return
                    self._gate.clear()
                elif upload.stale:
                    self._begin_anew(upload)
                    continue
                else:
                    source, spans = self._begin(upload)
            if upload is None:
                self._gate.wait()
                continue
            try:
                self._give(upload, source, spans)
            except BaseException as failure:  # whatever it is: a thread that ends silently leaves its waiters for ever
                self._on_failure(failure)
            # Not kept while waiting for the next one: they hold views of both arenas.
            del upload, source

    def _begin(self, upload: Upload) -> tuple[torch.Tensor, list[Span]]:
        """The bytes of a tensor, and which of them can be copied now; the last ones if its state is ENDED then. With
        the lock held.

        From the first to the last the host pages are kept as they are, so that all are of one version.
        """
        spans = upload.take()
        if upload.state is UploadState.WAITING:
            upload.become(UploadState.BEGUN)
            source = self._below.begin_upload(upload.tensor)
        else:
            source = self._below.tenants.bytes_of(upload.tensor)
        if upload.tensor.whole:
            self._end(upload)
        return source, spans

    def _end(self, upload: Upload) -> None:
        upload.become(UploadState.ENDED)
        self._waiting.remove(upload)

    def _begin_anew(self, upload: Upload) -> None:
        """Forget what was copied of a load that failed. With the lock held."""
        upload.become(UploadState.WAITING)
        upload.arrived, upload.n_taken = [], 0
        assert upload.copy is not None
        # Not here, which would be waiting with the lock held.
        self._up_ends.put(self._let_go(upload.tensor, upload.copy))

    def _give(self, upload: Upload, source: torch.Tensor, spans: Sequence[Span]) -> None:
        """Have bytes copied, and tell who asked when these are the last."""
        error: BaseException | None = None
        try:
            for start, end in spans:
                upload.copy = copy = self._accelerator.copy_up(source[start:end], upload.into[start:end], upload.after)
                self._up_ends.add(partial(self._made, upload.tensor, end - start, copy), copy)
        except BaseException as raised:  # it goes to who asked, and from there to the training thread
            error = raised
            with self._below.changed:
                if upload.state is not UploadState.ENDED:
                    self._end(upload)
            if upload.copy is not None:
                _wait_out(upload.copy, raised)  # who is told gives the frames away
        if upload.state is not UploadState.ENDED:
            return
        result = error or upload.copy
        assert result is not None
        try:
            if upload.copy is None:
                self._below.end_upload(upload.tensor)
            else:
                self._up_ends.add(self._let_go(upload.tensor, upload.copy), upload.copy)
        finally:
            upload.on_enqueued(result)

    def _made(self, tensor: PagedTensor, n_bytes: int, copy: Copy) -> None:
        """Wait until a copy is made, and tell of it."""
        copy.wait()
        spent_s = copy.seconds()
        with self._below.changed:
            self.copied_bytes += n_bytes
            self.busy_s += spent_s
        self._sink.emit(Event(EventKind.UPLOAD, tensor.name, n_bytes, time.perf_counter() - spent_s, spent_s))

    def _over(self, wait: Callable[[], None], tell: Callable[[], None]) -> None:
        """Wait and tell that it is over; what goes wrong is noted before, so that whoever is told sees it."""
        try:
            wait()
        except BaseException as failure:  # whatever it is, it is over
            self._below.monitor.note_failure(failure)
        tell()

    def _let_go(self, tensor: PagedTensor, copy: Copy) -> Callable[[], None]:
        """What waits until a copy is made; the host pages may be changed then."""
        return partial(self._over, copy.wait, partial(self._below.end_upload, tensor))


def _wait_out(copy: Copy, error: BaseException) -> None:
    """Wait for a copy before one that failed; of a device that failed none is under way any more."""
    try:
        copy.wait()
    except RuntimeError as failure:
        error.add_note(f"the copy before it failed, too: {failure}")


def _close_at_exit(copier: weakref.ref[UploadQueue], process: int) -> None:
    """End the threads of a copier that nobody closed: a copy under way when the device's library ends aborts the
    process.

    Not in a child process, which has none of the threads.
    """
    left = copier()
    if left is not None and os.getpid() == process:
        left.close(_EXIT_PATIENCE_S)
