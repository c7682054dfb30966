"""The h2d lane: a thread that gives a device copies of host pages to make, each once they are there.

A copy waits until the mover below has its tensor in host memory, which may be long after it was asked for, or never: then
whoever asked takes it back. Copies that wait for host pages are overtaken, so that one is in nobody's way.

A device makes its copies later than it is given them, up and down. Who asked hears when one is given, with a mark to put compute behind. The
host pages stay as they are until the copy is made, which a second thread waits for. It must not be the first: who asked may be
told only after a lock is free whose holder waits for those pages.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from pagemem.accelerator import Accelerator, Copy, Mark
from pagemem.events import Event, EventKind, EventSink
from pagemem.io_threads import small_stacks
from pagemem.mover import Mover
from pagemem.residency import PagedTensor

#: Called with the copy's mark once it was given to the device, or with what went wrong.
Given = Callable[[Mark | BaseException], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Upload:
    tensor: PagedTensor
    into: torch.Tensor
    after: Mark
    given: Given


class HostCopier:
    """Copies tensors of one mover into given device memory.

    Args:
        below: whose host pages are read.
        accelerator: makes the copies.
        on_failure: called on the first thread with what a ``given`` raised; the thread goes on.
        sink: takes an UPLOAD for each copy.

    Raises:
        StorageError: the system starts no more threads.
    """

    def __init__(self, below: Mover, accelerator: Accelerator, on_failure: Callable[[BaseException], None], sink: EventSink) -> None:
        self._below = below
        self._accelerator = accelerator
        self._sink = sink
        self._on_failure = on_failure
        self._waiting: list[_Upload] = []  # guarded by below.changed, as are the next four
        self._closing = False
        self._gate = threading.Event()
        self.copied_bytes = 0
        self.busy_s = 0.0
        self._under_way: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        below.on_change(self._look)
        # Daemons, as I/O threads are: a program that dies without closing its engine must not hang on them.
        self._begins = threading.Thread(target=self._run, name="pagemem-h2d", daemon=True)
        self._ends = threading.Thread(target=self._run_ends, name="pagemem-h2d-ends", daemon=True)
        with small_stacks():
            self._ends.start()
            try:
                self._begins.start()
            except BaseException:
                self._under_way.put(None)
                raise

    def submit(self, tensor: PagedTensor, into: torch.Tensor, after: Mark, given: Given) -> None:
        """Copy ``tensor`` into device memory once it is in host memory. Never blocks.

        Args:
            into: bytes, flat, as many as the tensor has.
            after: behind what used that memory last.
            given: called on the copier's thread.
        """
        with self._below.changed:
            self._waiting.append(_Upload(tensor, into, after, given))
            self._look()

    def begun(self, tensor: PagedTensor, copy: Copy) -> None:
        """A copy up from the pages of a tensor, for which `Mover.begin_upload` was called, was given to the device by somebody else."""
        self._ends_by(partial(self._finish, tensor, copy), copy)

    def arrives(self, tensor: PagedTensor, mark: Mark) -> None:
        """A copy down into the pages of a tensor, for which `Mover.begin_arrival` was called, was given to the device."""
        self._ends_by(partial(self._arrived, tensor, mark), mark)

    def _ends_by(self, finish: Callable[[], None], mark: Mark) -> None:
        """Have a copy's end noted: now, where it is made already, else by the thread that waits for it."""
        if mark.reached():
            finish()
        else:
            self._under_way.put(finish)

    def take_back(self, tensor: PagedTensor) -> bool:
        """Forget the copy of a tensor if it has not begun; returns whether it was forgotten. Any thread."""
        with self._below.changed:
            kept = [upload for upload in self._waiting if upload.tensor is not tensor]
            found, self._waiting = len(kept) < len(self._waiting), kept
            return found

    def close(self) -> None:
        """Make the copies that can be made, end and join the threads. Idempotent."""
        with self._below.changed:
            self._closing = True
        self._gate.set()
        self._begins.join()
        self._under_way.put(None)
        self._ends.join()

    def _look(self) -> None:
        if any(upload.tensor.readable for upload in self._waiting):
            self._gate.set()

    def _run(self) -> None:
        while True:
            with self._below.changed:
                begun = self._begin()
                if begun is None:
                    if self._closing:
                        return
                    self._gate.clear()
            if begun is None:
                self._gate.wait()
                continue
            try:
                self._give(*begun)
            except BaseException as failure:  # whatever it is: a thread that ends silently leaves its waiters for ever
                self._on_failure(failure)
            # Not kept while waiting for the next one: it holds views of both arenas.
            del begun

    def _run_ends(self) -> None:
        while (finish := self._under_way.get()) is not None:
            try:
                finish()
            except BaseException as failure:  # likewise
                self._below.note_failure(failure)
            del finish

    def _begin(self) -> tuple[_Upload, torch.Tensor] | None:
        """The first copy whose host pages are there, and their bytes. With the lock held."""
        upload = next((upload for upload in self._waiting if upload.tensor.readable), None)
        if upload is None:
            return None
        self._waiting.remove(upload)
        return upload, self._below.begin_upload(upload.tensor)

    def _give(self, upload: _Upload, source: torch.Tensor) -> None:
        """Have one copy made, and tell who asked."""
        try:
            copy = self._accelerator.copy_up(source, upload.into, upload.after)
        except BaseException as error:  # it goes to who asked, and from there to the training thread
            self._below.end_upload(upload.tensor)
            upload.given(error)
            return
        self.begun(upload.tensor, copy)
        upload.given(copy)

    def _finish(self, tensor: PagedTensor, copy: Copy) -> None:
        """Wait until a copy is made; its host pages may be changed then."""
        spent_s = 0.0
        try:
            copy.wait()
            spent_s = copy.seconds()
        finally:
            with self._below.changed:
                self.copied_bytes += tensor.n_bytes
                self.busy_s += spent_s
                self._below.end_upload(tensor)
        self._sink.emit(Event(EventKind.UPLOAD, tensor.name, tensor.n_bytes, time.perf_counter() - spent_s, spent_s))

    def _arrived(self, tensor: PagedTensor, mark: Mark) -> None:
        """Wait until a copy down is made; its host pages may be read and stored then."""
        try:
            mark.wait()
        finally:
            self._below.end_arrival(tensor)
