"""Commits on the disk: whole or not at all, whenever the process or the machine stops, and whatever call fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing_system import Crash, CrashingSystem

from pagemem.durable.commit_folder import FOLDER_NAME, CommitFolder
from pagemem.durable.manifest import Manifest
from pagemem.errors import CommitError, StorageError

SMALL = b"small tensors " * 50


def manifest(number: int, told: dict[str, str | int] | None = None) -> Manifest:
    """A commit without tensors."""
    return Manifest(number, None, "now", 10 * number, 65536, ("a",), True, (), {"sidecar": told, "filler": "x" * 500})


def commit(folder: CommitFolder, number: int) -> None:
    """As the engine does: what lies beside the manifest first."""
    folder.write(manifest(number, folder.write_sidecar(number, SMALL)))


def replace_by_next(folder: CommitFolder) -> None:
    """A commit, and the oldest one goes."""
    commit(folder, 3)
    folder.remove(1)
    folder.sweep()


def whole(folder: CommitFolder) -> list[int]:
    """The commits there are, each of which must be whole, with what lies beside it."""
    for number in folder.numbers():
        found = folder.read(number)
        assert found == manifest(number, found.state["sidecar"])
        with open(folder.open_sidecar(number, found.state["sidecar"]), "rb") as sidecar:
            assert sidecar.read() == SMALL
    return folder.numbers()


def two_commits(run: Path) -> CommitFolder:
    """A run with two commits, as the next process finds it."""
    run.mkdir(exist_ok=True)
    made = CommitFolder(run)
    for number in (1, 2):
        commit(made, number)
    return CommitFolder(run)


@pytest.fixture
def folder(tmp_path: Path) -> CommitFolder:
    """A folder with two commits."""
    return two_commits(tmp_path)


def test_a_run_without_commits_has_none(tmp_path: Path) -> None:
    folder = CommitFolder(tmp_path)
    assert folder.numbers() == []
    folder.remove(1)
    assert not (tmp_path / FOLDER_NAME).exists()


def test_commits_are_read_as_they_were_written(folder: CommitFolder) -> None:
    commit(folder, 100_000_000)
    assert whole(folder) == [1, 2, 100_000_000]
    folder.remove(2)
    assert whole(folder) == [1, 100_000_000]


def test_other_files_in_the_folder_are_neither_read_nor_removed(folder: CommitFolder) -> None:
    names = ["note.txt", "commit-3.json", "commit-00000001.json.bak", "commit-0000000x.json"]
    for name in names:
        (folder.path / name).write_text("mine")
    folder.sweep()
    assert whole(folder) == [1, 2]
    assert all((folder.path / name).read_text() == "mine" for name in names)


# ---- crashes --------------------------------------------------------------------------------------------------------


def calls_of(run: Callable[[CommitFolder], None], folder: CommitFolder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The system calls that it makes."""
    with monkeypatch.context() as patch:
        system = CrashingSystem(patch, folder.path)
        run(folder)
    return system.calls


def crash_at(
    run: Callable[[CommitFolder], None], folder: CommitFolder, at: int, patch: pytest.MonkeyPatch
) -> CrashingSystem:
    """Let it run up to that call."""
    with patch.context() as patched:
        system = CrashingSystem(patched, folder.path, at)
        with pytest.raises(Crash):
            run(folder)
    return system


