"""The map of the page files that a run's commits draw together, and what can be wrong with it. Arithmetic."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pagemem.durable.manifest import Manifest, StoredTensor
from pagemem.files.striping import Striping
from pagemem.folders.own_file import kind_of, naming


@dataclass(slots=True)
class StoredPlace:
    """One tensor's bytes at one place, and the commits that name them.

    Attributes:
        checksums: whether the tensor's sums mean anything.
    """

    stored: StoredTensor
    checksums: bool
    commits: list[int] = field(default_factory=list)


def all_places(manifests: Sequence[Manifest]) -> list[StoredPlace]:
    """Every place that commits name, once, however many name it."""
    found: dict[StoredTensor, StoredPlace] = {}
    for manifest in manifests:
        for stored in manifest.tensors:
            place = found.setdefault(stored, StoredPlace(stored, manifest.checksums))
            place.commits.append(manifest.number)
    return list(found.values())


def map_faults(places: Sequence[StoredPlace], page_bytes: int) -> Iterator[tuple[list[int], str]]:
    """Bytes that two places claim, a line for each pair that meets, with the commits of both; places have no faults of
    their own."""
    claims: list[tuple[int, int, StoredPlace]] = []  # first byte and end, as if all frames lay one after another
    for place in places:
        claims += [
            (first * page_bytes, (first + n_frames) * page_bytes, place) for first, n_frames in place.stored.runs
        ]
        if place.stored.tail is not None:
            frame, offset_bytes, n_bytes = place.stored.tail
            claims.append((frame * page_bytes + offset_bytes, frame * page_bytes + offset_bytes + n_bytes, place))
    claims.sort(key=lambda claim: claim[:2])
    told: set[tuple[int, int]] = set()
    reached: tuple[int, int, StoredPlace] | None = None  # of the claims so far, the one that reaches furthest
    for claim in claims:
        begin, end, place = claim
        if reached is not None and begin < reached[1]:
            other = reached[2]
            if (id(other), id(place)) not in told:
                told.add((id(other), id(place)))
                commits = sorted({*place.commits, *other.commits})
                where = f"bytes of frame {begin // page_bytes} from {begin % page_bytes} on"
                yield commits, f"{other.stored.key} and {place.stored.key} both claim {where}"
        if reached is None or end > reached[1]:
            reached = claim


def frames_reached(manifest: Manifest) -> int:
    """One more than the last frame that a commit names, whose places have no faults; 0: it names none."""
    ends = [first + n_frames for stored in manifest.tensors for first, n_frames in stored.runs]
    return max([0, *ends, *(stored.tail[0] + 1 for stored in manifest.tensors if stored.tail is not None)])


def impossible(manifests: Sequence[Manifest], file_bytes: Sequence[int]) -> dict[int, str]:
    """Which commits of a run name places that cannot all be right, and why, in one line; nothing is read.

    Args:
        file_bytes: sizes of the page files, in order.
    """
    found: dict[int, str] = {}
    page_bytes = max(manifests, key=lambda manifest: manifest.number).page_bytes if manifests else 0
    for manifest in manifests:
        faults = (stored.fault(manifest.page_bytes) for stored in manifest.tensors)
        fault = next((fault for fault in faults if fault is not None), None)
        if manifest.page_bytes != page_bytes:
            fault = f"its pages have {manifest.page_bytes} bytes, those of the newest commit {page_bytes}"
        if fault is None:
            n_frames = frames_reached(manifest)
            for path, frames in enumerate(Striping(len(file_bytes)).file_frames(n_frames)):
                if frames * page_bytes > file_bytes[path]:
                    fault = (
                        f"it names frame {n_frames - 1}, for which page file {path + 1} needs {frames * page_bytes} "
                        f"bytes; it has {file_bytes[path]}"
                    )
        if fault is not None:
            found[manifest.number] = fault
    for commits, fault in map_faults(all_places([m for m in manifests if m.number not in found]), page_bytes):
        for number in commits:
            found.setdefault(number, fault)
    return found


def file_sizes(paths: Iterable[Path]) -> list[int]:
    """Bytes of each page file; 0 where there is none."""
    found = []
    for path in paths:
        with naming("looking at", path):
            found.append(os.lstat(path).st_size if kind_of(path) is not None else 0)
    return found
