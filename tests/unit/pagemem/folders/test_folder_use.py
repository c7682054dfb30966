"""What a folder is to the engine, found without changing it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagemem.folders.run_directory import IDENTITY_NAME, LOCK_NAME, FolderUse, RunDirectory, folder_use


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change."""
    return {entry.name: (entry.read_bytes(), entry.stat().st_mtime_ns) for entry in folder.iterdir()}


def test_an_absent_folder_is_not_made(tmp_path: Path) -> None:
    assert folder_use(tmp_path / "a" / "b") == FolderUse("absent")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_stays_empty(tmp_path: Path) -> None:
    assert folder_use(tmp_path) == FolderUse("empty")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_cut_short_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("123\n")
    assert folder_use(tmp_path) == FolderUse("empty")
    assert (tmp_path / LOCK_NAME).read_text() == "123\n"


def test_a_run_while_it_is_held_and_afterwards(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory:
        before = content(tmp_path)
        assert folder_use(tmp_path) == FolderUse("run", directory.run_id, str(os.getpid()))
        assert content(tmp_path) == before
    assert folder_use(tmp_path) == FolderUse("run", directory.run_id)


def test_a_lock_file_that_nobody_holds_is_no_lock(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory:
        pass
    (tmp_path / LOCK_NAME).write_text("123\n")
    assert folder_use(tmp_path) == FolderUse("run", directory.run_id)
    with RunDirectory(tmp_path):
        pass  # looking has left no lock behind


def test_foreign_folders_say_why(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = content(tmp_path)
    found = folder_use(tmp_path)
    assert found.kind == "foreign" and "thesis.tex" in found.detail and found.holder is None
    assert content(tmp_path) == before
    file = folder_use(tmp_path / "thesis.tex")
    assert file.kind == "foreign" and "not a folder" in file.detail


@pytest.mark.parametrize("identity", ["not json", '{"format": "pagemem-run-directory-99", "run_id": "a"}'])
def test_an_identity_that_cannot_be_read_is_foreign(identity: str, tmp_path: Path) -> None:
    (tmp_path / IDENTITY_NAME).write_text(identity)
    found = folder_use(tmp_path)
    assert found.kind == "foreign" and found.detail
    assert (tmp_path / IDENTITY_NAME).read_text() == identity
