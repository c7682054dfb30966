"""The page files of one tier as files: opened together, lengthened all or none, synced, and checked for others' doings.

What is in them, and who moves it, is `pagemem.files.page_file`'s business.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from pagemem.errors import StorageError
from pagemem.files.backend import RawBackend
from pagemem.folders.own_file import kind_of, naming, os_failure


class FileSet:
    """One file a path, open in one backend, whose index of a file is that of its path. Any thread.

    Args:
        backend: has no files yet; closed by `close`, and where this raises.
        page_bytes: size of a frame.

    Raises:
        StorageError: a file cannot be opened; none is left open.
    """

    def __init__(self, backend: RawBackend, paths: Sequence[str], page_bytes: int) -> None:
        self.backend = backend
        self._paths = paths
        self._page_bytes = page_bytes
        try:
            for path in paths:
                with naming("opening", path):
                    backend.open(path)
        except BaseException:
            with suppress(OSError):  # what failed first is what to raise; all are closed
                backend.close()
            raise

    def lengthen(self, old_frames: Sequence[int], new_frames: Sequence[int]) -> None:
        """Give each file room for more frames, all files or none.

        Raises:
            DiskFullError, StorageError: one cannot be lengthened; none is.
        """
        grown: list[tuple[int, int]] = []  # those of an earlier run are longer than what has been asked for here
        for file, path in enumerate(self._paths):
            old_bytes, new_bytes = old_frames[file] * self._page_bytes, new_frames[file] * self._page_bytes
            if old_bytes == new_bytes:
                continue
            try:
                size_bytes = self.backend.stat(file).st_size
                self.backend.allocate(file, old_bytes, new_bytes)
                grown.append((file, size_bytes))
            except BaseException as error:
                for earlier, size_bytes in grown:
                    with suppress(OSError):  # a longer file harms nobody
                        self.backend.shrink(earlier, size_bytes)
                if isinstance(error, OSError):
                    raise os_failure(error, "growing", path, old_bytes, new_bytes - old_bytes) from error
                raise

    def sync(self) -> None:
        """Make durable what was written.

        Raises:
            StorageError: a file could not be synced.
        """
        for file, path in enumerate(self._paths):
            with naming("syncing", path):
                self.backend.sync(file)

    def check(self, n_frames: Sequence[int]) -> None:
        """Look whether each file is still the one that was opened, under its name, and has its ``n_frames``.

        Raises:
            StorageError: it was removed, replaced or cut while it was used.
        """
        for file, path in enumerate(self._paths):
            with naming("looking at", path):
                opened = self.backend.stat(file)
                named = os.lstat(path) if kind_of(path) is not None else None
            wanted_bytes = n_frames[file] * self._page_bytes
            if named is None or not os.path.samestat(named, opened):
                what = f"was {'removed' if named is None else 'replaced by another file'}"
            elif opened.st_size < wanted_bytes:
                what = f"was cut from {wanted_bytes} to {opened.st_size} bytes"
            else:
                continue
            raise StorageError(
                f"{path} {what} while this run used it, so nothing can be committed any more: take the weights by "
                "state_dict(), and begin in another folder"
            )

    def close(self) -> None:
        """Close all files. Idempotent.

        Raises:
            StorageError: one could not be closed; the system has let go of it, too.
        """
        with naming("closing", ", ".join(self._paths)):
            self.backend.close()
