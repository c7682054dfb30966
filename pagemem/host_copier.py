"""The h2d lane where the device is ordinary memory: one thread that copies host pages up, each once they are there.

A copy waits until the mover below has its tensor in host memory, which may be long after it was asked for, or never: then
whoever asked takes it back. Copies overtake each other, so one that waits is in nobody's way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pagemem.events import Event, EventKind, EventSink
from pagemem.io_threads import small_stacks
from pagemem.mover import Mover
from pagemem.page_transfer import Done
from pagemem.residency import PagedTensor


@dataclass(frozen=True, slots=True, eq=False)
class _Upload:
    tensor: PagedTensor
    into: memoryview
    done: Done


class HostCopier:
    """Copies tensors of one mover into given buffers.

    Args:
        below: whose host pages are read.
        on_failure: called on the copier's thread with what a ``done`` raised; the thread goes on with the next copy.
        sink: takes an UPLOAD for each copy.

    Raises:
        StorageError: the system starts no more threads.
    """

    def __init__(self, below: Mover, on_failure: Callable[[BaseException], None], sink: EventSink) -> None:
        self._below = below
        self._sink = sink
        self._on_failure = on_failure
        self._waiting: list[_Upload] = []  # guarded by below.changed, as are the next four
        self._closing = False
        self._gate = threading.Event()
        self.copied_bytes = 0
        self.busy_s = 0.0
        below.on_change(self._look)
        # A daemon, as I/O threads are: a program that dies without closing its engine must not hang on it.
        self._thread = threading.Thread(target=self._run, name="pagemem-h2d", daemon=True)
        with small_stacks():
            self._thread.start()

    def submit(self, tensor: PagedTensor, into: memoryview, done: Done) -> None:
        """Copy ``tensor`` into a buffer once it is in host memory; ``done`` is called on the copier's thread. Never blocks."""
        with self._below.changed:
            self._waiting.append(_Upload(tensor, into, done))
            self._look()

    def take_back(self, tensor: PagedTensor) -> bool:
        """Forget the copy of a tensor if it has not begun; returns whether it was forgotten. Any thread."""
        with self._below.changed:
            kept = [upload for upload in self._waiting if upload.tensor is not tensor]
            found, self._waiting = len(kept) < len(self._waiting), kept
            return found

    def close(self) -> None:
        """Make the copies that can be made, end and join the thread. Idempotent."""
        with self._below.changed:
            self._closing = True
        self._gate.set()
        self._thread.join()

    def _look(self) -> None:
        if any(upload.tensor.readable for upload in self._waiting):
            self._gate.set()

    def _run(self) -> None:
        while True:
            with self._below.changed:
                upload = next((upload for upload in self._waiting if upload.tensor.readable), None)
                if upload is not None:
                    self._waiting.remove(upload)
                    source = self._below.begin_upload(upload.tensor)
                elif self._closing:
                    return
                else:
                    self._gate.clear()
            if upload is None:
                self._gate.wait()
                continue
            try:
                upload.done(self._copied(upload, source))
            except BaseException as failure:  # whatever it is: a thread that ends silently leaves its waiters for ever
                self._on_failure(failure)
            del upload, source

    def _copied(self, upload: _Upload, source: memoryview) -> BaseException | None:
        """Make one copy; returns what went wrong."""
        began_s, error = time.perf_counter(), None
        try:
            # NumPy copies on this thread alone; torch would start a team of its own beside the one that computes.
            np.copyto(np.frombuffer(upload.into, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))
        except BaseException as raised:  # it goes to done, and from there to the training thread
            error = raised
        spent_s = time.perf_counter() - began_s
        with self._below.changed:
            self.copied_bytes += upload.tensor.n_bytes
            self.busy_s += spent_s
            self._below.end_upload(upload.tensor)
        self._sink.emit(Event(EventKind.UPLOAD, upload.tensor.name, upload.tensor.n_bytes, began_s, spent_s))
        return error
