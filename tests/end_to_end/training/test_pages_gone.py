"""Page files that vanish, are replaced or cut under a run, and files of commits that cannot be read for now: said, and
nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from committed_runs import SMALL, Run, Setup, assert_same
from finished_runs import FinishedRun

import offload
from pagemem.durable.commit_folder import CommitFolder
from pagemem.files.page_file import PAGE_FILE_NAME


def setup_with(**ssd: Any) -> Setup:
    """The small run, with other settings of its disk."""
    return Setup(SMALL.case, SMALL.ram, more={"ssd": ssd})


def run(folder: Path, seed: int = 7, **ssd: Any) -> Run:
    """A run with its page files in ``folder``."""
    return Run(setup_with(paths=[str(folder / "pages")], threads=2, **ssd), folder, seed=seed, keep=1)


def without_draws(of: Run) -> dict[str, Any]:
    """The state, without numbers drawn from the generators."""
    return {key: value for key, value in of.state().items() if key not in ("numpy", "python", "torch")}


# ---- under a run ----------------------------------------------------------------------------------------------------


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (Path.unlink, "was removed"),
        (replaced, "was replaced by another file"),
        (lambda path: os.truncate(path, 1 << 16), r"was cut from \d+ to 65536 bytes"),
    ],
)
def test_a_page_file_that_is_harmed_under_a_run_fails_the_next_commit(
    harm: Callable[[Path], object], what: str, checksums: bool, tmp_path: Path
) -> None:
    path = tmp_path / "pages" / PAGE_FILE_NAME
    with run(tmp_path, checksums=checksums) as trained:
        trained.step()
        trained.engine.save()
        harm(path)
        for _ in range(2):
            with pytest.raises(
                offload.StorageError,
                match=rf"^({path} {what} while this run used it, .*another folder|.*cannot be committed.*)$",
            ) as caught:
                trained.engine.save()
            assert "\n" not in str(caught.value)
        assert CommitFolder(tmp_path / "pages").numbers() == [1]


def test_a_page_file_that_is_gone_cannot_be_grown(tmp_path: Path) -> None:
    path = tmp_path / "pages" / PAGE_FILE_NAME
    with run(tmp_path) as trained:
        files = trained.engine.debug.page_files
        path.unlink()
        with pytest.raises(offload.StorageError, match=rf"growing {path} at offset \d+, \d+ bytes: No such file"):
            files.grow(files.n_frames + 1)
        path.write_bytes(b"")
        with pytest.raises(
            offload.StorageError, match=rf"growing {path} at offset \d+, \d+ bytes: another file has taken its place"
        ):
            files.grow(files.n_frames + 1)
        assert path.stat().st_size == 0


# ---- at resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("cut_to", [None, 0, 1 << 16])
def test_a_page_file_that_is_gone_or_cut_is_an_error_and_nothing_is_made_in_its_place(
    cut_to: int | None, checksums: bool, tmp_path: Path
) -> None:
    path = tmp_path / "pages" / PAGE_FILE_NAME
    with run(tmp_path, checksums=checksums) as trained:
        trained.train(2)
        trained.engine.save()
        expected = without_draws(trained)
    content = path.read_bytes()
    path.unlink() if cut_to is None else os.truncate(path, cut_to)
    message = (
        rf"{path} (is gone or empty|has 65536 bytes), and commit 1 names \d+ bytes of it\. Nothing was changed"
        "|commit-00000001.json is damaged: .* page file 1 needs"
    )
    with pytest.raises(offload.CommitError, match=message), run(tmp_path, seed=8, checksums=checksums) as resumed:
        resumed.engine.resume()
    if not cut_to:
        assert (path.stat().st_size if path.exists() else None) == cut_to
    path.write_bytes(content)
    with run(tmp_path, seed=9, checksums=checksums) as resumed:
        assert resumed.engine.resume() is not None
        assert_same(without_draws(resumed), expected)


# ---- for now --------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A run with a named commit and a later one."""
    with run(tmp_path) as trained:
        trained.step()
        trained.engine.save("best")
        trained.step()
        trained.engine.save()
    return tmp_path


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "read"])
def test_a_commit_that_cannot_be_read_for_now_is_no_damaged_one(
    code: int, call: str, named: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = named / "pages" / "commits" / "commit-00000001.json"
    before = FinishedRun(named / "pages", {}).content()
    real: Callable[..., Any] = getattr(os, call)

    def failing(what: Any, *args: Any, **more: Any) -> Any:
        if os.fspath(path) == (os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)):
            raise OSError(code, os.strerror(code))
        return real(what, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        message = (
            rf"^{path} cannot be read: {os.strerror(code)}\. Nothing was changed; "
            "make it readable, or move it out of the folder"
        )
        with pytest.raises(offload.CommitError, match=message):
            run(named)
    assert FinishedRun(named / "pages", {}).content() == before
    with run(named, seed=8) as resumed:
        found = resumed.engine.resume()
        assert found is not None and found.step == 2
        resumed.step()
        resumed.engine.save()
        assert CommitFolder(named / "pages").numbers() == [1, 3]
        assert resumed.engine.resume("best") is not None


def test_a_commit_of_another_version_is_not_trained_beside_and_stays(named: Path) -> None:
    path = named / "pages" / "commits" / "commit-00000001.json"
    path.write_bytes(path.read_bytes().replace(b"offload-commit-1", b"offload-commit-7", 1))
    before = FinishedRun(named / "pages", {}).content()
    with pytest.raises(
        offload.CommitError,
        match=rf"{path} is damaged: this is not a commit of this version: .*offload-commit-7.*Nothing was changed",
    ):
        run(named)
    assert FinishedRun(named / "pages", {}).content() == before


def test_small_tensors_that_cannot_be_read_for_now_stay_where_an_older_commit_is_gone_on_from(
    named: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = named / "pages" / "commits" / "commit-00000002.safetensors"
    real = os.pread

    def failing(fd: int, *args: Any) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, *args)

    with run(named, seed=8) as resumed:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", failing)
            with pytest.raises(offload.CommitError, match=rf"{path} cannot be read: Input/output error"):
                resumed.engine.resume()
            found = resumed.engine.resume(allow_older=True)
        assert found is not None and found.step == 1
        resumed.step()
        resumed.engine.save()
        assert CommitFolder(named / "pages").numbers() == [1, 2, 3]
