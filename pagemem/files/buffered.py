"""The aiofiles backend, for file systems that refuse O_DIRECT: the same contract through the page cache.

Reads and writes have an event loop each, in an owned thread, with an executor of its own, so that neither starves the
other. Files are opened by aiofiles; the transfers are positional (`aiofiles.ospath.wrap` of preadv and pwritev), as
seek and read on a handle shared by several requests would not be one step. The caller's thread blocks until its
transfer is over.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import aiofiles  # type: ignore[import-untyped]
import aiofiles.ospath  # type: ignore[import-untyped]

from pagemem.files import raw_file
from pagemem.files.threads import small_stacks
from pagemem.folders.own_file import open_file

Result = TypeVar("Result")
_Transfer = Callable[[int, Sequence[memoryview], int], Awaitable[int]]

# Looked up in os at each call: tests put others there.
_preadv: Final[_Transfer] = aiofiles.ospath.wrap(lambda *call: os.preadv(*call))
_pwritev: Final[_Transfer] = aiofiles.ospath.wrap(lambda *call: os.pwritev(*call))
_fsync: Final[Callable[[int], Awaitable[None]]] = aiofiles.ospath.wrap(lambda fd: os.fsync(fd))


class AiofilesBackend:
    """Page files behind aiofiles; see `pagemem.files.backend.RawBackend` for the contract.

    Args:
        n_workers: transfers under way at a time, in each direction.

    Raises:
        StorageError: the system starts no more threads; none is left running.
    """

    name: Final = "aiofiles"

    def __init__(self, n_workers: int) -> None:
        self._paths: list[str] = []
        self._handles: list[Any] = []
        self._fds: list[int] = []
        self._reads = _LoopThread("pagemem-aio-read", n_workers)
        try:
            self._writes = _LoopThread("pagemem-aio-write", n_workers)
        except BaseException:
            self._reads.close()
            raise

    def open(self, path: str) -> int:
        """Open or make the file; returns its index."""
        raw_file.ensure_file(path)
        handle = self._writes.run(_open(path))
        self._paths.append(path)
        self._handles.append(handle)
        self._fds.append(handle.fileno())
        return len(self._handles) - 1

    def allocate(self, file: int, old_bytes: int, new_bytes: int) -> None:
        """See `raw_file.allocate`."""
        raw_file.allocate(self._paths[file], self._fds[file], old_bytes, new_bytes)

    def shrink(self, file: int, n_bytes: int) -> None:
        """See `raw_file.shrink`."""
        raw_file.shrink(self._fds[file], n_bytes)

    def read_into(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """One preadv through the read loop; returns the number of bytes read."""
        return self._reads.run(_transfer(_preadv, self._fds[file], buffers, offset_bytes))

    def write_from(self, file: int, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """One pwritev through the write loop; returns the number of bytes written."""
        return self._writes.run(_transfer(_pwritev, self._fds[file], buffers, offset_bytes))

    def sync(self, file: int) -> None:
        """fsync through the write loop."""
        self._writes.run(_sync(self._fds[file]))

    def stat(self, file: int) -> os.stat_result:
        """fstat."""
        return os.fstat(self._fds[file])

    def close(self) -> None:
        """Close the files, end the loops and join their threads. Idempotent."""
        handles, self._handles, self._fds = dict(zip(self._fds, self._handles, strict=True)), [], []
        try:
            raw_file.close_all(list(handles), lambda fd: self._writes.run(_close(handles[fd])))
        finally:
            self._reads.close()
            self._writes.close()


async def _open(path: str) -> Any:
    # With "r+" the flags that come here are O_RDWR | O_CLOEXEC.
    return await aiofiles.open(path, "r+b", buffering=0, opener=lambda path, flags: open_file(path, flags))


async def _close(handle: Any) -> None:
    await handle.close()


async def _transfer(transfer: _Transfer, fd: int, buffers: Sequence[memoryview], offset_bytes: int) -> int:
    return await transfer(fd, buffers, offset_bytes)


async def _sync(fd: int) -> None:
    await _fsync(fd)


class _LoopThread:
    """An event loop running in an owned thread, with ``n_workers`` owned executor threads; all started or none."""

    def __init__(self, name: str, n_workers: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._executor = ThreadPoolExecutor(n_workers, thread_name_prefix=f"{name}-worker")
        self._loop.set_default_executor(self._executor)
        self._thread: threading.Thread | None = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
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

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run the coroutine in the loop and wait for its result; any thread but the loop's."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

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
