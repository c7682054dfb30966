"""`offload export`: the very weights, in shards that everybody reads, in little memory, and nothing half done."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import FinishedRun, Tied, finished, refused, settings
from parity import adamw
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import assert_equal, batches, built, engine_of, train
from tiny_models import CASES
from torch import Tensor, nn

import offload
from offload.checkpoint import commit_weights
from offload.cli import main
from offload.sources.checkpoint_index import INDEX_NAME
from pagemem.durable import page_reader
from pagemem.durable.page_reader import Chunk, PageReader


def loaded(folder: Path) -> dict[str, Tensor]:
    """What the shards hold, by the names of ``model.state_dict()``: tied ones, which are written once, under each
    name."""
    index = json.loads((folder / INDEX_NAME).read_text())
    found: dict[str, Tensor] = {}
    for file_name in dict.fromkeys(index["weight_map"].values()):
        found |= load_file(folder / file_name)
    assert set(found) == set(index["weight_map"])
    return found | {name: found[kept] for name, kept in index["metadata"]["tied"].items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, dtypes, shapes and bits."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype is value.dtype and torch.equal(found[name], value), name


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["gpt", "conv", "partly_trained", "tied"])
def test_the_shards_hold_the_weights_bit_for_bit(kind: str, dtype: str, tmp_path: Path) -> None:
    build = Tied if kind == "tied" else CASES[kind].build
    torch.manual_seed(3)
    data = batches(2) if kind == "tied" else [CASES[kind].batch(torch.Generator().manual_seed(k)) for k in range(2)]
    if dtype == "bf16":
        data = [(x.bfloat16() if x.is_floating_point() else x, y) for x, y in data]
    finish = finished(build(), settings(tmp_path, dtype=dtype), data, names=[None, None])
    assert main(["export", str(finish.folder), "--to", str(tmp_path / "out"), "--max-shard", "100KB"]) == 0
    found = loaded(tmp_path / "out")
    assert_same(found, finish.weights)
    plain = build().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    plain.load_state_dict(found)
    assert_same(
        {k: v for k, v in plain.state_dict().items() if v.is_floating_point() and k in dict(plain.named_parameters())},
        {k: v for k, v in finish.weights.items() if k in dict(plain.named_parameters()) and v.is_floating_point()},
    )


def test_tied_tensors_are_written_once_and_their_names_are_kept(tmp_path: Path) -> None:
    finish = finished(Tied(), settings(tmp_path), batches(1))
    assert main(["export", str(finish.folder), "--to", str(tmp_path / "out")]) == 0
    tied = {"head.weight": "embed.weight"} | {
        f"again.{name}": f"norm.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert (
        index["metadata"]["tied"] == tied
        and index["metadata"]["step"] == 1
        and not set(index["weight_map"]) & set(tied)
    )
    assert "scratch" not in index["weight_map"] and "codes" in index["weight_map"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **tied}
    model = Tied()
    assert not model.load_state_dict(loaded(tmp_path / "out")).missing_keys
    assert torch.equal(model.head.weight, finish.weights["embed.weight"])


@pytest.mark.parametrize(("limit", "alone"), [(300_000, False), (1, True)])
def test_shards_are_no_larger_than_asked_but_for_single_tensors(
    run: FinishedRun, limit: int, alone: bool, tmp_path: Path
) -> None:
    assert main(["export", str(run.folder), "--to", str(tmp_path / "out"), "--max-shard", str(limit)]) == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)
    ]
    for file in files:
        held = load_file(file)
        assert len(held) == 1 if alone else sum(value.nbytes for value in held.values()) <= limit
        assert (
            file.stat().st_size - sum(value.nbytes for value in held.values())
        ) % 8 == 0  # whole words of header: tensors are aligned
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in run.weights.values())


def test_fp32_takes_the_masters_and_keeps_what_was_edited_since(tmp_path: Path) -> None:
    model = built()
    with offload.initialize(model, settings(tmp_path, dtype="bf16"), adamw) as engine:
        train(engine, 3)
        with offload.gathered(model.norm), torch.no_grad():
            model.norm.weight.fill_(1.5)
        engine.save()
        weights = {key: value.clone() for key, value in model.state_dict().items()}
    assert main(["export", str(tmp_path / "pages"), "--to", str(tmp_path / "wide"), "--dtype", "fp32"]) == 0
    wide = loaded(tmp_path / "wide")
    assert_same({name: value.bfloat16() for name, value in wide.items()}, weights)
    assert torch.equal(wide["norm.weight"], torch.full((128,), 1.5))
    assert not torch.equal(wide["tok.weight"], weights["tok.weight"].float())  # what rounding hides is there
    assert main(["export", str(tmp_path / "pages"), "--to", str(tmp_path / "half"), "--dtype", "fp16"]) == 0
    assert_same(loaded(tmp_path / "half"), {name: value.half() for name, value in wide.items()})


def test_values_that_a_dtype_cannot_express_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = built()
    with torch.no_grad():
        model.norm.weight[5] = 70_000.0
    finish = finished(model, settings(tmp_path))
    assert main(["export", str(finish.folder), "--to", str(tmp_path / "out"), "--dtype", "fp16"]) == 1
    assert (
        "norm.weight has values beyond the largest of torch.float16, 65504; export as bf16 or fp32"
        in capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pages"]


@pytest.mark.parametrize("commit", ["first", "1"])
def test_a_commit_is_chosen_by_name_or_number(
    run: FinishedRun, commit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run.folder), "--to", str(tmp_path / "out"), "--commit", commit]) == 0
    assert "commit 1 (first), step 1, of " in capsys.readouterr().out
    plain = built()
    plain.load_state_dict(loaded(tmp_path / "out"))
    (tmp_path / "again").mkdir()
    with engine_of(built(), tmp_path / "again") as engine:
        train(engine, 1)
        assert_equal(engine.model, plain)


def test_a_name_that_is_the_number_of_another_commit_gives_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(built(), settings(tmp_path), names=["2", "7"])
    for commit, said in (("2", "commit 2 (7)"), ("7", "commit 2 (7)"), ("1", "commit 1 (2)")):
        assert main(["export", str(run.folder), "--to", str(tmp_path / f"out{commit}"), "--commit", commit]) == 0
        assert capsys.readouterr().out.startswith(said)


def test_an_engine_exports_itself_and_goes_on(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        train(engine, 2)
        weights = {key: value.clone() for key, value in engine.model.state_dict().items()}
        assert engine.export(tmp_path / "out", max_shard="200KB") == tmp_path / "out"
        assert_same(loaded(tmp_path / "out"), weights)
        with pytest.raises(offload.ExportError, match="is not empty"):
            engine.export(tmp_path / "out")
        with pytest.raises(ValueError, match="dtype is 'int8'; known are keep, fp32, bf16, fp16"):
            engine.export(tmp_path / "more", dtype="int8")
        assert (tmp_path / "pages" / "commits").is_dir() and len(list((tmp_path / "pages" / "commits").iterdir())) == 1
        train(engine, 1)


# ---- memory and output -----------------------------------------------------------------------------------------------


def test_a_tensor_of_any_size_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(1024, 2048, bias=False), nn.Linear(2048, 1024))
    ram = settings(tmp_path, dtype="bf16")
    ram["memory"]["ram"] = 64 << 20
    with offload.initialize(model, ram, adamw) as engine:
        engine.save()
    monkeypatch.setattr(page_reader, "CHUNK_BYTES", 128 << 10)
    monkeypatch.setattr(commit_weights, "PIECE_NUMEL", 32 << 10)
    largest, buffers = {"read": 0, "written": 0}, []
    read, pwrite, buffer = PageReader.read, os.pwrite, PageReader.buffer

    def counted_read(self: PageReader, chunk: Chunk, into: memoryview, *, checksums: bool) -> Any:
        largest["read"] = max(largest["read"], into.nbytes, chunk.n_bytes)
        return read(self, chunk, into, checksums=checksums)

    def counted_write(fd: int, data: memoryview, position: int) -> int:
        largest["written"] = max(largest["written"], memoryview(data).nbytes)
        return pwrite(fd, data, position)

    def counted_buffer(self: PageReader) -> mmap.mmap:
        buffers.append(self.chunk_bytes)
        return buffer(self)

    monkeypatch.setattr(PageReader, "read", counted_read)
    monkeypatch.setattr(PageReader, "buffer", counted_buffer)
    monkeypatch.setattr(os, "pwrite", counted_write)
    tracemalloc.start()
    try:
        assert main(["export", str(tmp_path / "pages"), "--to", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 16 << 20
    assert largest == {"read": 128 << 10, "written": 128 << 10} and peak_bytes < 4 << 20
    assert buffers == [128 << 10] * 2  # mapped outside of what is traced


def test_output_in_a_pipe_is_plain_lines(run: FinishedRun, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "offload.cli", "export", str(run.folder), "--to", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    lines = done.stdout.splitlines()
    assert lines[0].startswith("commit 2, step 2, of ") and lines[-2].startswith("exporting 100 %  ")
    assert lines[-1].startswith(f"{tmp_path / 'out'}: 1 file, ") and done.stderr == ""
    assert done.stdout.replace("\n", "").isprintable() and 3 <= len(lines) <= 12


# ---- several disks ---------------------------------------------------------------------------------------------------


def test_all_folders_of_a_run_are_found_or_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    run = finished(built(), settings(tmp_path, paths=paths))
    assert main(["export", str(run.folder), "--to", str(tmp_path / "found")]) == 0
    assert_same(loaded(tmp_path / "found"), run.weights)
    (tmp_path / "two").rename(tmp_path / "moved")
    refused([str(run.folder), "--to", str(tmp_path / "out")], "are in 3 folders, not found: number 2 (run id ", capsys)
    refused([str(run.folder), "--to", str(tmp_path / "out"), "--path", str(tmp_path)], "is not a run directory", capsys)
    refused([str(tmp_path / "three"), "--to", str(tmp_path / "out")], "name the first one of its ssd.paths", capsys)
    assert main(["export", str(run.folder), "--to", str(tmp_path / "named"), "--path", str(tmp_path / "moved")]) == 0
    assert_same(loaded(tmp_path / "named"), run.weights)
