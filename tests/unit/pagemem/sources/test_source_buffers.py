"""Buffers of files that are read in place: how large they get, and that reads grow with them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pagemem.devices.arena import HostArena
from pagemem.files.rate_limit import TokenBucket
from pagemem.files.stats import IoMeter
from pagemem.frames.page import FrameId
from pagemem.sources.source_files import Origin, SourceFile, SourcePiece
from pagemem.sources.source_reader import CHUNK_BYTES, Bounce, bounce_bytes
from pagemem.sources.source_transfers import SourceFiles
from pagemem.units import KiB, MiB

N_BYTES = 4 * MiB
OFFSET = 1001
TIMEOUT_S = 60.0


@pytest.fixture
def files() -> Iterator[SourceFiles]:
    """With reads of 64 KiB on four threads."""
    with closing(SourceFiles(IoMeter(), n_threads=4, chunk_bytes=64 * KiB)) as made:
        yield made


def originated(folder: Path) -> tuple[Origin, bytes]:
    """A tensor of 4 MiB in a file, and its bytes."""
    content = os.urandom(N_BYTES + OFFSET)
    (folder / "file").write_bytes(content)
    piece = SourcePiece(SourceFile.of(folder / "file"), OFFSET, N_BYTES, 0, torch.bfloat16, torch.bfloat16)
    return Origin.of([piece], N_BYTES), content[OFFSET:]


def load(files: SourceFiles, origin: Origin, *, background: bool = False) -> bytes:
    """What one load brings."""
    arena, ended, errors = HostArena(1, N_BYTES), threading.Event(), []

    def done(error: BaseException | None) -> None:
        errors.append(error)
        ended.set()

    into = arena.buffer(FrameId(0), N_BYTES)
    files.read(origin, into, done, background=background)
    assert ended.wait(TIMEOUT_S) and errors == [None]
    found = bytes(into)
    into.release()
    arena.close()
    return found


def test_nothing_is_set_aside_where_nothing_is_read(files: SourceFiles, tmp_path: Path) -> None:
    assert files.larger_buffers(64 * MiB) == 0
    files.open(originated(tmp_path)[0].files)
    assert files.larger_buffers(64 * MiB) == 4 * bounce_bytes(CHUNK_BYTES), "no read is longer than 2 MiB"


@pytest.mark.parametrize("most_bytes", [0, 1, 4 * bounce_bytes(64 * KiB), 4 * bounce_bytes(64 * KiB) + 4095])
def test_buffers_that_would_not_be_larger_are_none(files: SourceFiles, tmp_path: Path, most_bytes: int) -> None:
    files.open(originated(tmp_path)[0].files)
    assert files.larger_buffers(most_bytes) == 0


@pytest.mark.parametrize("most_bytes", [320_000, 1_000_000, 2 * MiB, 7_654_321, 8 * MiB, 64 * MiB])
def test_reads_grow_with_the_buffers_and_bring_the_same(
    files: SourceFiles, tmp_path: Path, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, content = originated(tmp_path)
    files.open(origin.files)
    lengths: list[int] = []
    made: list[int] = []
    plain, several = os.preadv, Bounce.several

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        lengths.append(len(buffers[0]))
        return plain(fd, buffers, offset)

    def counted(number: int, chunk_bytes: int) -> list[Bounce]:
        found = several(number, chunk_bytes)
        made.append(sum(len(bounce.map) for bounce in found))
        return found

    monkeypatch.setattr(os, "preadv", preadv)
    assert load(files, origin) == content
    before, lengths[:] = max(lengths), []
    monkeypatch.setattr(Bounce, "several", counted)
    n_bytes = files.larger_buffers(most_bytes)
    assert 0 < n_bytes <= most_bytes
    files.enlarge_buffers(n_bytes)
    for _ in range(3):
        assert load(files, origin) == content
    assert made == [n_bytes], "made once, and as large as was said"
    assert before < max(lengths) <= n_bytes // 4


@pytest.mark.parametrize("throttled", [False, True])
def test_reads_in_the_background_are_made_by_all_threads_unless_they_wait_for_tokens(
    tmp_path: Path, throttled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, content = originated(tmp_path)
    throttle = TokenBucket(1e12) if throttled else None
    with closing(SourceFiles(IoMeter(), throttle, n_threads=4, chunk_bytes=64 * KiB)) as files:
        files.open(origin.files)
        plain, together, lock = os.preadv, [0, 0], threading.Lock()
        all_there = threading.Barrier(4)

        def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            with lock:
                together[0] += 1
                together[1] = max(together)
            if not throttled:
                all_there.wait(TIMEOUT_S)
            with lock:
                together[0] -= 1
            return plain(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        assert load(files, origin, background=True) == content
        assert together[1] == (1 if throttled else 4)
