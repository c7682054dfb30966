"""Commits of several ranks: all parts or none, and going on from them with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_ranks import config_of, gather_values, on_engines, trained_plainly
from safetensors.torch import load_file
from tied_model import ADAMW, loss_of, steps_of, tied_model
from torch import Tensor

import offload
from offload.cli import main

STEPS = steps_of(8, 2)


def plain(n_steps: int = 8) -> list[Tensor]:
    return trained_plainly(tied_model(), ADAMW, STEPS[:n_steps], loss_of)


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def train(engine: offload.Engine, rank: int, begin: int, end: int) -> None:
    for step in STEPS[begin:end]:
        engine.backward(loss_of(engine.model, step[rank]))
        assert engine.step()


Body = Callable[[offload.Engine, int], Any]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, body: Body, degree: str = "all", n_ranks: int = 2) -> list[Any]:
    models = [tied_model() for _ in range(n_ranks)]

    def on(rank: int) -> Any:
        config = config_of(folder, "1MiB", checksums=True, parallel={"degree": degree})
        with offload.Engine(models[rank], config, ADAMW) as engine:
            return body(engine, rank)

    return on_engines(n_ranks, monkeypatch, on)


def commits_at_5(engine: offload.Engine, rank: int) -> None:
    train(engine, rank, 0, 5)
    engine.save(wait=True)
    train(engine, rank, 5, 7)


def goes_on(engine: offload.Engine, rank: int) -> tuple[int, list[Tensor]]:
    found = engine.resume()
    assert found is not None
    train(engine, rank, found.step, 8)
    return found.step, gather_values(engine.model)


@pytest.mark.parametrize("degree", ["none", "states", "all"])
def test_ranks_go_on_from_their_commit(degree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, commits_at_5, degree)
    for step, values in run(tmp_path, monkeypatch, goes_on, degree):
        assert step == 5
        assert equal(values, plain())


def test_a_part_that_one_rank_cannot_make_leaves_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagemem.durable.commit_folder import CommitFolder

    def body(engine: offload.Engine, rank: int) -> str:
        train(engine, rank, 0, 3)
        engine.save(wait=True)
        if rank == 1:
            monkeypatch.setattr(engine.debug.committer._earlier.folder, "write", failing, raising=True)
        train(engine, rank, 3, 5)
        with pytest.raises(offload.OffloadError) as raised:
            engine.save(wait=True)
        return str(raised.value)

    def failing(*_: object) -> None:
        raise offload.StorageError("the disk is gone")

    first, second = run(tmp_path, monkeypatch, body)
    assert "rank 1 could not make its part; earlier ones are whole" in first and second == "the disk is gone"
    assert [CommitFolder(tmp_path / "ranks/shape-1" / f"rank-{rank}").numbers() for rank in (0, 1)] == [[1], [1]]
    assert [found[0] for found in run(tmp_path, monkeypatch, goes_on)] == [3, 3]


def test_a_part_without_a_root_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(engine: offload.Engine, rank: int) -> None:
        train(engine, rank, 0, 3)
        engine.save(wait=True)
        train(engine, rank, 3, 5)
        engine.save(wait=True)

    run(tmp_path, monkeypatch, body)
    (tmp_path / "ranks/commit-00000002.json").unlink()  # as if all had been killed before it was written
    for step, values in run(tmp_path, monkeypatch, goes_on):
        assert step == 3 and equal(values, plain())


def test_a_damaged_part_on_one_rank_damages_the_commit_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(engine: offload.Engine, rank: int) -> None:
        train(engine, rank, 0, 3)
        engine.save(wait=True)
        train(engine, rank, 3, 5)
        engine.save(wait=True)

    def older(engine: offload.Engine, rank: int) -> tuple[str, int | None]:
        with pytest.raises(offload.CommitError) as raised:
            engine.resume()
        found = engine.resume(allow_older=True)
        return str(raised.value), None if found is None else found.step

    run(tmp_path, monkeypatch, body)
    part = tmp_path / "ranks/shape-1/rank-1/commits/commit-00000002.json"
    part.write_bytes(part.read_bytes()[:-5])
    (first, first_step), (second, second_step) = run(tmp_path, monkeypatch, older)
    assert "another rank's part of it is damaged" in first and "it was cut" in second
    assert (first_step, second_step) == (3, 3)


def test_only_so_many_commits_are_kept_and_named_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagemem.durable.root_folder import RootFolder

    def body(engine: offload.Engine, rank: int) -> None:
        for number in range(5):
            train(engine, rank, number, number + 1)
            engine.save("first" if number == 0 else None)

    run(tmp_path, monkeypatch, body)
    assert RootFolder(tmp_path).numbers() == [1, 4, 5]


def test_a_run_that_does_not_go_on_from_its_commits_does_not_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(engine: offload.Engine, rank: int) -> str:
        train(engine, rank, 0, 1)
        with pytest.raises(offload.CommitError) as raised:
            engine.save()
        return str(raised.value)

    run(tmp_path, monkeypatch, commits_at_5)
    assert all("did not go on from one" in said for said in run(tmp_path, monkeypatch, body))


def trained_by(n_ranks: int, degree: str, begin: int, end: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train some steps of four micro-batches each, going on from what there is; returns each rank's parameters."""
    steps = steps_of(10, 4)

    def body(engine: offload.Engine, rank: int) -> list[Tensor]:
        found = engine.resume()
        assert (0 if found is None else found.step) == begin
        own = 4 // n_ranks
        for step in steps[begin:end]:
            for batch in step[rank * own : (rank + 1) * own]:
                engine.backward(loss_of(engine.model, batch))
            assert engine.step()
        engine.save()
        return gather_values(engine.model)

    models = [tied_model() for _ in range(n_ranks)]

    def on(rank: int) -> list[Tensor]:
        # Other page sizes, so that units and slices are others, too.
        config = config_of(folder, f"{n_ranks}MiB", parallel={"degree": degree}, update={"accumulation": 4 // n_ranks})
        with offload.Engine(models[rank], config, ADAMW) as engine:
            return body(engine, rank)

    return on_engines(n_ranks, monkeypatch, on)


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_on(shapes: list[tuple[int, str]], folder: Path) -> list[Tensor]:
        for number, (n_ranks, degree) in enumerate(shapes):
            found = trained_by(n_ranks, degree, 2 * number, 2 * number + 2, folder, monkeypatch)
            assert all(equal(other, found[0]) for other in found)
        return found[0]

    # The sums of four micro-batches are others with other numbers of ranks, so each is compared with itself.
    changing = run_on([(4, "all"), (2, "states"), (4, "none"), (4, "all")], tmp_path / "changing")
    parts = [
        trained_by(n, "all", 2 * i, 2 * i + 2, tmp_path / "alike", monkeypatch)[0] for i, n in enumerate((4, 2, 4, 4))
    ]
    assert equal(changing, parts[-1])


def test_one_process_goes_on_from_many_and_many_from_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def single(begin: int, end: int) -> list[Tensor]:
        config = config_of(tmp_path, "3MiB", update={"accumulation": 4})
        with offload.Engine(tied_model(), config, ADAMW) as engine:
            found = engine.resume()
            assert (0 if found is None else found.step) == begin
            for step in steps_of(10, 4)[begin:end]:
                for batch in step:
                    engine.backward(loss_of(engine.model, batch))
                assert engine.step()
            engine.save()
            return gather_values(engine.model)

    single(0, 2)
    # Four ranks have the bits of one process that accumulates as many.
    trained_by(4, "all", 2, 4, tmp_path, monkeypatch)
    single(4, 6)
    (found, *_) = trained_by(4, "states", 6, 8, tmp_path, monkeypatch)
    assert equal(found, trained_plainly(tied_model(), ADAMW, steps_of(10, 4)[:8], loss_of))


@pytest.mark.parametrize("degree", ["states", "all"])
def test_a_commit_of_ranks_is_exported_and_verified(
    degree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(engine: offload.Engine, rank: int) -> None:
        train(engine, rank, 0, 3)
        engine.export(tmp_path / "by the engine")

    run(tmp_path / "run", monkeypatch, body, degree)
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "by the command")]) == 0
    assert "commit 1, step 3" in (said := capsys.readouterr().out) and ", 2 ranks" in said
    for name in ("by the engine", "by the command"):
        found = load_file(tmp_path / name / "model.safetensors")
        for (key, _), wanted in zip(tied_model().named_parameters(), plain(3), strict=True):
            assert torch.equal(found[key], wanted), (name, key)
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert "whole; " in capsys.readouterr().out
    pages = tmp_path / "run/ranks/shape-1/rank-1/pages.bin"
    content = bytearray(pages.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    pages.write_bytes(content)
    assert main(["verify", str(tmp_path / "run")]) == 1
    assert "commit 1: shape-1/rank-1: " in capsys.readouterr().out
