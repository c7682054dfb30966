"""Owned I/O threads: small stacks, names, a FIFO queue, and an end that lets queued work complete first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

from pagemem.units import KiB

Item = TypeVar("Item")

#: RLIMIT_DATA counts whole stacks, touched or not, and libc's default is 8 MiB a thread.
STACK_BYTES: Final = 512 * KiB

_stack_size_lock = threading.Lock()


@contextmanager
def small_stacks() -> Iterator[None]:
    """Threads started inside have stacks of `STACK_BYTES`; the process-wide setting is put back after."""
    with _stack_size_lock:
        before_bytes = threading.stack_size(STACK_BYTES)
        try:
            yield
        finally:
            threading.stack_size(before_bytes)


class IoPool(Generic[Item]):
    """Threads that serve the items of one queue in order of arrival.

    Args:
        name: prefix of the threads' names.
        n_threads: how many items are served at a time.
        serve: called on a pool thread with one item.
        on_failure: called on a pool thread with what ``serve`` raised; the thread goes on with the next item.
    """

    def __init__(
        self, name: str, n_threads: int, serve: Callable[[Item], None], on_failure: Callable[[BaseException], None]
    ) -> None:
        self._serve = serve
        self._on_failure = on_failure
        self._queue: SimpleQueue[Item | None] = SimpleQueue()
        # Daemons: a program that dies without closing its engine must not hang on idle threads at exit.
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(n_threads)]
        with small_stacks():
            for thread in self._threads:
                thread.start()

    def submit(self, item: Item) -> None:
        """Queue one item; any thread, never blocks. Not after `close` was called."""
        self._queue.put(item)

    def close(self) -> None:
        """Serve what is queued, then end and join the threads. Not on a pool thread. Idempotent."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._serve(item)
            except BaseException as failure:  # whatever a callback raised must neither end the thread nor get lost
                self._on_failure(failure)
            # Not kept while waiting for the next one: it holds the caller's buffer.
            del item
