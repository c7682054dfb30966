"""Reads of source files against safetensors' own: any dtypes, offsets, pieces and sizes of reads."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pagemem.devices.arena import HostArena
from pagemem.files.stats import IoMeter
from pagemem.frames.page import FrameId
from pagemem.sources.source_files import Origin, SourceFile, SourcePiece
from pagemem.sources.source_transfers import SourceFiles
from pagemem.units import KiB, round_up

NAMES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def written(path: Path, tensors: list[tuple[str, Tensor]], padding: int) -> dict[str, int]:
    """Write a safetensors file whose data begins anywhere; returns where each tensor's does."""
    header, at = {}, 0
    for number, (dtype, tensor) in enumerate(tensors):
        n_bytes = tensor.nbytes
        header[str(number)] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header).encode() + b" " * padding
    data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for _, tensor in tensors)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}  # type: ignore[index]


def loaded(files: SourceFiles, origin: Origin, into: memoryview) -> list[tuple[int, int]]:
    """Load an origin; returns the parts that were told of."""
    spans: list[tuple[int, int]] = []
    ended, lock = threading.Event(), threading.Lock()
    errors: list[BaseException | None] = []

    def part(more: Sequence[tuple[int, int]]) -> None:
        with lock:
            spans.extend(more)

    def done(error: BaseException | None) -> None:
        errors.append(error)
        ended.set()

    files.open(origin.files)
    files.read(origin, into, done, part=part)
    assert ended.wait(60) and errors == [None]
    return spans


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.sampled_from(sorted(NAMES)), st.integers(1, 90_000)), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 70),
    chunk_bytes=st.sampled_from([64, 4096, 40_000 * 64, 64 * KiB]).filter(lambda n: n % 64 == 0),
    gap=st.integers(0, 9000),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_a_load_is_what_safetensors_reads(
    sizes: list[tuple[str, int]],
    dtype: torch.dtype,
    padding: int,
    chunk_bytes: int,
    gap: int,
    seed: int,
    data: st.DataObject,
) -> None:
    if chunk_bytes == 64:
        sizes = [(name, 1 + numel % 700) for name, numel in sizes]
    generator = torch.Generator().manual_seed(seed)
    tensors = [(name, torch.randn(n, generator=generator).to(NAMES[name])) for name, n in sizes]
    order = data.draw(st.permutations(range(len(sizes))))
    with TemporaryDirectory() as folder, closing(SourceFiles(IoMeter(), n_threads=2, chunk_bytes=chunk_bytes)) as files:
        path = Path(folder) / "model.safetensors"
        offsets = written(path, tensors, padding)
        plain = load_file(path)
        pieces, at, expected = [], 0, []
        for number in order:
            source, numel = tensors[number][1].dtype, tensors[number][1].numel()
            n_bytes = numel * source.itemsize
            pieces.append(SourcePiece(SourceFile.of(path), offsets[str(number)], n_bytes, at, source, dtype))
            expected.append((at, plain[str(number)].to(dtype)))
            at = pieces[-1].end_bytes + gap // 64 * 64
        origin = Origin.of(pieces, round_up(at, 4096))
        arena = HostArena(origin.n_bytes // 4096 + 1, 4096)
        into = arena.buffer(FrameId(0), origin.n_bytes)
        into[:] = b"\xff" * origin.n_bytes
        spans = loaded(files, origin, into)
        covered = np.zeros(origin.n_bytes, dtype=np.int8)
        for begin, end in spans:
            covered[begin:end] += 1
        assert (covered == 1).all()
        flat = torch.frombuffer(into, dtype=torch.uint8)
        for begin, values in expected:
            assert torch.equal(flat[begin : begin + values.nbytes], values.view(torch.uint8))
        assert all(not flat[begin:end].any() for begin, end in origin.gaps())
        begin = data.draw(st.integers(0, origin.n_bytes // 64)) * 64
        end = data.draw(st.integers(begin // 64, origin.n_bytes // 64)) * 64
        taken = np.zeros(end - begin, dtype=np.uint8)
        files.reader.fill(origin.part(begin, end), taken)
        assert (taken == flat[begin:end].numpy()).all()
        del flat
        into.release()
        arena.close()
