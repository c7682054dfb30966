"""What is known of the bytes in page files: which extents were written, and their xxh3 checksums.

A page holds extents of at most two tensors, one of them from offset 0 on, so a frame has two slots: slot 0 for the
extent at offset 0, slot 1 for the other. All methods work on whole arrays of extents and may be called on any thread.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pagemem.files.striping import IntArray

DigestArray = npt.NDArray[np.uint64]

#: Extents that a frame may hold.
SLOTS: Final = 2
_HALF_WORD: Final = np.uint64(32)
_LOW_HALF: Final = np.uint64(0xFFFFFFFF)


def digests(buffer: memoryview, starts: IntArray, lengths: IntArray) -> DigestArray:
    """xxh3 of ``buffer[start : start + length]`` for each pair. Holds no reference to the buffer when it returns."""
    # Slices die with the call that takes them. Everything but the hash itself runs with cold caches, several thousand
    # times a second.
    return np.array(
        [xxh3_64_intdigest(buffer[start : start + length]) for start, length in zip(starts.tolist(), lengths.tolist())],
        dtype=np.uint64,
    )


@dataclass(frozen=True, slots=True)
class ExtentKeys:
    """Where the index keeps extents and how it tells them apart; worked out once for a placement.

    Attributes:
        places: each extent's slot, counted over all frames: two a frame, the first one for the extent at offset 0.
        spans: the offset in the upper, the length in the lower half of a word. Never 0, as no length is 0.
    """

    places: IntArray
    spans: DigestArray

    @classmethod
    def of(cls, frames: IntArray, offsets: IntArray, lengths: IntArray) -> ExtentKeys:
        """The keys of these extents."""
        spans = (offsets.astype(np.uint64) << _HALF_WORD) | lengths.astype(np.uint64)
        return cls(frames * SLOTS + (offsets > 0), spans)


class ExtentIndex:
    """Spans and checksums of the extents written so far, two slots a frame.

    An extent is *known* when exactly it (same offset, same length) was the last thing written to its bytes. It is asked
    twice for each transfer, by threads that take a core from compute meanwhile: a few operations on whole arrays each
    time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: DigestArray = np.zeros(0, dtype=np.uint64)  # 0: nothing was written
        self._sums: DigestArray = np.zeros(0, dtype=np.uint64)

    def grow(self, n_frames: int) -> None:
        """Make room for ``n_frames`` frames in all; new ones hold nothing.

        Raises:
            MemoryError: there is no RAM for it; nothing was changed.
        """
        with self._lock:
            extra = (0, SLOTS * n_frames - len(self._sums))
            spans, sums = np.pad(self._spans, extra), np.pad(self._sums, extra)
            self._spans, self._sums = spans, sums

    def record(self, keys: ExtentKeys, sums: DigestArray) -> None:
        """Make extents known whose write has succeeded, and forget what they overwrote."""
        with self._lock:
            self._spans[keys.places] = keys.spans
            self._sums[keys.places] = sums
            self._forget_others(keys)

    def forget(self, keys: ExtentKeys) -> None:
        """Make unknown whatever overlaps these extents: their bytes may be half old, half new."""
        with self._lock:
            self._forget_at(keys.places, keys.spans)
            self._forget_others(keys)

    def look_up(self, keys: ExtentKeys) -> tuple[npt.NDArray[np.bool_], DigestArray]:
        """Whether each extent is known, and the checksum it was written with (meaningless where it is not)."""
        with self._lock:
            return self._spans[keys.places] == keys.spans, self._sums[keys.places]

    def _forget_others(self, keys: ExtentKeys) -> None:
        """Forget what overlaps these extents in their frames' other slots. Most frames have nothing there."""
        others = keys.places ^ 1
        if self._spans[others].any():
            self._forget_at(others, keys.spans)

    def _forget_at(self, places: IntArray, spans: DigestArray) -> None:
        """Forget what has a byte in common with ``spans``, each at its place."""
        new_starts, new_ends = _bounds(spans)
        starts, ends = _bounds(self._spans[places])
        self._spans[places[(starts < new_ends) & (new_starts < ends)]] = 0


def _bounds(spans: DigestArray) -> tuple[DigestArray, DigestArray]:
    """Start and end of each span in its page."""
    starts = spans >> _HALF_WORD
    return starts, starts + (spans & _LOW_HALF)
