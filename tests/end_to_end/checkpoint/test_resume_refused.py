"""Commits that cannot be gone on from: one clear error, the engine and the commits as they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from committed_runs import MIB, SMALL, Random, Run, assert_same, committed, without_draws
from parity import adamw

import offload
from pagemem.durable.commit_folder import CommitFolder
from pagemem.files.page_file import PAGE_FILE_NAME


def commit_file(folder: Path, number: int, kind: str) -> Path:
    return folder / "pages" / "commits" / f"commit-{number:08d}.{kind}"


# ---- damage ---------------------------------------------------------------------------------------------------------


def cut_manifest(folder: Path) -> None:
    os.truncate(commit_file(folder, 2, "json"), commit_file(folder, 2, "json").stat().st_size // 2)


def change_manifest(folder: Path) -> None:
    path = commit_file(folder, 2, "json")
    path.write_bytes(path.read_bytes().replace(b'"step":2', b'"step":3'))


def remove_beside(folder: Path) -> None:
    commit_file(folder, 2, "safetensors").unlink()


def change_beside(folder: Path) -> None:
    path = commit_file(folder, 2, "safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")


DAMAGES = {
    cut_manifest: "commit-00000002.json is damaged: .* it was cut",
    change_manifest: "commit-00000002.json is damaged: .*checksum differs",
    remove_beside: "commit-00000002.safetensors cannot be read: No such file",
    change_beside: "commit-00000002.safetensors is damaged: it is not what was written",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_commit_is_named_and_passed_over_only_when_that_is_asked_for(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    states = committed(tmp_path)
    damage(tmp_path)
    with Run(SMALL, tmp_path, seed=8) as run:
        before = without_draws(run)
        with pytest.raises(offload.CommitError, match=DAMAGES[damage]):
            run.engine.resume()
        assert_same(without_draws(run), before)
        run.train(1)
        resumed = run.engine.resume(allow_older=True)
        assert resumed is not None and (resumed.step, resumed.number) == (1, 1)
        assert len(resumed.passed_over) == 1 and "commit-00000002" in resumed.passed_over[0]
        assert_same(without_draws(run), states[1])
        run.train(2)
        assert run.engine.save() == 3
        expected = without_draws(run)
    # Of a file that is not there it is not known that it was not what was written: that commit stays.
    stays = [2] if damage is remove_beside else []
    assert CommitFolder(tmp_path / "pages").numbers() == [1, *stays, 3] and len(
        os.listdir(tmp_path / "pages" / "commits")
    ) == 4 + len(stays)
    with Run(SMALL, tmp_path, seed=9) as run:
        resumed = run.engine.resume()
        assert resumed is not None and (resumed.step, resumed.passed_over) == (2, ())
        assert_same(without_draws(run), expected)


def test_no_whole_commit_at_all(tmp_path: Path) -> None:
    committed(tmp_path, steps=(1,))
    os.truncate(commit_file(tmp_path, 1, "json"), 10)
    with Run(SMALL, tmp_path) as run:
        with pytest.raises(offload.CommitError, match="commit-00000001.json is damaged.* no other one is whole"):
            run.engine.resume()
        assert run.engine.resume(allow_older=True) is None
        run.train(1)
        with pytest.raises(offload.CommitError, match="did not go on from one"):
            run.engine.save()


def test_a_changed_byte_of_a_page_is_found_when_it_is_read_and_the_commit_before_is_whole(tmp_path: Path) -> None:
    states = committed(tmp_path)
    on_disk = CommitFolder(tmp_path / "pages")
    earlier = {(tensor.runs, tensor.tail) for tensor in on_disk.read(1).tensors}
    frame = next(
        tensor.runs[0][0]
        for tensor in on_disk.read(2).tensors
        if tensor.runs and (tensor.runs, tensor.tail) not in earlier
    )
    with open(tmp_path / "pages" / PAGE_FILE_NAME, "r+b") as pages:
        pages.seek((frame << 16) + 100)
        changed = bytes([pages.read(1)[0] ^ 1])
        pages.seek(-1, os.SEEK_CUR)
        pages.write(changed)
    with (
        pytest.raises(offload.ChecksumError, match=rf"frame {frame} .*was written with xxh3 \w+ and reads as"),
        Run(SMALL, tmp_path) as run,
    ):
        assert run.engine.resume() is not None
        run.train(4)
    commit_file(tmp_path, 2, "json").unlink()
    with Run(SMALL, tmp_path) as run:
        resumed = run.engine.resume()
        assert resumed is not None and resumed.step == 1
        assert_same(without_draws(run), states[1])


# ---- other folders and settings -------------------------------------------------------------------------------------


def test_another_page_size_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    expected = committed(tmp_path)[2]
    config = SMALL.config(tmp_path)
    config["memory"] = {"ram": 4 * MIB, "page": "128KiB"}
    with pytest.raises(offload.ConfigError, match="memory.page is 131072, the commits in .* have pages of 65536 bytes"):
        offload.prepare(Random(), adamw, config)
    config["memory"]["page"] = "auto"
    _, optimizer = offload.prepare(Random(), adamw, config)
    assert optimizer.engine.debug.page_files.page_bytes == 65536
    optimizer.engine.close()
    with Run(SMALL, tmp_path) as run:
        run.engine.resume()
        assert_same(without_draws(run), expected)


def two_paths(folder: Path, *names: str) -> dict[str, Any]:
    config = SMALL.config(folder)
    config["ssd"]["paths"] = [str(folder / name) for name in names]
    return config


@pytest.mark.parametrize("names", [("b", "a"), ("a",), ("b",), ("a", "c"), ("c", "a"), ("c", "b"), ("a", "b", "c")])
def test_other_folders_than_the_commits_are_refused_before_they_are_written_to(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    _, optimizer = offload.prepare(Random(), adamw, two_paths(tmp_path, "a", "b"))
    optimizer.engine.save()
    weights = optimizer.engine.model.state_dict()
    optimizer.engine.close()
    with pytest.raises(offload.ConfigError, match="ssd.paths"):
        offload.prepare(Random(), adamw, two_paths(tmp_path, *names))
    _, optimizer = offload.prepare(Random(), adamw, two_paths(tmp_path, "a", "b"))
    optimizer.engine.resume()
    assert_same(optimizer.engine.model.state_dict(), weights)
    optimizer.engine.close()


def test_folders_that_were_moved_together_are_the_same_run(tmp_path: Path) -> None:
    expected = committed(tmp_path / "before")[2]
    shutil.move(tmp_path / "before", tmp_path / "after")
    with Run(SMALL, tmp_path / "after") as run:
        assert run.engine.resume() is not None
        assert_same(without_draws(run), expected)


def test_commits_without_checksums_are_not_read_with_them(tmp_path: Path) -> None:
    config = SMALL.config(tmp_path)
    config["ssd"]["checksums"] = False
    for _ in range(2):
        _, optimizer = offload.prepare(Random(), adamw, config)
        optimizer.engine.resume()
        optimizer.engine.save()
        weights = optimizer.engine.model.state_dict()
        optimizer.engine.close()
    with pytest.raises(offload.ConfigError, match="ssd.checksums is true, but commits in .* have none"):
        offload.prepare(Random(), adamw, SMALL.config(tmp_path))
    _, optimizer = offload.prepare(Random(), adamw, config)
    optimizer.engine.resume()
    assert_same(optimizer.engine.model.state_dict(), weights)
    optimizer.engine.close()


def test_checksums_can_be_turned_off_later(tmp_path: Path) -> None:
    expected = committed(tmp_path)[2]
    config = SMALL.config(tmp_path)
    config["ssd"]["checksums"] = False
    _, optimizer = offload.prepare(Random(), adamw, config)
    optimizer.engine.resume()
    assert_same(optimizer.engine.model.state_dict(), expected["model"])
    optimizer.engine.close()
