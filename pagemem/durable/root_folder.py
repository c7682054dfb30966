"""Roots of commits of several ranks: one small file for each, which says that all ranks' parts of it are durable.

Every rank has a folder of its own, with page files and manifests like those of a single process. Its manifest of a
commit counts only where there is a root of that number: the first rank writes it once all have said that theirs is
durable, and removes it before any of them is removed. So a commit is on all ranks, or on none.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, TypeAdapter
from xxhash import xxh3_128_hexdigest

from pagemem.errors import CommitError, DamagedCommitError, UnknownCommitError
from pagemem.folders.own_file import has_folder, make_folder, naming, remove_file, replace_file, sync_folder
from pagemem.folders.small_file import Count, Line, Record, checked, parse_json, read_small

#: In a run's folder; in it one folder for each shape of ranks that the run has had.
FOLDER_NAME: Final = "ranks"
FORMAT: Final = "offload-ranks-1"
_NAME: Final = re.compile(r"commit-(\d{8,})\.json")
_MAX_BYTES: Final = 1 << 20


class RootRecord(Record):
    """What a root says.

    Attributes:
        shape: number of the folder with the ranks' folders. sharing: how they share the model, as JSON text.
        part_digests: xxh3 of each rank's manifest file.
    """

    number: Annotated[int, Field(strict=True, gt=0, le=2**40)]
    name: Line | None
    created: Line
    step: Count
    shape: Count
    n_ranks: Annotated[int, Field(strict=True, gt=0, le=2**20)]
    sharing: Annotated[str, Field(strict=True, max_length=1 << 16)]
    part_digests: tuple[Line, ...]


_ROOT: Final = TypeAdapter(RootRecord)


def digest_of(content: bytes) -> str:
    """What a root says of a rank's manifest file."""
    return xxh3_128_hexdigest(content)


class RootFolder:
    """Reads and writes the roots of a run. Nothing is changed until `write`. One thread at a time.

    Args:
        run: the run's folder; whoever writes has it locked.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / FOLDER_NAME

    def rank_path(self, shape: int, rank: int) -> Path:
        """A rank's folder."""
        return self.path / f"shape-{shape}" / f"rank-{rank}"

    def root(self, number: int) -> Path:
        """Where a root lies."""
        return self.path / f"commit-{number:08d}.json"

    def numbers(self) -> list[int]:
        """Numbers of the roots there are, damaged or not, ascending."""
        if not has_folder(self.path):
            return []
        with naming("listing", self.path):
            matches = [_NAME.fullmatch(name) for name in os.listdir(self.path)]
        return sorted(int(match[1]) for match in matches if match is not None)

    def read(self, number: int) -> RootRecord:
        """One root.

        Raises:
            DamagedCommitError: it is not what was written. UnknownCommitError: it cannot be read now, or is of another
                version. CommitError: it says what no run does.
        """
        path = self.root(number)
        try:
            header, _, body = read_small(path, _MAX_BYTES).partition(b"\n")
        except OSError as error:
            raise UnknownCommitError(f"{path} cannot be read: {error.strerror}") from error
        words = header.decode("ascii", errors="replace").split(" ")
        if words[0] != FORMAT:
            raise UnknownCommitError(f"{path} begins with {words[0][:40]!r}, not {FORMAT!r}: it is of another version")
        if words[1:] != [str(len(body)), digest_of(body)]:
            raise DamagedCommitError(f"{path} is damaged: its content is not what was written")
        try:
            found = checked(_ROOT, parse_json(body))
        except ValueError as error:
            raise CommitError(f"{path} is damaged: {error}") from error
        if found.number != number or len(found.part_digests) != found.n_ranks:
            raise CommitError(f"{path} is damaged: it is commit {found.number} of {len(found.part_digests)} ranks")
        return found

    def write(self, record: RootRecord) -> None:
        """Make a commit count, durably.

        Raises:
            StorageError: it cannot be written; whether it is there after a crash is not known.
        """
        if has_folder(self.path):
            sync_folder(self.path.parent)
        else:
            make_folder(self.path)
        body = json.dumps(record.model_dump(mode="json"), separators=(",", ":")).encode()
        replace_file(self.root(record.number), f"{FORMAT} {len(body)} {digest_of(body)}\n".encode() + body)

    def remove(self, number: int) -> None:
        """Have a commit count no more, durably; there may be none.

        Raises:
            StorageError: it may still be there after a crash.
        """
        if has_folder(self.path):
            remove_file(self.root(number))
            sync_folder(self.path)
