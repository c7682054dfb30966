"""The commits that a run directory holds when it is opened, and the frames they name.

Commits lie in the first of the run's directories and name page files in all of them. An engine that is given other
directories, or the same in another order, would write over what they name: it is refused before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Final

import numpy as np
from pydantic import Field, TypeAdapter

from offload.budget.need import Sizes
from offload.commits.commit_state import read_commit, state_of
from offload.config import ConfigError
from pagemem.durable.commit_folder import CommitFolder
from pagemem.durable.manifest import Manifest
from pagemem.durable.page_map import file_sizes, frames_reached, impossible
from pagemem.errors import CommitError, UnknownCommitError
from pagemem.files.page_file import PAGE_FILE_NAME
from pagemem.files.striping import Striping
from pagemem.folders.own_file import kind_of, naming, os_failure, replace_file
from pagemem.folders.run_directory import RunDirectory
from pagemem.folders.small_file import NO_FILE, Line, Record, checked, parse_json, read_small
from pagemem.residency.disk_versions import DiskVersion, DiskVersions
from pagemem.tier import Tag

#: In every directory of a run that commits but the first: which one that is.
_PART_OF: Final = "commits-elsewhere.json"


class _Part(Record):
    run_id: Line
    path: Annotated[str, Field(strict=True, max_length=4096)]


_PART: Final = TypeAdapter(_Part)
_MAX_PART_BYTES: Final = 8192


@dataclass(frozen=True, slots=True, eq=False)
class Commit:
    """A whole commit and the copies it names, by `StoredTensor.key`."""

    manifest: Manifest
    copies: dict[str, DiskVersion]


class EarlierCommits:
    """Reads what there is; nothing is changed on the disk.

    Args:
        counting: numbers of those that count; None: all.

    Attributes:
        whole: the commits that can be used, by number.
        damaged: what is wrong with the others, by number.
        last_number: the greatest in use, damaged or not; 0 when there is none.

    Raises:
        ConfigError: the directories are not those, in their order, that the commits in one of them name.
        CommitError: a commit cannot be read now or by this version, or a page file is gone. No reason to
            remove it.
    """

    def __init__(self, directories: Sequence[RunDirectory], counting: Sequence[int] | None = None) -> None:
        self.folder = CommitFolder(directories[0].path)
        self.whole: dict[int, Commit] = {}
        self.damaged: dict[int, CommitError] = {}
        self._manifests: dict[int, Manifest] = {}
        self._directories = directories
        self._check_parts()
        run_ids = tuple(directory.run_id for directory in directories)
        for number in self.folder.numbers():
            if counting is not None and number not in counting:
                continue
            try:
                manifest = read_commit(self.folder, number)
            except UnknownCommitError as error:
                raise UnknownCommitError(
                    f"{error}. Nothing was changed; make it readable, or move it out of the folder to go on without it"
                ) from error
            except CommitError as error:
                self.damaged[number] = error
                continue
            if manifest.run_ids != run_ids:
                raise ConfigError(
                    f"commit {number} in {self.folder.path} is of a run with {len(manifest.run_ids)} folders in "
                    "ssd.paths, which are not those given now; give the same folders in the same order, or others"
                )
            self._manifests[number] = manifest
        file_bytes = file_sizes(directory.path / PAGE_FILE_NAME for directory in directories)
        for number, why in impossible(list(self._manifests.values()), file_bytes).items():
            self._refuse_lost_pages(self._manifests[number], file_bytes)
            del self._manifests[number]
            self.damaged[number] = CommitError(f"{self.folder.manifest(number)} is damaged: {why}")
        for number in set(counting or ()) - self._manifests.keys() - self.damaged.keys():
            self.damaged[number] = CommitError(f"{self.folder.manifest(number)} is gone")
        self.last_number = max([0, *self._manifests, *self.damaged])

    def leave_out(self, numbers: Iterable[int], why: str) -> None:
        """Some commits cannot be used, for a reason that lies elsewhere. Before `restore`."""
        for number in numbers:
            del self._manifests[number]
            self.damaged[number] = CommitError(f"commit {number} in {self.folder.path} cannot be used: {why}")

    def _refuse_lost_pages(self, manifest: Manifest, file_bytes: Sequence[int]) -> None:
        """Raise where a page file is gone, or was cut and nothing could tell: it would be made anew, and its zeros pass
        for pages."""
        n_frames = frames_reached(manifest)
        for path, frames in enumerate(Striping(len(file_bytes)).file_frames(n_frames)):
            n_bytes, wanted_bytes = file_bytes[path], frames * manifest.page_bytes
            if n_bytes < wanted_bytes and (not n_bytes or not manifest.checksums):
                raise CommitError(
                    f"{self._directories[path].path / PAGE_FILE_NAME} "
                    f"{f'has {n_bytes} bytes' if n_bytes else 'is gone or empty'}, and commit {manifest.number} names "
                    f"{wanted_bytes} bytes of it. Nothing was changed; put the file back, or move "
                    f"{self.folder.manifest(manifest.number)} away to go on without that commit"
                )

    def _check_parts(self) -> None:
        first = self._directories[0]
        for directory in self._directories[1:]:
            if CommitFolder(directory.path).numbers():
                raise ConfigError(
                    f"{directory.path} holds commits, so it is the first of its run's ssd.paths; give that run's "
                    "folders in their order"
                )
        for directory in self._directories:
            path = directory.path / _PART_OF
            try:
                part_of = checked(_PART, parse_json(read_small(path, _MAX_PART_BYTES)))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno not in NO_FILE:
                    raise os_failure(error, "reading", path) from error
                why = error.strerror if isinstance(error, OSError) else error
                raise ConfigError(
                    f"{path} cannot be read: {why}; if no run in another folder needs {directory.path}, remove it"
                ) from error
            if directory is first or part_of.run_id != first.run_id:
                raise ConfigError(
                    f"{directory.path} holds pages of the commits in {part_of.path}; give that run's folders in "
                    f"ssd.paths in their order, or others; if that run is gone, remove {path}"
                )

    def claim_parts(self) -> None:
        """Mark the other directories as parts of this run, durably, before a commit names their page files."""
        first = self._directories[0]
        for directory in self._directories[1:]:
            path = directory.path / _PART_OF
            with naming("looking for", path):
                claimed = kind_of(path) is not None
            if not claimed:
                replace_file(path, json.dumps({"run_id": first.run_id, "path": str(first.path)}).encode())

    def sizes(self, page_bytes: int, slice_numel: int, asked: int | str, *, checksums: bool) -> tuple[int, int]:
        """Page and slice size to go on with: the newest commit's, if there is one.

        Raises:
            ConfigError: the configuration asks for another page size than it has, or for checksums where it has none.
        """
        if not self._manifests:
            return page_bytes, slice_numel
        newest = self._manifests[max(self._manifests)]
        if asked != "auto" and page_bytes != newest.page_bytes:
            raise ConfigError(
                f"memory.page is {page_bytes}, the commits in {self.folder.path} have pages of {newest.page_bytes} "
                "bytes; "
                'use that, or "auto", or another folder'
            )
        if checksums and not all(manifest.checksums for manifest in self._manifests.values()):
            raise ConfigError(
                f"ssd.checksums is true, but commits in {self.folder.path} have none; set it to false, or name "
                "another folder"
            )
        return newest.page_bytes, int(newest.state["slice_numel"])

    def cut_sizes(self, sizes: Sizes, page_bytes: int, slice_numel: int) -> Sizes:
        """The sizes that say what is cut, with these pages and slices of states: those of the budget that the run's
        newest commit was cut for, or of this one where there is none.

        Raises:
            ConfigError: that commit has slices, which the configuration's mode or device does not.
        """
        sizes = replace(sizes, page_bytes=page_bytes, slice_numel=slice_numel)
        if not self._manifests:
            return sizes
        state = state_of(self._manifests[max(self._manifests)])
        slot = next((slot for unit in state.units for slot in unit.slots if slot.of is not None), None)
        if slot is not None and not sizes.cuts:
            raise ConfigError(
                f"the commits in {self.folder.path} have {slot.of} in slices, as their budget asked for, which only "
                'exact mode on the CPU has; set update.mode to "exact" and device to "cpu", or name another folder'
            )
        return replace(sizes, ram_bytes=state.cut_bytes, cuts=sizes.cuts and state.cut_bytes > 0)

    def restore(self, copies: DiskVersions) -> None:
        """Take the frames that the commits name, before anything else does."""
        known: dict[object, DiskVersion] = {}
        for number, manifest in sorted(self._manifests.items()):
            named: dict[str, DiskVersion] = {}
            for tensor in manifest.tensors:
                place = (tensor.runs, tensor.tail)
                if place not in known:
                    known[place] = copies.restore(
                        tensor.placement(), np.array(tensor.sums, dtype=np.uint64), Tag(tensor.tag)
                    )
                named[tensor.key] = known[place]
                copies.hold(known[place])
            self.whole[number] = Commit(manifest, named)
