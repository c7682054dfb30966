"""Digests of whole source files: what tells a file from every other one, wherever it lies now."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Final

import numpy as np
from xxhash import xxh3_128

from pagemem.sources.source_files import SourceFile, SourceRead
from pagemem.sources.source_reader import Bounce, SourceReader
from pagemem.units import MiB

_CHUNK_BYTES: Final = 8 * MiB
_lock = threading.Lock()
_known: dict[SourceFile, str] = {}


def digest_of(file: SourceFile) -> str:
    """xxh3 of the size and every byte, read once in a process for a file as it is. Any thread.

    A part of the bytes would not do: checkpoints of one architecture may differ in a single tensor.

    Raises:
        StorageError: it cannot be read, or is not as it was.
    """
    with _lock:
        found = _known.get(file)
    if found is None:
        found = _read(file)
        note_digest(file, found)
    return found


def note_digest(file: SourceFile, digest: str) -> None:
    """Have `digest_of` know a file's digest without reading it. Any thread."""
    with _lock:
        _known[file] = digest


def _read(file: SourceFile) -> str:
    digest = xxh3_128(file.n_bytes.to_bytes(8, "little"))
    (bounce,), nowhere = Bounce.several(1, _CHUNK_BYTES), np.empty(0, dtype=np.uint8)
    with closing(SourceReader(_CHUNK_BYTES)) as reader:
        reader.open(file)
        for begin_bytes in range(0, file.n_bytes, _CHUNK_BYTES):
            end_bytes = min(begin_bytes + _CHUNK_BYTES, file.n_bytes)
            reader.move(SourceRead(file, begin_bytes, end_bytes, ()), bounce, nowhere)
            with bounce.map[: end_bytes - begin_bytes] as content:
                digest.update(content)
    return digest.hexdigest()
