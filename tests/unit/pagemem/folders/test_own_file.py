"""Files of a run: nothing that lies in their place is followed, waited for or changed, and they are replaced whole."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from counted_calls import CountedCalls, Fault

from pagemem.errors import DiskFullError, StorageError
from pagemem.folders.own_file import has_folder, kind_of, make_folder, open_file, os_failure, remove_draft, replace_file

OTHERS: dict[str, Callable[[Path, Path], object]] = {
    "a symbolic link": lambda path, other: path.symlink_to(other),
    "a FIFO": lambda path, other: os.mkfifo(path),
    "a folder": lambda path, other: path.mkdir(),
    "a socket": lambda path, other: _socket(path),
}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)
        made.bind(path.name)


@pytest.fixture(autouse=True)
def back_again() -> Iterator[None]:
    before = os.getcwd()
    yield
    os.chdir(before)


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """A file elsewhere, that must be as it was."""
    path = tmp_path / "precious"
    path.write_bytes(b"x" * 8192)
    yield path
    assert path.read_bytes() == b"x" * 8192 and path.stat().st_nlink in (1, 2)


# ---- what lies in the place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_is_refused_in_one_line_and_left_as_it_is(
    kind: str, flags: int, tmp_path: Path, precious: Path
) -> None:
    path = tmp_path / "ours"
    OTHERS[kind](path, precious)
    with pytest.raises(
        StorageError,
        match=rf"^{path} is {kind}, not a file of this run\. Nothing was changed; remove it, or name another folder$",
    ):
        open_file(path, flags)
    assert kind_of(path) == kind


@pytest.mark.parametrize("place", ["ours", "ours.new"])
@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_else_is_replaced_and_no_draft_is_written_through_it(
    kind: str, place: str, tmp_path: Path, precious: Path
) -> None:
    OTHERS[kind](tmp_path / place, precious)
    with pytest.raises(StorageError, match=rf"^{tmp_path / place} is {kind}, not a"):
        replace_file(tmp_path / "ours", b"new")
    assert kind_of(tmp_path / place) == kind and sorted(os.listdir(tmp_path)) == sorted([place, "precious"])


def test_a_link_that_leads_nowhere_is_not_made_a_file(tmp_path: Path) -> None:
    (tmp_path / "ours").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="is a symbolic link"):
        open_file(tmp_path / "ours", os.O_RDWR | os.O_CREAT)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_with_a_second_name_is_read_and_replaced_but_not_written(tmp_path: Path, precious: Path) -> None:
    path = tmp_path / "ours"
    os.link(precious, path)
    with pytest.raises(StorageError, match=rf"{path} has 2 names \(hard links\)"):
        open_file(path, os.O_RDWR | os.O_CREAT)
    os.close(open_file(path, os.O_RDONLY))
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_device_is_refused() -> None:
    with pytest.raises(StorageError, match="^/dev/null is a device, not a file of this run"):
        open_file("/dev/null", os.O_RDWR)


@pytest.mark.parametrize("kind", ["a symbolic link", "a FIFO", "a file"])
def test_a_link_to_a_folder_is_no_folder_of_ours(kind: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "commits"
    (OTHERS | {"a file": lambda path, _: path.write_text("mine")})[kind](path, tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=rf"^{path} is {kind}, not a folder of this run"):
        has_folder(path)
    assert has_folder(tmp_path / "elsewhere") and not has_folder(tmp_path / "absent")


# ---- replacing ------------------------------------------------------------------------------------------------------


def test_a_draft_of_a_crash_is_removed_and_the_file_replaced(tmp_path: Path) -> None:
    path = tmp_path / "ours"
    path.write_bytes(b"old")
    (tmp_path / "ours.new").write_bytes(b"half of someth")
    replace_file(path, [b"one ", b"two"])
    assert path.read_bytes() == b"one two" and os.listdir(tmp_path) == ["ours"]
    remove_draft(tmp_path / "ours.new")


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC, Fault.NOTHING])
def test_whichever_call_fails_the_one_before_or_the_new_one_is_there_whole(fault: Fault, tmp_path: Path) -> None:
    content = b"n" * 5000
    with pytest.MonkeyPatch.context() as patch:
        calls = CountedCalls(patch, tmp_path)
        replace_file(tmp_path / "ours", content)
    for at in range(sum(call.can(fault) for call in calls.calls)):
        (tmp_path / "ours").write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            system = CountedCalls(patch, tmp_path, at, fault)
            expected = DiskFullError if fault is Fault.ENOSPC else StorageError
            with pytest.raises(expected, match=r"^\w+( for)? [^\n]*$") as caught:
                replace_file(tmp_path / "ours", content)
        assert system.struck is not None and system.struck.path in str(caught.value)
        whole = {b"old", content} if system.struck.path == "" else {b"old"}  # the folder's own sync comes last
        assert (tmp_path / "ours").read_bytes() in whole and os.listdir(tmp_path) == ["ours"], str(system.struck)


def test_short_writes_are_gone_on_with(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        CountedCalls(patch, tmp_path, 0, Fault.SHORT)
        replace_file(tmp_path / "ours", b"0123456789")
    assert (tmp_path / "ours").read_bytes() == b"0123456789"


# ---- folders and errors ---------------------------------------------------------------------------------------------


def test_a_folder_is_made_with_its_parents_each_entry_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        calls = CountedCalls(patch, tmp_path, kinds=["mkdir", "fsync"]).calls
        made = make_folder(tmp_path / "a" / "b")
    assert made == [tmp_path / "a" / "b", tmp_path / "a"]
    assert [str(call) for call in calls] == ["mkdir of /a", "fsync of ", "mkdir of /a/b", "fsync of /a"]
    assert make_folder(tmp_path / "a" / "b") == []


def test_what_was_made_of_a_folder_goes_again_after_an_error(tmp_path: Path) -> None:
    for at in range(4):
        with pytest.MonkeyPatch.context() as patch:
            system = CountedCalls(patch, tmp_path, at, Fault.EIO, kinds=["mkdir", "fsync"])
            with pytest.raises(StorageError, match=r"^(making|syncing) .*: Input/output error$"):
                make_folder(tmp_path / "a" / "b")
        assert system.struck is not None and os.listdir(tmp_path) == []


def test_no_room_says_what_was_wanted_and_what_is_free_or_that_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = str(os_failure(full, "writing", tmp_path / "not there", 4096, 100))
    assert said.startswith(
        f"writing {tmp_path / 'not there'} at offset 4096, 100 bytes: No space left on device; wanted 100 bytes (100 "
        "B), free are "
    )
    with suppress(OSError), monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "x")))
        assert "free are an unknown number." in str(os_failure(full, "writing", tmp_path, 0, 1))
