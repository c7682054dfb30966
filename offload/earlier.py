"""The commits that a run directory holds when it is opened, and the frames they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offload.config import ConfigError
from pagemem.commit_folder import CommitFolder
from pagemem.copies import Copies, StoredCopy
from pagemem.errors import CommitError
from pagemem.manifest import Manifest
from pagemem.run_directory import RunDirectory


@dataclass(frozen=True, slots=True, eq=False)
class Commit:
    """A whole commit and the copies it names, by `StoredTensor.key`."""

    manifest: Manifest
    copies: dict[str, StoredCopy]


class EarlierCommits:
    """Reads what there is; nothing is changed on the disk.

    Attributes:
        whole: the commits that can be used, by number.
        damaged: what is wrong with the others, by number.
    """

    def __init__(self, directories: Sequence[RunDirectory]) -> None:
        self.folder = CommitFolder(directories[0].path)
        self.whole: dict[int, Commit] = {}
        self.damaged: dict[int, CommitError] = {}
        self._manifests: dict[int, Manifest] = {}
        run_ids = tuple(directory.run_id for directory in directories)
        for number in self.folder.numbers():
            try:
                manifest = self.folder.read(number)
                if manifest.run_ids != run_ids:
                    raise CommitError(
                        f"commit {number} in {self.folder.path} names other page files ({len(manifest.run_ids)} paths) than "
                        "ssd.paths; give the same folders in the same order"
                    )
                self._manifests[number] = manifest
            except CommitError as error:
                self.damaged[number] = error

    @property
    def last_number(self) -> int:
        """The greatest number in use, damaged or not; 0 when there is none."""
        return max([0, *self._manifests, *self.damaged])

    def sizes(self, page_bytes: int, slice_numel: int, asked: int | str) -> tuple[int, int]:
        """Page and slice size to go on with: the newest commit's, if there is one.

        Raises:
            ConfigError: the configuration asks for another page size than it has.
        """
        if not self._manifests:
            return page_bytes, slice_numel
        newest = self._manifests[max(self._manifests)]
        if asked != "auto" and page_bytes != newest.page_bytes:
            raise ConfigError(
                f"memory.page is {page_bytes}, the commits in {self.folder.path} have pages of {newest.page_bytes} bytes; "
                'use that, or "auto", or another folder'
            )
        return newest.page_bytes, int(newest.state["slice_numel"])

    def restore(self, copies: Copies) -> None:
        """Take the frames that the commits name, before anything else does."""
        known: dict[object, StoredCopy] = {}
        for number, manifest in sorted(self._manifests.items()):
            named: dict[str, StoredCopy] = {}
            for tensor in manifest.tensors:
                place = (tensor.runs, tensor.tail)
                if place not in known:
                    known[place] = copies.restore(tensor.placement(), np.array(tensor.sums, dtype=np.uint64))
                named[tensor.key] = known[place]
                copies.hold(known[place])
            self.whole[number] = Commit(manifest, named)
