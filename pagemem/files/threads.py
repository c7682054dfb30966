"""Owned I/O threads: small stacks, names, a FIFO queue, and an end that lets queued work complete first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

from pagemem.errors import StorageError
from pagemem.units import KiB

Item = TypeVar("Item")

#: RLIMIT_DATA counts whole stacks, touched or not, and libc's default is 8 MiB a thread.
STACK_BYTES: Final = 512 * KiB

_stack_size_lock = threading.Lock()


@contextmanager
def small_stacks() -> Iterator[None]:
    """Threads started inside have stacks of `STACK_BYTES`; the process-wide setting is put back after.

    Nothing but starting threads belongs inside.

    Raises:
        StorageError: the system starts no more threads; those started before are the caller's to end.
    """
    with _stack_size_lock:
        before_bytes = threading.stack_size(STACK_BYTES)
        try:
            yield
        except RuntimeError as error:  # what Thread.start raises
            raise StorageError(
                f"an I/O thread could not be started ({error}): a stack of {STACK_BYTES} bytes does not fit the limit "
                "on data, or there are too many threads. Raise the limit (ulimit -d, ulimit -u) or lower ssd.threads."
            ) from error
        finally:
            threading.stack_size(before_bytes)


def start_thread(thread: threading.Thread) -> None:
    """Start a thread that computes, on a stack of the usual size.

    Raises:
        StorageError: the system starts no more threads.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise StorageError(
            f"the thread {thread.name} could not be started ({error}): its stack does not fit the limit on memory, or "
            "there are too many threads. Raise the limit (ulimit -v, ulimit -d, ulimit -u, or the pids limit of the "
            "container)."
        ) from error


class IoPool(Generic[Item]):
    """Threads that serve the items of one queue in order of arrival, background items when no others wait.

    A thread that submits to its own pool while it serves (a callback that begins the next transfer) wakes nobody for
    the first such item: it looks at the queue itself right after. Waking an idle core costs up to 0.1 ms in a virtual
    machine, a tenth of the transfer of 4 MiB. Of idle threads, the one that became idle last is woken.

    Every queued item has a thread that will look at the queue after the item was put there: one that was woken for it,
    the one that submitted it, or, when none is idle, all of them.

    Args:
        name: prefix of the threads' names.
        n_threads: how many items are served at a time.
        serve: called on a pool thread with one item.
        on_failure: called on a pool thread with what ``serve`` raised; the thread goes on with the next item.
        n_background: how many background items are served at a time, at least 1.

    Raises:
        StorageError: the system starts no more threads; none is left running.
    """

    def __init__(
        self,
        name: str,
        n_threads: int,
        serve: Callable[[Item], None],
        on_failure: Callable[[BaseException], None],
        n_background: int = 1,
    ) -> None:
        self._serve = serve
        self._on_failure = on_failure
        self._lock = threading.Lock()  # guards all below
        self._items: deque[Item] = deque()
        self._background: deque[Item] = deque()
        self._n_background = n_background  # how many more may be begun
        self._idle: list[threading.Lock] = []  # a gate each waiting thread is blocked on, the latest last
        self._will_look: dict[int, bool] = {}  # by thread id, whether it has spared somebody a waking
        self._closing = False
        # Daemons: a program that dies without closing its engine must not hang on idle threads at exit.
        self._threads: list[threading.Thread] = []
        try:
            with small_stacks():
                for i in range(n_threads):
                    thread = threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
                    thread.start()
                    self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def submit(self, item: Item, *, background: bool = False) -> None:
        """Queue one item; any thread, never blocks. Not after `close` was called."""
        me = threading.get_ident()
        with self._lock:
            (self._background if background else self._items).append(item)
            if background and not self._n_background:
                return  # who serves one of those under way looks here after it
            if self._will_look.get(me) is False:
                self._will_look[me] = True
                return
            if self._idle:
                # First opened, then forgotten: a signal's handler that raises in between must not leave a thread that
                # nobody wakes.
                _open(self._idle[-1])
                self._idle.pop()

    @property
    def has_waiting(self) -> bool:
        """Whether an item waits that is not a background one. Any thread; out of date at once."""
        return bool(self._items)

    def close(self) -> None:
        """Serve what is queued, then end and join the threads. Not on a pool thread. Idempotent."""
        with self._lock:
            self._closing = True
            for gate in self._idle:
                _open(gate)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        gate = threading.Lock()
        gate.acquire()
        while (chosen := self._next(gate)) is not None:
            item, background = chosen
            try:
                self._serve(item)
            except BaseException as failure:  # whatever a callback raised must neither end the thread nor get lost
                self._on_failure(failure)
            # Not kept while waiting for the next one: it holds the caller's buffer.
            del item, chosen
            if background:
                with self._lock:
                    self._n_background += 1

    def _next(self, gate: threading.Lock) -> tuple[Item, bool] | None:
        """The next item, waited for, and whether it is a background one; None when the pool closes and nothing is
        left."""
        while True:
            with self._lock:
                self._will_look[threading.get_ident()] = False
                if self._items:
                    return self._items.popleft(), False
                if self._background and self._n_background:
                    self._n_background -= 1
                    return self._background.popleft(), True
                # Background items that may not be begun yet are left to those who serve one: they look again after it.
                if self._closing:
                    return None
                if gate not in self._idle:
                    self._idle.append(gate)
            gate.acquire()


def _open(gate: threading.Lock) -> None:
    """Let the thread that waits at a gate, or is about to, go on. With the pool's lock held."""
    if gate.locked():
        gate.release()
