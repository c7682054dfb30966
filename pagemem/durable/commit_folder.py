"""The commits of a run on the disk: one manifest file each, written whole or not at all.

A manifest is written under another name, synced, renamed, and the folder synced: after a crash at any instant there is
the whole file or none. The page files must have been synced before. A commit is removed durably before its frames are
used again, so that a manifest that can be read never names bytes that have changed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from xxhash import xxh3_128, xxh3_128_hexdigest

from pagemem.durable.manifest import MAX_BYTES, Manifest
from pagemem.errors import CommitError, DamagedCommitError, UnknownCommitError
from pagemem.folders.own_file import has_folder, kind_of, make_folder, naming, remove_file, replace_file, sync_folder
from pagemem.folders.small_file import NO_FILE, open_regular, read_small

FOLDER_NAME: Final = "commits"
_NAME: Final = re.compile(r"commit-(\d{8,})\.json")
_PART_BYTES: Final = 1 << 20
_OURS: Final = re.compile(r"commit-\d{8,}\.(json|safetensors)(\.new)?")


class CommitFolder:
    """Reads and writes the commits in a run directory. One thread at a time.

    Args:
        run: the run directory, locked by the caller.

    Attributes:
        uncertain: numbers of commits that were removed, of which a crash may bring back the manifest.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / FOLDER_NAME
        self.uncertain: set[int] = set()
        self._made = False

    def numbers(self) -> list[int]:
        """Numbers of the commits there are, damaged or not, ascending."""
        if not has_folder(self.path):
            return []
        with naming("listing", self.path):
            matches = [_NAME.fullmatch(name) for name in os.listdir(self.path)]
        return sorted(int(match[1]) for match in matches if match is not None)

    def read(self, number: int) -> Manifest:
        """One commit's manifest.

        Raises:
            DamagedCommitError: it was read, and is not what was written; names the file and says how.
            UnknownCommitError: it cannot be read now, which says nothing about what is in it, or is of another version.
            CommitError: it says what no run does, or is no file.
        """
        path = self.manifest(number)
        try:
            manifest = Manifest.decode(read_small(path, MAX_BYTES))
        except OSError as error:
            raise _unreadable(path, error) from error
        except CommitError as error:
            raise type(error)(f"{path} is damaged: {error}") from error
        if manifest.number != number:
            raise CommitError(f"{path} is damaged: it is commit {manifest.number}")
        return manifest

    def write(self, manifest: Manifest, content: bytes | None = None) -> None:
        """Make a commit durable.

        Args:
            content: ``manifest.encode()``, where the caller has it already.

        Raises:
            CommitError: it would be too large to be read back.
            StorageError: it cannot be written. Whether there is such a commit after a crash is not known before
                `remove` succeeds.
        """
        content = manifest.encode() if content is None else content
        if len(content) > MAX_BYTES:
            raise CommitError(
                f"the manifest would have {len(content)} bytes, at most {MAX_BYTES} are read back; track smaller "
                "states or take larger pages"
            )
        self._make()
        replace_file(self.manifest(manifest.number), content)

    def write_sidecar(self, number: int, content: bytes) -> dict[str, str | int]:
        """Make a commit's small tensors durable, before its manifest; returns what `open_sidecar` must be given."""
        self._make()
        replace_file(self.sidecar(number), content)
        return {"n_bytes": len(content), "xxh3": xxh3_128_hexdigest(content)}

    def open_sidecar(self, number: int, told: Mapping[str, str | int]) -> int:
        """A commit's small tensors, as a descriptor of their file for reading, which is the caller's to close.

        Raises:
            DamagedCommitError: they are not what was written.
            CommitError: there are none, or they cannot be read now, which says nothing about what is in them.
        """
        path = self.sidecar(number)
        try:
            fd, n_bytes = open_regular(path, 2**62)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            digest, at = xxh3_128(), 0
            # A file of another size is not read at all, however large it is.
            while n_bytes == told["n_bytes"] and (part := os.pread(fd, _PART_BYTES, at)):
                digest.update(part)
                at += len(part)
            if {"n_bytes": at, "xxh3": digest.hexdigest()} != told:
                raise DamagedCommitError(f"{path} is damaged: it is not what was written")
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise _unreadable(path, error) from error
            raise
        return fd

    def remove(self, number: int) -> None:
        """Remove a commit durably. There may be none.

        Raises:
            StorageError: it may still be there after a crash. Where it is gone for now, that can never be made certain,
                as no later sync tells: its number is in ``uncertain`` then, and its frames must not be used any more.
        """
        if not has_folder(self.path):
            return
        remove_file(self.manifest(number))
        self.uncertain.add(number)
        sync_folder(self.path)
        self.uncertain.discard(number)
        remove_file(self.sidecar(number))

    def sweep(self) -> None:
        """Remove what a crash left of commits that there are not: drafts, and small tensors without a manifest."""
        wanted = {path.name for number in self.numbers() for path in (self.manifest(number), self.sidecar(number))}
        with naming("listing", self.path):
            names = [name for name in os.listdir(self.path) if _OURS.fullmatch(name) and name not in wanted]
            left = [name for name in names if kind_of(self.path / name) == "a file"]
        for name in left:
            remove_file(self.path / name)

    def _make(self) -> None:
        """Have the folder, durably."""
        if not self._made:
            if has_folder(self.path):
                sync_folder(self.path.parent)  # a crash may have come between its making and that
            else:
                make_folder(self.path)
            self._made = True

    def sidecar(self, number: int) -> Path:
        """Where a commit's small tensors lie."""
        return self.path / f"commit-{number:08d}.safetensors"

    def manifest(self, number: int) -> Path:
        """Where a commit's manifest lies."""
        return self.path / f"commit-{number:08d}.json"


def _unreadable(path: Path, error: OSError) -> CommitError:
    """What to raise where a file of a commit cannot be read: of what is no file that can be said for good."""
    kind = CommitError if error.errno in {*NO_FILE, errno.ENOENT} else UnknownCommitError
    return kind(f"{path} cannot be read: {error.strerror}")
