"""Arithmetic of pieces: which bytes of which files are a tensor's, and which reads bring them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagemem.errors import StorageError
from pagemem.sources.source_files import Origin, SourceFile, SourcePiece, converted, plan_reads

FILE = SourceFile(Path("/a"), 1 << 20, 0, 0, 0)
OTHER = SourceFile(Path("/b"), 1 << 20, 0, 0, 0)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def piece(
    offset: int,
    n_bytes: int,
    at: int,
    source: torch.dtype = BF16,
    dtype: torch.dtype = BF16,
    file: SourceFile = FILE,
) -> SourcePiece:
    """Bytes of a file for a place in a tensor."""
    return SourcePiece(file, offset, n_bytes, at, source, dtype)


def test_gaps_are_what_no_piece_covers() -> None:
    origin = Origin.of([piece(100, 64, 128), piece(7, 32, 0)], 4096)
    assert [p.at_bytes for p in origin.pieces] == [0, 128]
    assert origin.gaps() == [(32, 128), (192, 4096)] and origin.read_bytes == 96 and origin.files == [FILE]
    assert Origin.of([piece(0, 4096, 0)], 4096).gaps() == []


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "at least one"),
        ([piece(0, 64, 0), piece(64, 64, 32)], "bytes from 32 on are another piece's"),
        ([piece(0, 63, 0)], "63 bytes are no values of torch.bfloat16"),
        ([piece(0, 0, 0)], "0 bytes are no values"),
        ([piece((1 << 20) - 2, 4, 0)], "lie beyond /a"),
        ([piece(-2, 4, 0)], "lie beyond /a"),
        ([piece(0, 64, 1)], "byte 1 of the tensor"),
        ([piece(0, 64, 4064)], "reach to byte 4128 of a tensor of 4096"),
        ([piece(0, 64, 4000, F32, F64)], "reach to byte 4128"),
    ],
)
def test_pieces_that_cannot_be_are_refused(pieces: list[SourcePiece], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Origin.of(pieces, 4096)
    assert "\n" not in str(caught.value)


def test_a_part_has_the_values_of_its_bytes() -> None:
    origin = Origin.of([piece(10, 32, 0, F32, BF16), piece(100, 64, 64)], 4096)
    assert origin.part(8, 72) == [piece(26, 16, 0, F32, BF16), piece(100, 8, 56)]
    assert origin.part(16, 64) == []
    assert [p.moved(8) for p in origin.part(8, 16)] == [piece(26, 16, 8, F32, BF16)]


def test_large_pieces_are_cut_and_neighbours_are_read_together() -> None:
    reads = plan_reads([piece(0, 1000, 4096), piece(1000, 24, 0), piece(1024, 5000, 8192)], 2048)
    assert [(r.begin_bytes, r.end_bytes) for r in reads] == [(0, 1024), (1024, 3072), (3072, 5120), (5120, 6024)]
    assert [p.at_bytes for r in reads for p in r.pieces] == [4096, 0, 8192, 10240, 12288]
    far = plan_reads([piece(0, 64, 0), piece(100_000, 64, 64), piece(0, 64, 128, file=OTHER)], 1 << 18)
    assert [(r.file, r.begin_bytes) for r in far] == [(FILE, 0), (FILE, 100_000), (OTHER, 0)]


def test_rounding_twice_is_not_rounding_once() -> None:
    narrowed = converted(Origin.of([piece(0, 128, 256, BF16, F32)], 4096), BF16, 4096)
    assert narrowed is not None and narrowed.pieces == (piece(0, 128, 128, BF16, BF16),)
    assert converted(Origin.of([piece(0, 128, 0, F64, F32)], 4096), BF16, 4096) is None
    from_wide = converted(Origin.of([piece(0, 128, 0, F32, F32)], 4096), BF16, 4096)
    assert from_wide is not None and from_wide.pieces[0] == piece(0, 128, 0, F32, BF16)


def test_a_file_is_known_by_what_the_system_says(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300_000))
    (tmp_path / "link").symlink_to(path)
    file = SourceFile.of(tmp_path / "link")
    assert file == SourceFile.of(path) and file.path == path and file.n_bytes == 300_000
    os.truncate(path, 299_999)
    with pytest.raises(StorageError, match=r"was cut or lengthened from 300000 to 299999 bytes"):
        file.check(path.stat())
    for wrong in (replace(file, n_bytes=299_999, inode=1), replace(file, n_bytes=299_999)):
        with pytest.raises(StorageError, match="was replaced" if wrong.inode == 1 else "was changed"):
            wrong.check(path.stat())


def test_what_is_no_regular_file_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, why in (("fifo", "FIFO"), (".", "directory"), ("none", "No such file")):
        with pytest.raises(StorageError, match=why):
            SourceFile.of(tmp_path / name)
