"""Whose folder it is: taking, refusing and giving back run directories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagemem.errors import RunDirectoryError
from pagemem.folders.run_directory import FORMAT, IDENTITY_NAME, LOCK_NAME, RunDirectory

HOLD = (
    "import sys; from pagemem.folders.run_directory import RunDirectory; RunDirectory(sys.argv[1]); print('held', "
    "flush=True); sys.stdin.read()"
)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Everything in a folder: content and modification time by name."""
    return {entry.name: (entry.read_bytes(), entry.stat().st_mtime_ns) for entry in folder.iterdir()}


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_new_folder_is_made_with_its_parents_and_identified(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a" / "b") as directory:
        identity = json.loads((tmp_path / "a" / "b" / IDENTITY_NAME).read_text())
        assert identity["format"] == FORMAT
        assert identity["run_id"] == directory.run_id
        assert "created" in identity
        assert {entry.name for entry in directory.path.iterdir()} == {IDENTITY_NAME, LOCK_NAME}
    assert {entry.name for entry in directory.path.iterdir()} == {IDENTITY_NAME}


def test_our_own_folder_opens_again_with_its_content_and_id(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as first:
        (first.path / "pages.bin").write_bytes(b"left over")
    with RunDirectory(tmp_path) as second:
        assert second.run_id == first.run_id
        assert (second.path / "pages.bin").read_bytes() == b"left over"


def test_a_foreign_folder_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"not empty.*'thesis\.tex'.*Nothing was changed"):
        RunDirectory(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ("not json", "not an identity file"),
        ("[1, 2]", "not an identity file"),
        ('{"format": "x"}', "another version"),
        ('{"format": "pagemem-run-directory-1"}', r"not an identity file of this engine \(run_id: Field required"),
        (
            '{"format": "pagemem-run-directory-1", "run_id": 3, "created": ""}',
            r"run_id: Input should be a valid string, not 3",
        ),
        ('{"format": 3, "run_id": 3, "created": ""}', r"format: Input should be a valid string, not 3"),
        ('{"format": "x", "format": "y"}', "key 'format' is there twice"),
        ("[" * 4000, "more than 100 deep"),
        (" " * 5000, "it has 5000 bytes; at most 4096 are read"),
        ('{"format": "pagemem-run-directory-99", "run_id": "a"}', "another version"),
    ],
)
def test_an_identity_that_is_not_ours_is_refused_and_unchanged(tmp_path: Path, identity: str, message: str) -> None:
    (tmp_path / IDENTITY_NAME).write_text(identity)
    before = snapshot(tmp_path)
    with pytest.raises(RunDirectoryError, match=message):
        RunDirectory(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_second_engine_of_this_process_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path):
        before = snapshot(tmp_path)
        with pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()}"):
            RunDirectory(tmp_path)
        assert snapshot(tmp_path) == before
    RunDirectory(tmp_path).close()


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    root = str(Path(__file__).parents[4])
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        before = snapshot(tmp_path)
        with pytest.raises(RunDirectoryError, match=f"in use by process {holder.pid}"):
            RunDirectory(tmp_path)
        assert snapshot(tmp_path) == before
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / LOCK_NAME).exists(), "killed: nobody removed the lock file"
    with RunDirectory(tmp_path) as directory:
        assert (directory.path / LOCK_NAME).read_text().strip() == str(os.getpid())


def test_a_claim_cut_short_by_a_crash_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("1\n")
    (tmp_path / f"{IDENTITY_NAME}.new").write_text('{"form')
    with RunDirectory(tmp_path) as directory:
        assert {entry.name for entry in directory.path.iterdir()} == {IDENTITY_NAME, LOCK_NAME}


@pytest.mark.parametrize("below", ["", "folder", "folder/deeper"])
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    with pytest.raises(RunDirectoryError, match="cannot be used as a run directory.*Name a folder") as caught:
        RunDirectory(file / below)
    assert str(file) in str(caught.value)
    assert "Not a directory" in str(caught.value)
    assert file.read_text() == "content"


def test_a_file_system_that_takes_no_folders_is_refused() -> None:
    with pytest.raises(RunDirectoryError, match="cannot be used as a run directory"):
        RunDirectory("/proc/pagemem-test/run")


def test_closing_twice_does_not_touch_the_next_owner(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    first.close()
    with RunDirectory(tmp_path):
        first.close()
        assert (tmp_path / LOCK_NAME).exists()
        with pytest.raises(RunDirectoryError, match="in use"):
            RunDirectory(tmp_path)


def test_neither_success_nor_refusal_leaks_a_descriptor(tmp_path: Path) -> None:
    ours, foreign = tmp_path / "ours", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "file").touch()
    before = n_descriptors()
    with RunDirectory(ours):
        for path in (ours, foreign, foreign / "file"):
            with pytest.raises(RunDirectoryError):
                RunDirectory(path)
        assert n_descriptors() == before + 1
    assert n_descriptors() == before
