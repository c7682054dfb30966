"""The map of the page files that a run's commits draw together, and what can be wrong with it. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pagemem.manifest import Manifest, StoredTensor
from pagemem.page import Extent
from pagemem.units import BLOCK_BYTES, ceil_div


@dataclass(slots=True)
class StoredPlace:
    """One tensor's bytes at one place, and the commits that name them.

    Attributes:
        checksums: whether the tensor's sums mean anything.
    """

    stored: StoredTensor
    checksums: bool
    commits: list[int] = field(default_factory=list)

    def faults(self, page_bytes: int) -> list[str]:
        """What is wrong with the place by itself; where nothing is, its extents are those of its size, inside their pages."""
        stored = self.stored
        tail_bytes = 0
        if stored.tail is not None:
            frame, offset_bytes, tail_bytes = stored.tail
            inside = frame >= 0 and offset_bytes >= 0 and 0 < tail_bytes and offset_bytes + tail_bytes <= page_bytes
            if not inside or offset_bytes % BLOCK_BYTES or tail_bytes % BLOCK_BYTES:
                return [f"{stored.key}: its tail of {tail_bytes} bytes at offset {offset_bytes} of frame {frame} is not inside a page of {page_bytes}"]
        if stored.n_bytes <= 0 or stored.n_bytes % BLOCK_BYTES or any(first < 0 or n_frames < 1 for first, n_frames in stored.runs):
            return [f"{stored.key}: {stored.n_bytes} bytes in runs {list(stored.runs)} are no whole blocks in whole frames"]
        n_frames, wanted = sum(n for _, n in stored.runs), ceil_div(stored.n_bytes - tail_bytes, page_bytes)
        if n_frames != wanted:
            return [f"{stored.key}: it has {n_frames} whole frames, its {stored.n_bytes} bytes take {wanted}"]
        n_extents = n_frames + (stored.tail is not None)
        if len(stored.sums) != n_extents:
            return [f"{stored.key}: it has {len(stored.sums)} checksums for {n_extents} extents"]
        return []


def all_places(manifests: Sequence[Manifest]) -> list[StoredPlace]:
    """Every place that commits name, once, however many name it."""
    found: dict[StoredTensor, StoredPlace] = {}
    for manifest in manifests:
        for stored in manifest.tensors:
            place = found.setdefault(stored, StoredPlace(stored, manifest.checksums))
            place.commits.append(manifest.number)
    return list(found.values())


def map_faults(places: Sequence[StoredPlace], page_bytes: int) -> Iterator[tuple[list[int], str]]:
    """Bytes that two places claim, a line for each pair that meets, with the commits of both; places have no faults of their own."""
    claims: list[tuple[Extent, StoredPlace]] = [
        (extent, place) for place in places for extent in place.stored.placement().extents(page_bytes)
    ]
    claims.sort(key=lambda claim: (claim[0].frame, claim[0].offset_bytes))
    told: set[tuple[int, int]] = set()
    reached: tuple[Extent, StoredPlace] | None = None  # of the frame's claims so far, the one that reaches furthest
    for extent, place in claims:
        if reached is not None and reached[0].frame == extent.frame and extent.offset_bytes < _end(reached[0]):
            other = reached[1]
            if (id(other), id(place)) not in told:
                told.add((id(other), id(place)))
                commits = sorted({*place.commits, *other.commits})
                where = f"bytes of frame {extent.frame} from {extent.offset_bytes} on"
                yield commits, f"{other.stored.key} and {place.stored.key} both claim {where}"
        if reached is None or reached[0].frame != extent.frame or _end(extent) > _end(reached[0]):
            reached = extent, place


def _end(extent: Extent) -> int:
    return extent.offset_bytes + extent.length_bytes
