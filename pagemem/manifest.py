"""What a commit says: which bytes of the page files make up which tensor, and the scalars of that moment. Pure data.

On disk a manifest is one header line (format, length and xxh3 of the rest) and JSON. A file that was cut anywhere, or
changed anywhere, is refused whole.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from xxhash import xxh3_128_hexdigest

from pagemem.errors import CommitError
from pagemem.page import Extent, FrameId, Placement, Run, TensorId
from pagemem.tier import Tier

FORMAT: Final = "offload-commit-1"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor's bytes: its runs of whole frames, then at most one part of a page; checksums of its extents in order.

    Attributes:
        runs: (first frame, frames) each.
        tail: frame, offset and length of the part of a page, or None.
    """

    name: str
    tag: str
    n_bytes: int
    runs: tuple[tuple[int, int], ...]
    tail: tuple[int, int, int] | None
    sums: tuple[int, ...]

    @property
    def key(self) -> str:
        """What tells tensors of one run apart."""
        return f"{self.tag}: {self.name}"

    def placement(self) -> Placement:
        """Its frames, for an allocator; the tensor in it is nobody's."""
        runs = tuple(Run(FrameId(first), n_frames) for first, n_frames in self.runs)
        tail = None if self.tail is None else Extent(FrameId(self.tail[0]), self.tail[1], self.tail[2])
        return Placement(TensorId(-1), Tier.SSD, self.n_bytes, runs, tail)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One commit.

    Attributes:
        number: counts the commits of a run; later ones have greater numbers.
        name: given by the user, or None.
        step: optimizer steps made.
        run_ids: identities of the run directories with the page files, in order of their paths.
        checksums: whether ``sums`` mean anything.
        state: what else makes up the moment (counters, random generators, ...), as JSON has it.
    """

    number: int
    name: str | None
    created: str
    step: int
    page_bytes: int
    run_ids: tuple[str, ...]
    checksums: bool
    tensors: tuple[StoredTensor, ...]
    state: dict[str, Any]

    def encode(self) -> bytes:
        """The file's content.

        Raises:
            TypeError, ValueError: ``state`` has something that JSON cannot say.
        """
        body = json.dumps(asdict(self), allow_nan=False, separators=(",", ":")).encode()
        return f"{FORMAT} {len(body)} {xxh3_128_hexdigest(body)}\n".encode() + body

    @classmethod
    def decode(cls, content: bytes) -> Manifest:
        """The manifest in a file's content.

        Raises:
            CommitError: it was cut or changed, or written by another version.
        """
        header, _, body = content.partition(b"\n")
        words = header.decode("ascii", errors="replace").split(" ")
        if words[0] != FORMAT:
            raise CommitError(f"this is not a commit of this version: it begins with {words[0][:40]!r}, not {FORMAT!r}")
        if len(words) != 3 or words[1] != str(len(body)):
            raise CommitError(f"it has {len(body)} bytes after its header, which says {' '.join(words[1:2]) or 'nothing'}: it was cut")
        if words[2] != xxh3_128_hexdigest(body):
            raise CommitError("its content is not what was written: its checksum differs")
        try:
            found = json.loads(body)
            tensors = tuple(_stored_tensor(entry) for entry in found.pop("tensors"))
            return cls(tensors=tensors, run_ids=tuple(found.pop("run_ids")), **found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommitError(f"its content cannot be read: {type(error).__name__}: {error}") from error


def _stored_tensor(entry: dict[str, Any]) -> StoredTensor:
    tail = entry.pop("tail")
    runs = tuple((first, n_frames) for first, n_frames in entry.pop("runs"))
    return StoredTensor(runs=runs, tail=None if tail is None else tuple(tail), sums=tuple(entry.pop("sums")), **entry)
