"""The commits of a run on the disk: one manifest file each, written whole or not at all.

A manifest is written under another name, synced, renamed, and the folder synced: after a crash at any instant there is
the whole file or none. The page files must have been synced before. A commit is removed durably before its frames are
used again, so that a manifest that can be read never names bytes that have changed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from xxhash import xxh3_128_hexdigest

from pagemem.errors import CommitError
from pagemem.manifest import Manifest
from pagemem.raw_file import sync_folder

FOLDER_NAME: Final = "commits"
_NAME: Final = re.compile(r"commit-(\d{8,})\.json")
_OURS: Final = re.compile(r"commit-\d{8,}\.(json|safetensors)(\.new)?")


class CommitFolder:
    """Reads and writes the commits in a run directory. One thread at a time.

    Args:
        run: the run directory, locked by the caller.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / FOLDER_NAME
        self._made = False

    def numbers(self) -> list[int]:
        """Numbers of the commits there are, damaged or not, ascending."""
        if not self.path.is_dir():
            return []
        matches = (_NAME.fullmatch(name) for name in os.listdir(self.path))
        return sorted(int(match[1]) for match in matches if match is not None)

    def read(self, number: int) -> Manifest:
        """One commit's manifest.

        Raises:
            CommitError: it is damaged; names the file and says how.
        """
        path = self._file(number)
        try:
            manifest = Manifest.decode(path.read_bytes())
        except OSError as error:
            raise CommitError(f"{path} cannot be read: {error.strerror}") from error
        except CommitError as error:
            raise CommitError(f"{path} is damaged: {error}") from error
        if manifest.number != number:
            raise CommitError(f"{path} is damaged: it is commit {manifest.number}")
        return manifest

    def write(self, manifest: Manifest, content: bytes | None = None) -> None:
        """Make a commit durable.

        Args:
            content: ``manifest.encode()``, where the caller has it already.

        Raises:
            OSError: it cannot be written. Whether there is such a commit after a crash is not known before `remove` succeeds.
        """
        self._make()
        self._replace(self._file(manifest.number), manifest.encode() if content is None else content)

    def write_beside(self, number: int, content: bytes) -> dict[str, str | int]:
        """Make a commit's small tensors durable, before its manifest; returns what `read_beside` must be given."""
        self._make()
        self._replace(self._beside(number), content)
        return {"n_bytes": len(content), "xxh3": xxh3_128_hexdigest(content)}

    def read_beside(self, number: int, told: dict[str, str | int]) -> bytes:
        """A commit's small tensors.

        Raises:
            CommitError: they are not what was written.
        """
        path = self._beside(number)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CommitError(f"{path} cannot be read: {error.strerror}") from error
        if {"n_bytes": len(content), "xxh3": xxh3_128_hexdigest(content)} != told:
            raise CommitError(f"{path} is damaged: it is not what was written")
        return content

    def remove(self, number: int) -> None:
        """Remove a commit durably. There may be none.

        Raises:
            OSError: it may still be there after a crash.
        """
        if not self.path.is_dir():
            return
        self._file(number).unlink(missing_ok=True)
        sync_folder(self.path)
        self._beside(number).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a crash left of commits that there are not: drafts, and small tensors without a manifest."""
        wanted = {path.name for number in self.numbers() for path in (self._file(number), self._beside(number))}
        for name in os.listdir(self.path):
            if _OURS.fullmatch(name) and name not in wanted:
                (self.path / name).unlink()

    def _make(self) -> None:
        """Have the folder, durably."""
        if not self._made:
            self.path.mkdir(exist_ok=True)
            sync_folder(self.path.parent)
            self._made = True

    def _file(self, number: int) -> Path:
        return self.path / f"commit-{number:08d}.json"

    def _beside(self, number: int) -> Path:
        return self.path / f"commit-{number:08d}.safetensors"

    def _replace(self, path: Path, content: bytes) -> None:
        draft = path.with_name(path.name + ".new")
        try:
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync_folder(self.path)