@pytest.mark.parametrize("power", [True, False], ids=["killed", "power_lost"])
def test_whenever_it_stops_the_earlier_commits_are_whole_and_the_new_one_is_whole_or_not_there(
    power: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(replace_by_next, two_commits(tmp_path / "counted"), monkeypatch)
    seen: set[tuple[int, ...]] = set()
    for at in range(len(calls)):
        folder = two_commits(tmp_path / str(at))
        system = crash_at(replace_by_next, folder, at, monkeypatch)
        if not power:
            system.lose_power()
        found = whole(folder)
        assert found in ([1, 2], [1, 2, 3], [2, 3]), f"after {system.calls}"
        seen.add(tuple(found))
        # The run that goes on from there makes the same commit again, and clears up.
        replace_by_next(CommitFolder(folder.path.parent))
        assert whole(folder) == [2, 3]
        assert sorted(os.listdir(folder.path)) == [
            f"commit-0000000{n}.{kind}" for n in (2, 3) for kind in ("json", "safetensors")
        ]
    assert seen == {(1, 2), (1, 2, 3), (2, 3)}


def test_what_was_done_is_durable_when_the_call_returns(folder: CommitFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for done, expected in ((lambda f: commit(f, 3), [1, 2, 3]), (lambda f: f.remove(1), [2, 3])):
        with monkeypatch.context() as patch:
            system = CrashingSystem(patch, folder.path)
            done(folder)
        system.lose_power()
        assert whole(folder) == expected


def test_the_first_commit_of_a_run_is_durable_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CommitFolder(tmp_path)
    with monkeypatch.context() as patch:
        system = CrashingSystem(patch, folder.path)
        commit(folder, 1)
    system.lose_power()
    assert whole(folder) == [1]


def test_what_a_crash_left_is_swept_away(folder: CommitFolder) -> None:
    for name in ("commit-00000003.json.new", "commit-00000003.safetensors", "commit-00000004.safetensors.new"):
        (folder.path / name).write_bytes(b"half")
    assert whole(folder) == [1, 2]
    folder.sweep()
    assert len(os.listdir(folder.path)) == 4 and whole(folder) == [1, 2]


# ---- errors and damage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "rename", "open", "write"])
def test_a_commit_of_which_a_call_failed_is_gone_once_it_is_removed(
    call: str, folder: CommitFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(lambda f: commit(f, 3), folder, monkeypatch)
    folder.remove(3)
    for at in [number for number, name in enumerate(calls) if name == call]:
        folder = CommitFolder(folder.path.parent)
        with monkeypatch.context() as patch:
            system = CrashingSystem(patch, folder.path)
            really = system._call

            def fail(
                name: str, system: CrashingSystem = system, at: int = at, really: Callable[[str], None] = really
            ) -> None:
                really(name)
                if len(system.calls) == at + 1:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))

            patch.setattr(system, "_call", fail)
            with pytest.raises(StorageError, match=rf"^\w+ {folder.path.parent}.*: Input/output error$"):
                commit(folder, 3)
            folder.remove(3)
        system.lose_power()
        assert whole(folder) == [1, 2], f"{call} number {at} failed"
        folder.sweep()
        assert len(os.listdir(folder.path)) == 4


def test_a_damaged_manifest_is_named_and_says_how(folder: CommitFolder) -> None:
    path = folder.path / "commit-00000002.json"
    content = path.read_bytes()
    for damage, message in (
        (content[:-9], "it was cut"),
        (content[:-1] + b"?", "checksum differs"),
        (b"", "not a commit of this"),
    ):
        path.write_bytes(damage)
        assert folder.numbers() == [1, 2]
        with pytest.raises(CommitError, match=rf"{path} is damaged: .*{message}"):
            folder.read(2)
    path.write_bytes((folder.path / "commit-00000001.json").read_bytes())
    with pytest.raises(CommitError, match=rf"{path} is damaged: it is commit 1"):
        folder.read(2)
    path.unlink()
    path.mkdir()
    with pytest.raises(CommitError, match=rf"{path} cannot be read: Is a directory"):
        folder.read(2)


def test_damaged_small_tensors_are_named(folder: CommitFolder) -> None:
    told = folder.read(2).state["sidecar"]
    path = folder.path / "commit-00000002.safetensors"
    for content in (SMALL[:-1], SMALL[:-1] + b"?", b""):
        path.write_bytes(content)
        with pytest.raises(CommitError, match=rf"{path} is damaged: it is not what was written"):
            folder.open_sidecar(2, told)
    path.unlink()
    with pytest.raises(CommitError, match=rf"{path} cannot be read: No such file"):
        folder.open_sidecar(2, told)
