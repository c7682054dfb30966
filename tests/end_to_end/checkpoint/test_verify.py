"""`offload verify`: everything that is wrong with a run's commits is found and named, and nothing is changed."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import FinishedRun, finished, settings
from small_runs import built, engine_of, train
from tiny_models import CASES

from offload.cli import main
from pagemem.durable import page_reader
from pagemem.durable.commit_folder import CommitFolder
from pagemem.durable.manifest import Manifest, StoredTensor
from pagemem.durable.page_reader import Chunk, PageReader, WrongExtent


@pytest.fixture
def run(tmp_path: Path) -> FinishedRun:
    """A run with two commits, of which the first has a name."""
    return finished(built(), settings(tmp_path), names=["first", None])


@pytest.fixture
def frozen(tmp_path: Path) -> FinishedRun:
    """A run with three commits that share what never changes, and buffers beside."""
    data = [CASES["partly_trained"].batch(torch.Generator().manual_seed(k)) for k in range(3)]
    return finished(CASES["partly_trained"].build(), settings(tmp_path), data, names=["a", "b", "c"])


def verified(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said; the exit code is looked at."""
    assert main(["verify", *arguments]) == code
    return capsys.readouterr().out


def row(said: str, number: int) -> list[str]:
    """A commit's row of the table."""
    (line,) = re.findall(rf"^{number}  .*$", said, re.MULTILINE)
    return re.split(r" {2,}", line)


# ---- a run that is whole ---------------------------------------------------------------------------------------------


