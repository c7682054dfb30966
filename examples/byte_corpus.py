"""Byte-level text from files, memory-mapped: bytes are tokens, so there is nothing to download and nothing to train
first.

The corpus is written once as two flat files beside a description; it is used again when the source files are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from offload.integrations.token_batches import TokenBatches
from pagemem.folders.own_file import has_folder, kind_of, make_folder, naming, remove_file, replace_file
from pagemem.folders.small_file import read_small
from pagemem.units import KiB

_FORMAT: Final = "offload byte corpus 1"


class ByteCorpus(TokenBatches):
    """Training and validation bytes, and batches drawn from them.

    Args:
        folder: holds train.bin, validation.bin and corpus.json.
    """

    def __init__(self, folder: Path, *, seed: int) -> None:
        train, validation = (np.memmap(folder / name, np.uint8, "r") for name in ("train.bin", "validation.bin"))
        super().__init__(train, validation, seed, unit="byte")

    @classmethod
    def of_standard_library(cls, folder: Path, *, seed: int, validation_share: float) -> ByteCorpus:
        """The corpus of all .py files of the running Python's standard library (installed packages left out)."""
        root = Path(sysconfig.get_paths()["stdlib"])
        return cls.of_files(folder, root, sorted(_python_files(root)), seed=seed, validation_share=validation_share)

    @classmethod
    def of_files(
        cls, folder: Path, root: Path, files: Sequence[Path], *, seed: int, validation_share: float
    ) -> ByteCorpus:
        """The corpus of ``files``, each wholly in training or in validation by a hash of its name below ``root``.

        Raises:
            ValueError: there is no file on one of the two sides. StorageError: the folder cannot be used.
        """
        names = [file.relative_to(root).as_posix() for file in files]
        sizes = [file.stat().st_size for file in files]
        digest = hashlib.sha256(json.dumps([_FORMAT, validation_share, names, sizes]).encode()).hexdigest()
        described = folder / "corpus.json"
        if _digest_in(described) != digest:
            if not has_folder(folder):
                make_folder(folder)
            remove_file(described)  # Until both files are complete, the folder is no corpus.
            held_out = [_share_of(name) < validation_share for name in names]
            _write(folder / "train.bin", (f for f, out in zip(files, held_out, strict=True) if not out))
            _write(folder / "validation.bin", (f for f, out in zip(files, held_out, strict=True) if out))
            replace_file(described, json.dumps({"format": _FORMAT, "digest": digest, "files": len(files)}).encode())
        return cls(folder, seed=seed)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages", "__pycache__")]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _digest_in(described: Path) -> str | None:
    """The digest that a corpus description states, or None when there is no readable one."""
    try:
        with naming("reading", described):
            if kind_of(described) is None:
                return None
            content = json.loads(read_small(described, KiB))
    except ValueError:
        return None
    found = content.get("digest") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def _share_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _write(path: Path, files: Iterable[Path]) -> None:
    text = b"\n".join(file.read_bytes() for file in files)
    if len(text) < 2:
        raise ValueError(
            f"no text for {path.name}: too few source files, or a validation share that leaves one side empty"
        )
    replace_file(path, text)
