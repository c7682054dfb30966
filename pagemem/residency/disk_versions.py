"""Copies of paged tensors in the page files, some of which commits name. Guarded by the mover's lock.

A tensor has one *current* copy, where it is read from and written to. A copy that a commit names is never written
again: the next store of its tensor goes to fresh frames (copy on write), and the old copy stays until no commit names
it. So a commit costs what has changed since the last one, and at most doubles the room that the changing tensors take.

After a failed sync the system may call what it could not write clean: no later sync says anything about it. So all
copies written since the last good sync are *lost*: their tensors are stored anew, elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from pagemem.files.checksums import DigestArray
from pagemem.files.page_file import PageFiles
from pagemem.files.requests import Route
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import Placement, Shortage, TensorId
from pagemem.telemetry.recorder import Recorder
from pagemem.tier import Tag, Tier


@dataclass(slots=True, eq=False)
class DiskVersion:
    """Frames of the page files that hold, or are to hold, one tensor's bytes.

    Attributes:
        placement: the frames; its ``tensor`` is the copy's own name in the allocator, not the paged tensor's id.
        current: whether a tensor reads and writes it.
        commits: commits that name it.
        lost: it was written before a sync that failed, so that the disk may not have it, whatever a later sync says.
    """

    placement: Placement
    route: Route
    current: bool = True
    commits: int = 0
    lost: bool = False


class DiskVersions:
    """Gives out and takes back page-file frames.

    Args:
        files: where they are.
        page_bytes: size of a frame.

    Attributes:
        watcher: is told of bytes taken and given back, while somebody profiles.
    """

    def __init__(self, files: PageFiles, page_bytes: int) -> None:
        self.book = PageAllocator(Tier.SSD, page_bytes, files.n_frames)
        self.watcher: Recorder | None = None
        self._files = files
        self._next = 0
        self._unsynced: set[DiskVersion] = set()
        self._tags: dict[TensorId, Tag] = {}

    def held(self) -> dict[Tag, int]:
        """Bytes of all copies by what they hold. O(copies)."""
        found: dict[Tag, int] = {}
        for key, tag in self._tags.items():
            found[tag] = found.get(tag, 0) + self.book.placements[key].n_bytes
        return found

    def take(self, n_bytes: int, tag: Tag) -> DiskVersion:
        """Frames for ``n_bytes`` bytes, as a tensor's current copy; the page files grow when they have none.

        Raises:
            DiskFullError: there is no room on the disk; nothing was changed.
        """
        key = self._key()
        placed = self.book.allocate(key, n_bytes)
        if isinstance(placed, Shortage):
            self._grow(placed.wanted_frames)
            placed = self.book.allocate(key, n_bytes)
        if isinstance(placed, Shortage):
            raise AssertionError(f"no page-file frames after growing: {placed}")
        self._keep(placed, tag)
        return DiskVersion(placed, self._files.route(placed.extents(self.book.page_bytes)))

    def reserve(self, n_frames: int) -> None:
        """Have ``n_frames`` free frames.

        Raises:
            DiskFullError: there is no room on the disk for so many; nothing was changed.
        """
        if self.book.free_frames < n_frames:
            self._grow(n_frames - self.book.free_frames)

    def leave(self, stored: DiskVersion) -> None:
        """The tensor has another current copy, or none: the frames are free unless a commit names them."""
        stored.current = False
        self._free_if_unused(stored)

    def hold(self, stored: DiskVersion) -> None:
        """One more commit names the copy."""
        stored.commits += 1

    def let_go(self, stored: DiskVersion) -> None:
        """One commit less names the copy."""
        if stored.commits < 1:
            raise AssertionError("a copy that no commit names is let go")
        stored.commits -= 1
        self._free_if_unused(stored)

    def restore(self, placed: Placement, sums: DigestArray, tag: Tag) -> DiskVersion:
        """A copy that is in the page files already, as an earlier run's commit says; no tensor's current one yet.

        Raises:
            AssertionError: the frames are not free.
        """
        beyond = max((e.frame for e in placed.extents(self.book.page_bytes)), default=-1) + 1 - self.book.n_frames
        if beyond > 0:
            self._grow(beyond)
        own = Placement(self._key(), Tier.SSD, placed.n_bytes, placed.runs, placed.tail)
        self.book.put(own)
        self._keep(own, tag)
        route = self._files.route(own.extents(self.book.page_bytes))
        self._files.remember(route, sums)
        return DiskVersion(own, route, current=False)

    def used_frames_after(self, n_bytes: Iterable[int]) -> int:
        """Frames in use once copies of these sizes have been taken, in this order."""
        sizes = list(n_bytes)
        if not sizes:
            return self.book.used_frames
        tried = copy.deepcopy(self.book)
        tried.grow(sum(-(-size // tried.page_bytes) for size in sizes))
        for size in sizes:
            tried.allocate(self._key(), size)
        return tried.used_frames

    def wrote(self, stored: DiskVersion) -> None:
        """The copy has been written, whole; it is durable once a sync has succeeded that begins now or later."""
        self._unsynced.add(stored)

    def begin_sync(self) -> set[DiskVersion]:
        """The copies that a sync which begins now makes durable."""
        written, self._unsynced = self._unsynced, set()
        return written

    def sync_failed(self, written: set[DiskVersion]) -> None:
        """That sync has failed: they are lost, and so is what was written meanwhile.

        Nothing is written to their frames any more while this run lasts: a file system may have lost what it keeps of
        those blocks, too (ext4 without a journal that they have content at all), and writing them again need not mend
        that.
        """
        for stored in written | self._unsynced:
            if not stored.lost:
                stored.lost = True
                stored.commits += 1  # for good
        self._unsynced = set()

    def _free_if_unused(self, stored: DiskVersion) -> None:
        if not stored.current and not stored.commits:
            placed = self.book.release(stored.placement.tensor)
            self._unsynced.discard(stored)
            tag = self._tags.pop(placed.tensor)
            if self.watcher is not None:
                self.watcher.held(Tier.SSD, tag, -placed.n_bytes)

    def _keep(self, placed: Placement, tag: Tag) -> None:
        self._tags[placed.tensor] = tag
        if self.watcher is not None:
            self.watcher.held(Tier.SSD, tag, placed.n_bytes)

    def _grow(self, n_frames: int) -> None:
        self._files.grow(self.book.n_frames + n_frames)
        self.book.grow(self._files.n_frames - self.book.n_frames)

    def _key(self) -> TensorId:
        self._next += 1
        return TensorId(self._next)
