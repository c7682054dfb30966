"""Calls of the system through aiofiles, for file systems that refuse O_DIRECT."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import aiofiles.ospath  # type: ignore[import-untyped]

from pagemem.files.threads import small_stacks

Result = TypeVar("Result")


class AiofilesThreads:
    """An event loop in an owned thread, with ``n_workers`` owned executor threads; all started or none.

    Raises:
        StorageError: the system starts no more threads; none is left running.
    """

    def __init__(self, n_workers: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._executor = ThreadPoolExecutor(n_workers, thread_name_prefix="pagemem-aio-worker")
        self._loop.set_default_executor(self._executor)
        self._thread: threading.Thread | None = threading.Thread(
            target=self._loop.run_forever, name="pagemem-aio", daemon=True
        )
        # The executor starts a thread only when all are busy: hold them up, so that all start here.
        everybody_started = threading.Barrier(n_workers + 1)
        try:
            with small_stacks():
                self._thread.start()
                for _ in range(n_workers):
                    self._executor.submit(everybody_started.wait)
        except BaseException:
            everybody_started.abort()
            self.close()
            raise
        everybody_started.wait()

    def run(self, function: Callable[..., Result], *args: object) -> Result:
        """Call the function in an executor thread and wait for its result; any thread but the loop's."""
        called = asyncio.run_coroutine_threadsafe(aiofiles.ospath.wrap(function)(*args), self._loop)
        result: Result = called.result()
        return result

    def close(self) -> None:
        """End the loop and all threads, and join them. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if thread.ident is not None:  # None: it could not be started
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
        self._executor.shutdown(wait=True)
        self._loop.close()