def test_a_whole_run_is_said_to_be_so(run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = run.content()
    said = verified([str(run.folder)], 0, capsys)
    assert row(said, 1)[1:3] == ["first", "1"] and row(said, 1)[-1] == "whole"
    assert row(said, 2)[1:3] == ["-", "2"] and row(said, 2)[-1] == "whole"
    assert re.search(r"1 page file of 64\.0 MiB: 1024 frames of 64\.0 KiB, \d+ named by commits, \d+ free", said)
    assert said.splitlines()[-1].startswith("whole; ") and run.content() == before


def test_each_extent_is_read_once_by_few_bytes_at_a_time(
    frozen: FinishedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page_reader, "CHUNK_BYTES", 64 << 10)
    seen: Counter[tuple[int, int]] = Counter()
    read = PageReader.read

    def counted(self: PageReader, chunk: Chunk, into: memoryview, *, checksums: bool) -> list[WrongExtent]:
        assert into.nbytes <= 64 << 10 and checksums
        seen.update((extent.frame, extent.offset_bytes) for extent in chunk.extents)
        return read(self, chunk, into, checksums=checksums)

    monkeypatch.setattr(PageReader, "read", counted)
    verified([str(frozen.folder)], 0, capsys)
    folder = CommitFolder(frozen.folder)
    named = [
        {
            (e.frame, e.offset_bytes)
            for stored in folder.read(number).tensors
            for e in stored.placement().extents(64 << 10)
        }
        for number in folder.numbers()
    ]
    assert set(seen) == set().union(*named) and set(seen.values()) == {1}
    assert named[0] & named[1] & named[2]  # there was something to read twice


def test_output_in_a_pipe_is_plain_lines(run: FinishedRun) -> None:
    command = [sys.executable, "-m", "offload.cli", "verify", str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert done.stderr == "" and done.stdout.replace("\n", "").isprintable()
    assert "verifying 100 %  " in done.stdout and row(done.stdout, 2)[-1] == "whole"


def test_several_disks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(built(), settings(tmp_path, paths=[tmp_path / "one", tmp_path / "two"]))
    assert "2 page files of " in verified([str(run.folder)], 0, capsys)
    with open(tmp_path / "two" / "pages.bin", "r+b") as file:
        file.truncate(128 << 10)
    said = verified([str(run.folder)], 1, capsys)
    assert (
        f"{tmp_path / 'two' / 'pages.bin'}: frame " in said and f"{tmp_path / 'one' / 'pages.bin'}: frame" not in said
    )


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["parameter", "moment"])
def test_a_damaged_page_is_named_in_every_commit_that_has_it(
    tag: str, frozen: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [stored for stored in frozen.newest.tensors if stored.name.startswith(("frozen", "unused"))]
    stored = shared[0] if tag == "parameter" else frozen.tensor("moment")
    frame = frozen.damage(stored)
    said = verified([str(frozen.folder)], 1, capsys)
    wanted = (
        rf"{re.escape(stored.key)}: {frozen.folder}/pages\.bin: frame {frame} "
        r"\(file offset \d+, \d+ bytes\) was written with xxh3"
    )
    named = [int(number) for number in re.findall(rf"^commit (\d+): {wanted}", said, re.MULTILINE)]
    assert named == ([1, 2, 3] if tag == "parameter" else [3])
    assert [row(said, number)[-1] for number in (1, 2, 3)] == [
        "1 fault" if number in named else "whole" for number in (1, 2, 3)
    ]


def test_all_damaged_pages_are_listed_not_the_first_alone(run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    large = next(stored for stored in run.newest.tensors if sum(n for _, n in stored.runs) >= 3)
    frames = {run.damage(large, extent=0), run.damage(large, extent=2)}
    said = verified([str(run.folder)], 1, capsys)
    assert {int(frame) for frame in re.findall(r": frame (\d+) \(file", said)} == frames
    assert said.splitlines()[-1].startswith("2 things are wrong; ")


def test_a_file_that_was_cut(run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run.folder / "pages.bin", "r+b") as file:
        file.truncate((64 << 10) * 20 + 4096)
    said = verified([str(run.folder)], 1, capsys)
    assert re.search(
        r"pages\.bin: frame 20 \(file offset 1310720, 65536 bytes\) lies beyond the end of the file, 1314816 bytes",
        said,
    )
    assert ": frame 19 " not in said


def rewritten(run: FinishedRun, change: Callable[[Manifest], Manifest]) -> None:
    """Write the newest commit anew, with something else in it."""
    CommitFolder(run.folder).write(change(run.newest))


def with_first(manifest: Manifest, **changes: Any) -> Manifest:
    """The manifest with its first tensor changed."""
    return replace(manifest, tensors=(replace(manifest.tensors[0], **changes), *manifest.tensors[1:]))


def test_two_tensors_in_one_place(run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    def change(manifest: Manifest) -> Manifest:
        first, second = manifest.tensors[0], run.tensor("moment")
        assert first.runs and first.n_bytes >= 4096
        moved = StoredTensor(second.name, second.tag, 4096, ((first.runs[0][0], 1),), None, second.sums[:1])
        return replace(manifest, tensors=tuple(moved if stored == second else stored for stored in manifest.tensors))

    rewritten(run, change)
    said = verified([str(run.folder)], 1, capsys)
    first, second = run.newest.tensors[0], run.tensor("moment")
    assert re.search(
        rf"^commit 2: .*{re.escape(first.key)}.* both claim bytes of frame {first.runs[0][0]} from 0 on",
        said,
        re.MULTILINE,
    )
    assert second.key in said and row(said, 1)[-1] == "whole"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sums": ()}, r"it has 0 checksums for \d+ extents"),
        ({"n_bytes": 4096 * 10_000}, r"whole frames, its 40960000 bytes take 625"),
        ({"n_bytes": 4096 * 10_000 + 100}, r"40960100 bytes in runs .* are no whole blocks"),
        (
            {"tail": (3, 65536 - 4096, 8192)},
            r"its tail of 8192 bytes at offset 61440 of frame 3 is not inside a page of 65536",
        ),
    ],
)
def test_places_that_cannot_be(
    run: FinishedRun, changes: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten(run, lambda manifest: with_first(manifest, **changes))
    found = verified([str(run.folder)], 1, capsys)
    assert re.search(rf"^commit 2: {re.escape(run.newest.tensors[0].key)}: .*{said}", found, re.MULTILINE), found


def test_a_damaged_manifest_is_listed_beside_those_that_are_whole(
    run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run.folder / "commits" / "commit-00000002.json"
    newest.write_bytes(newest.read_bytes().replace(b'"step":2', b'"step":3'))
    said = verified([str(run.folder)], 1, capsys)
    assert f"commit 2: {newest} is damaged: its content is not what was written" in said
    assert row(said, 2)[-1] == "unreadable" and row(said, 1)[-1] == "whole"
    assert row(verified([str(run.folder), "--commit", "first"], 0, capsys), 1)[-1] == "whole"


def test_no_manifest_that_can_be_read(run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run.folder / "commits").iterdir():
        path.write_text("rubbish")
    said = verified([str(run.folder)], 1, capsys)
    assert row(said, 1)[-1] == row(said, 2)[-1] == "unreadable" and "things are wrong; 0 extents" in said


def test_what_lies_beside_a_commit_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [CASES["conv"].batch(torch.Generator().manual_seed(1))]
    run = finished(CASES["conv"].build(), settings(tmp_path), data)
    (sidecar,) = (run.folder / "commits").glob("*.safetensors")
    content = sidecar.read_bytes()
    sidecar.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (run.folder / "commits" / "commit-00000009.json.new").write_text("half")
    said = verified([str(run.folder)], 1, capsys)
    assert f"commit 1: {sidecar} is damaged" in said and "needed by no commit: commit-00000009.json.new" in said


def test_without_checksums_the_rest_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(built(), settings(tmp_path, checksums=False))
    run.damage(run.newest.tensors[0])
    said = verified([str(run.folder)], 0, capsys)
    assert (
        "commit 1: the run kept no checksums (ssd.checksums = false): pages were read, their content not verified"
        in said
    )
    with open(run.folder / "pages.bin", "r+b") as file:
        file.truncate(64 << 10)
    assert "lies beyond the end of the file" in verified([str(run.folder)], 1, capsys)


def test_a_disk_that_fails_at_one_place_is_read_on(
    run: FinishedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = run.newest.tensors[0]
    bad = stored.placement().extents(64 << 10)[0].frame * (64 << 10)
    preadv = os.preadv

    def failing(fd: int, buffers: Any, position: int) -> int:
        if position == bad:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", failing)
    said = verified([str(run.folder)], 1, capsys)
    assert re.search(
        rf"^commit 2: {re.escape(stored.key)}: reading .*pages\.bin at offset {bad}, \d+ bytes: Input/output error",
        said,
        re.MULTILINE,
    )
    assert said.splitlines()[-1].startswith("1 thing is wrong; ")


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_verified_is_one_line(
    run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "config.json").write_text(json.dumps({"ssd": {"paths": ["pages/a", "pages/b"]}}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"ssd": ["paths"]}))
    for arguments, said in (
        ([str(tmp_path / "foreign")], "is not a run directory: it has no pagemem.json"),
        ([str(tmp_path / "log")], "whose ssd.paths are ['pages/a', 'pages/b']: name the first of them"),
        ([str(tmp_path / "other")], "is not a run directory: it has no pagemem.json\n"),
        ([str(run.folder.parent)], f"is not a run directory: it has no pagemem.json; {run.folder} below it is one"),
        ([str(run.folder), "--commit", "7"], "has no commit '7'; whole ones are: 1 (first), 2"),
    ):
        assert main(["verify", *arguments]) == 1
        error = capsys.readouterr().err
        assert said in error and error.startswith("offload: error: ") and error.count("\n") == 1
    assert list((tmp_path / "foreign").iterdir()) == []
    (run.folder / "pages.bin").unlink()
    assert main(["verify", str(run.folder)]) == 1 and "pages.bin: No such file" in capsys.readouterr().err
    assert not (run.folder / "pages.bin").exists()


def test_a_run_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with engine_of(built(), tmp_path) as engine:
        train(engine, 1)
        engine.save()
        assert main(["verify", str(tmp_path / "pages")]) == 1
        assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
        train(engine, 1)
    verified([str(tmp_path / "pages")], 0, capsys)


def test_a_lock_that_a_killed_process_left_is_no_hindrance_and_stays(
    run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.folder / "pagemem.lock").write_text("12345\n")
    before = run.content()
    verified([str(run.folder)], 0, capsys)
    assert run.content() == before
    with engine_of(built(), run.folder.parent) as engine:
        assert engine.resume() is not None
