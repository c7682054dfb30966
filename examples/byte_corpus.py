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
import torch
from torch import Tensor

from pagemem.folders.own_file import has_folder, kind_of, make_folder, naming, remove_file, replace_file
from pagemem.folders.small_file import read_small
from pagemem.units import KiB

_FORMAT: Final = "offload byte corpus 1"


class ByteCorpus:
    """Training and validation bytes, and batches drawn from them.

    Args:
        folder: holds train.bin, validation.bin and corpus.json.
        seed: batches depend on it and on the step alone, so a resumed run reads on where it stopped.
    """

    #: What losses are a mean over, see `offload.launch.batches`.
    unit: Final = "byte"

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.seed = seed
        self.train = np.memmap(folder / "train.bin", dtype=np.uint8, mode="r")
        self.validation = np.memmap(folder / "validation.bin", dtype=np.uint8, mode="r")

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

    def batch(self, step: int, rows: int, seq: int) -> tuple[Tensor, Tensor]:
        """Training batch number ``step``: inputs and the bytes after them, int64, (rows, seq) each.

        Raises:
            ValueError: the text is shorter than a row.
        """
        _check_length("training", self.train, seq)
        drawn = np.random.default_rng((self.seed, step)).integers(0, len(self.train) - seq, size=rows)
        return _rows(self.train, drawn, seq)

    def validation_batches(self, count: int, rows: int, seq: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``count`` validation batches, spread evenly over the validation text; the same ones every time.

        Raises:
            ValueError: the text is shorter than a row.
        """
        _check_length("validation", self.validation, seq)
        starts = np.linspace(0, len(self.validation) - seq - 1, count * rows).astype(np.int64)
        for number in range(count):
            yield _rows(self.validation, starts[number * rows : (number + 1) * rows], seq)

    def unigram_entropy_bits(self) -> float:
        """Entropy of the validation text's byte frequencies: bits per byte of the best model without context."""
        counts = np.bincount(self.validation, minlength=256).astype(np.float64)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log2(shares)).sum())


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


def _check_length(what: str, text: np.memmap[tuple[int], np.dtype[np.uint8]], seq: int) -> None:
    if len(text) <= seq:
        raise ValueError(
            f"the {what} text has {len(text)} bytes, a row needs {seq + 1}; take a smaller train.seq or more text"
        )


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


def _rows(text: np.memmap[tuple[int], np.dtype[np.uint8]], starts: Iterable[int], seq: int) -> tuple[Tensor, Tensor]:
    cut = torch.from_numpy(np.stack([text[start : start + seq + 1] for start in starts]).astype(np.int64))
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()
