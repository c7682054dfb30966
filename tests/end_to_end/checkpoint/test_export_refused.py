"""Exports that are refused or fail, and what is left then."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_runs import FinishedRun, finished, refused, settings
from small_runs import built, engine_of, train

from offload.cli import main
from offload.sources.checkpoint_index import INDEX_NAME


def test_a_folder_with_anything_in_it_is_left_alone(
    run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    refused([str(run.folder), "--to", str(tmp_path / "out")], "is not empty; nothing is overwritten", capsys)
    refused([str(run.folder), "--to", str(tmp_path / "out" / "notes")], "is a file; name a new or empty folder", capsys)
    refused([str(run.folder), "--to", str(run.folder / "out")], f"is inside the run directory {run.folder}", capsys)
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_empty_folder_is_taken(run: FinishedRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert main(["export", str(run.folder), "--to", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", INDEX_NAME]


def test_a_link_to_an_empty_folder_is_followed(run: FinishedRun, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    assert main(["export", str(run.folder), "--to", str(tmp_path / "out")]) == 0
    assert (tmp_path / "there" / "model.safetensors").is_file() and (tmp_path / "out").is_symlink()


def test_what_is_no_run_or_has_no_such_commit_is_refused(
    run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--to", str(tmp_path / "out")]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "photo").write_text("mine")
    refused([str(tmp_path / "foreign"), *out], "foreign is not a run directory: it has no pagemem.json", capsys)
    refused([str(tmp_path / "nowhere"), *out], "nowhere is not a run directory: there is no such folder", capsys)
    refused([str(run.folder), *out, "--commit", "last"], "has no commit 'last'; whole ones are: 1 (first), 2", capsys)
    refused([str(run.folder), *out, "--max-shard", "0"], "--max-shard is 0; it must be at least 1 byte", capsys)
    shutil.rmtree(run.folder / "commits")
    refused([str(run.folder), *out], "holds no commits", capsys)
    assert (
        os.listdir(tmp_path / "foreign") == ["photo"]
        and not (tmp_path / "out").exists()
        and not (tmp_path / "nowhere").exists()
    )


def test_a_run_in_use_is_refused_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with engine_of(built(), tmp_path) as engine:
        train(engine, 1)
        engine.save()
        refused([str(tmp_path / "pages"), "--to", str(tmp_path / "out")], f"is in use by process {os.getpid()}", capsys)
        train(engine, 1)
        assert (tmp_path / "pages" / "pagemem.lock").exists()
    assert main(["export", str(tmp_path / "pages"), "--to", str(tmp_path / "out")]) == 0


def test_a_damaged_newest_commit_is_said_and_passed_over(
    run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run.folder / "commits" / "commit-00000002.json"
    newest.write_bytes(newest.read_bytes()[:-5])
    assert main(["export", str(run.folder), "--to", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"a newer commit is damaged: {newest} is damaged: ") and "commit 1 (first), step 1" in said
    refused(
        [str(run.folder), "--to", str(tmp_path / "more"), "--commit", "2"], "commit-00000002.json is damaged", capsys
    )


@pytest.mark.parametrize("tag", ["parameter", "master"])
def test_a_damaged_page_is_named_and_nothing_is_left(
    tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(built(), settings(tmp_path, dtype="bf16"))
    stored = run.tensor(tag)
    frame = run.damage(stored)
    refused(
        [str(run.folder), "--to", str(tmp_path / "deep" / "out"), "--dtype", "fp32"],
        f"{stored.key}: {run.folder / 'pages.bin'}: frame {frame} (file offset ", capsys,
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pages"]


def _fails(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Have a call of the os module fail from its third time on."""
    real: Callable[..., Any] = getattr(os, name)
    calls: list[None] = []

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) > 2:
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("pwrite", OSError(errno.ENOSPC, "No space left on device"), "No space left on device; wanted "),
        (
            "pwrite",
            OSError(errno.EIO, "Input/output error"),
            "model.safetensors at offset 2448, 65536 bytes: Input/output error",
        ),
        ("fsync", OSError(errno.EIO, "Input/output error"), "Input/output error"),
        ("pwrite", KeyboardInterrupt(), "interrupted"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_an_export_that_fails_leaves_nothing(
    run: FinishedRun,
    name: str,
    error: BaseException,
    said: str,
    there: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if there:
        (tmp_path / "out").mkdir()
    before = run.content()
    with monkeypatch.context() as broken:
        _fails(broken, name, error)
        assert main(["export", str(run.folder), "--to", str(tmp_path / "out")]) == (130 if "interrupted" in said else 1)
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pages"][not there :] and run.content() == before
    assert not there or list((tmp_path / "out").iterdir()) == []
    assert main(["export", str(run.folder), "--to", str(tmp_path / "out")]) == 0


def test_room_is_looked_for_beforehand(
    run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    refused([str(run.folder), "--to", str(tmp_path / "out")], "bytes (1.", capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pages"]


def test_the_run_is_not_changed(run: FinishedRun, tmp_path: Path) -> None:
    before = run.content()
    assert main(["export", str(run.folder), "--to", str(tmp_path / "out")]) == 0
    assert run.content() == before
