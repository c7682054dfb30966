"""The lock of a folder: who has it, what frees it, and what does not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from counted_calls import CountedCalls, Fault

from pagemem.errors import RunDirectoryError, StorageError
from pagemem.folders.descriptor import close_fds
from pagemem.folders.folder_lock import LOCK_NAME, FolderLock, holder_of
from pagemem.folders.run_directory import IDENTITY_NAME, RunDirectory, folder_use


def test_a_stale_file_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("4194304 and more text of a longer line\n")
    lock = FolderLock(tmp_path)
    assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    with pytest.raises(RunDirectoryError, match=f"{tmp_path} is in use by process {os.getpid()}"):
        FolderLock(tmp_path)
    lock.close()
    lock.close()
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_removed_is_said_and_keeps_no_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        CountedCalls(patch, tmp_path, 0, Fault.EIO, kinds=["unlink"])
        with pytest.raises(StorageError, match=rf"^removing {tmp_path / LOCK_NAME}: Input/output error$"):
            lock.close()
    assert holder_of(tmp_path) is None
    FolderLock(tmp_path).close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kept", [False, True])
def test_whatever_call_fails_nobody_has_the_lock_afterwards(kept: bool, tmp_path: Path) -> None:
    if kept:
        (tmp_path / LOCK_NAME).write_text("1\n")
    with pytest.MonkeyPatch.context() as patch:
        calls = CountedCalls(patch, tmp_path).calls
        FolderLock(tmp_path, keep=kept).close()
    for at in range(len(calls)):
        with pytest.MonkeyPatch.context() as patch:
            CountedCalls(patch, tmp_path, at, Fault.EIO)
            with pytest.raises(StorageError, match=rf"^[\w ]+ {tmp_path / LOCK_NAME}[^\n]*: Input/output error$"):
                FolderLock(tmp_path, keep=kept).close()
        assert holder_of(tmp_path) is None, str(calls[at])
    FolderLock(tmp_path).close()


def test_who_only_reads_leaves_a_file_that_was_there(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("1\n")
    lock = FolderLock(tmp_path, keep=True)
    assert holder_of(tmp_path) == "1"
    lock.close()
    assert (tmp_path / LOCK_NAME).read_text() == "1\n" and holder_of(tmp_path) is None


def test_a_forked_child_has_no_lock_and_frees_none(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        lock.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert holder_of(tmp_path) == str(os.getpid())
    # Nor does a child that lives on hold what its parent has let go of.
    reading, writing = os.pipe()
    there, is_there = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.write(is_there, b"1")
        os.read(reading, 1)
        os._exit(0)
    os.read(there, 1)
    for fd in (reading, there, is_there):
        os.close(fd)
    close_fds(lock._fds)  # as if the parent had been killed
    assert holder_of(tmp_path) is None
    os.close(writing)
    os.waitpid(child, 0)


@pytest.mark.parametrize("name", [LOCK_NAME, f"{IDENTITY_NAME}.new", IDENTITY_NAME])
@pytest.mark.parametrize("hard", [False, True])
def test_a_folder_that_holds_only_a_link_is_not_empty(name: str, hard: bool, tmp_path: Path) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_bytes(b"x" * 8192)
    run.mkdir()
    if hard:
        os.link(precious, run / name)
    else:
        (run / name).symlink_to(precious)
    if not (hard and name.endswith(".new")):  # a draft that is only one more name of a file may go
        with pytest.raises(
            RunDirectoryError, match=rf"{run}.*({name}.*|is a symbolic link|hard links).*Nothing was changed"
        ) as caught:
            RunDirectory(run)
        assert "\n" not in str(caught.value)
        assert os.listdir(run) == [name] and folder_use(run).kind in ("foreign", "empty")
    assert precious.read_bytes() == b"x" * 8192


def test_a_name_that_another_file_has_taken_is_left(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    (tmp_path / LOCK_NAME).unlink()
    (tmp_path / LOCK_NAME).write_text("somebody else's")
    lock.close()
    assert (tmp_path / LOCK_NAME).read_text() == "somebody else's"


def test_an_error_number_says_nothing_about_who_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        CountedCalls(patch, tmp_path, 0, Fault.EIO, kinds=["open"])
        with pytest.raises(StorageError, match=f"^opening {tmp_path / LOCK_NAME}: {os.strerror(errno.EIO)}$"):
            FolderLock(tmp_path)
