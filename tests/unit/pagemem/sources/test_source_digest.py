"""Digests of files: equal for equal bytes wherever they lie, and others for any other byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagemem.errors import StorageError
from pagemem.sources import source_digest
from pagemem.sources.source_digest import digest_of, note_digest
from pagemem.sources.source_files import SourceFile


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_digest, "_CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(source_digest, "_known", {})


@pytest.mark.parametrize("n_bytes", [1, 4096, 64 << 10, 300_001])
def test_every_byte_counts(n_bytes: int, tmp_path: Path) -> None:
    content = os.urandom(n_bytes)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "copy").write_bytes(content)
    expected = digest_of(SourceFile.of(tmp_path / "file"))
    assert digest_of(SourceFile.of(tmp_path / "copy")) == expected
    for place in {0, n_bytes // 3, n_bytes * 3 // 4, n_bytes - 1}:
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / f"at {place}").write_bytes(changed)
        assert digest_of(SourceFile.of(tmp_path / f"at {place}")) != expected, place


def test_a_file_is_read_once_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    file = SourceFile.of(tmp_path / "file")
    note_digest(file, "known")
    assert digest_of(file) == "known"
    (tmp_path / "file").write_bytes(b"other content")
    assert digest_of(SourceFile.of(tmp_path / "file")) != "known"


def test_a_file_that_is_not_as_it_was_has_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    file = SourceFile.of(tmp_path / "file")
    os.truncate(tmp_path / "file", 3)
    with pytest.raises(StorageError, match="was cut or lengthened from 7 to 3 bytes"):
        digest_of(file)
