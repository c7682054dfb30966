"""Files of others that fail, are cut, changed or taken away while parameters are read from them: an error in one line,
or the right bytes, never others."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_base import batch, plain_and_file, prepared, same, settings, sgd, train

from pagemem.devices.arena import HostArena
from pagemem.errors import StorageError
from pagemem.files.stats import IoMeter
from pagemem.frames.page import FrameId
from pagemem.sources.source_files import Origin, SourceFile, SourcePiece
from pagemem.sources.source_transfers import SourceFiles

N_BYTES = 1 << 20
OFFSET = 1001


class Loads:
    """A file of random bytes, and loads of nearly all of it."""

    def __init__(self, folder: Path, files: SourceFiles) -> None:
        self.path = folder / "file"
        self.content = os.urandom(N_BYTES + OFFSET)
        self.path.write_bytes(self.content)
        piece = SourcePiece(SourceFile.of(self.path), OFFSET, N_BYTES, 0, torch.bfloat16, torch.bfloat16)
        self.origin = Origin.of([piece], N_BYTES)
        self.files = files
        self.arena = HostArena(1, N_BYTES)
        files.open(self.origin.files)

    def load(self) -> BaseException | None:
        """Load all of it once; returns the error. Without one the bytes are right."""
        into = self.arena.buffer(FrameId(0), N_BYTES)
        into[:] = bytes(N_BYTES)
        ended, errors = threading.Event(), []

        def done(error: BaseException | None) -> None:
            errors.append(error)
            ended.set()

        self.files.read(self.origin, into, done)
        assert ended.wait(60)
        assert errors[0] is not None or bytes(into) == self.content[OFFSET:], "other bytes"
        into.release()
        return errors[0]


@pytest.fixture
def loads(tmp_path: Path) -> Iterator[Loads]:
    """Closed at the end."""
    with closing(SourceFiles(IoMeter(), n_threads=2, chunk_bytes=128 << 10)) as files:
        made = Loads(tmp_path, files)
        assert made.load() is None
        yield made
        made.arena.close()


def fail(error: int, times: int) -> Callable[..., int]:
    """A preadv that fails so often, and then works."""
    plain, left = os.preadv, [None] * times

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if left:
            left.pop()
            raise OSError(error, os.strerror(error))
        return plain(fd, buffers, offset)

    return preadv


def test_a_read_that_fails_is_an_error_and_the_next_works(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", fail(errno.EIO, 1))
    error = loads.load()
    assert isinstance(error, StorageError) and f"reading {loads.path} at offset" in str(error)
    assert "Input/output error" in str(error) and "\n" not in str(error)
    assert loads.load() is None


def test_interrupted_and_short_reads_go_on(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", fail(errno.EINTR, 3))
    assert loads.load() is None
    plain = os.preadv

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        (buffer,) = buffers
        return (
            plain(fd, [buffer[: max(1, len(buffer) * 2 // 3)]], offset)
            if len(buffer) > 8192
            else plain(fd, buffers, offset)
        )

    monkeypatch.setattr(os, "preadv", short)
    assert loads.load() is None
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)
    assert "it ends before byte" in str(loads.load())


def test_a_file_system_that_refuses_to_read_past_the_cache_is_read_through_it(
    loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert loads.load() is None


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda path: os.truncate(path, N_BYTES // 2), "was cut or lengthened from 1049577 to 524288 bytes"),
    "emptied": (lambda path: path.write_bytes(b""), "was cut or lengthened"),
    "written to": (lambda path: path.open("r+b").write(b"other"), "was changed"),
    "touched": (lambda path: os.utime(path, ns=(1, 1)), "was changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_an_error_in_one_line(loads: Loads, change: str) -> None:
    make, message = CHANGES[change]
    make(loads.path)
    error = loads.load()
    assert isinstance(error, StorageError) and message in str(error) and "\n" not in str(error)
    with pytest.raises(StorageError, match="was c"):
        loads.files.reader.fill(loads.origin.pieces, torch.empty(N_BYTES, dtype=torch.uint8).numpy())


def test_a_file_that_changes_while_it_is_read_is_an_error(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        moved = plain(fd, buffers, offset)
        os.utime(loads.path, ns=(offset, 1))
        return moved

    monkeypatch.setattr(os, "preadv", preadv)
    assert "was changed since parameters were taken from it" in str(loads.load())


def test_a_file_that_is_removed_or_replaced_is_read_on(loads: Loads) -> None:
    (loads.path.parent / "other").write_bytes(os.urandom(N_BYTES + OFFSET))
    os.replace(loads.path.parent / "other", loads.path)
    assert loads.load() is None
    loads.path.unlink()
    assert loads.load() is None


def test_what_is_closed_reads_nothing(loads: Loads) -> None:
    loads.files.close()
    with pytest.raises(StorageError, match="closed"):
        loads.load()
    with pytest.raises(StorageError, match="closed"):
        loads.files.open([])


@pytest.mark.parametrize("memory", [{}, {"ram": "1MiB", "device": "512KiB"}])
def test_training_goes_on_after_a_read_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: dict[str, str]
) -> None:
    plain, path = plain_and_file(tmp_path / "checkpoint")
    model, optimizer = prepared(settings(tmp_path, **memory), path)
    own = sgd(plain.parameters())
    with optimizer.engine as engine:
        assert train(model, optimizer, range(2)) == train(plain, own, range(2))
        engine.debug.store.driver.evict_all()
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", fail(errno.EIO, 1))
            with pytest.raises(StorageError, match="Input/output error"):
                train(model, optimizer, range(2, 3))
                model.state_dict()
                engine.drain()
            engine.abandon_step()
        # What failed may have been read for later steps, so that the step was made before that was heard of.
        made = engine.steps
        train(plain, own, range(2, made))
        assert same(plain, model)
        assert train(model, optimizer, range(made, 5)) == train(plain, own, range(made, 5))
        assert same(plain, model)


def test_a_base_that_is_cut_in_training_ends_it_in_one_line(tmp_path: Path) -> None:
    _, path = plain_and_file(tmp_path / "checkpoint")
    model, optimizer = prepared(settings(tmp_path), path)
    engine = optimizer.engine
    train(model, optimizer, range(2))
    os.truncate(path, path.stat().st_size // 2)
    engine.debug.store.driver.evict_all()
    with pytest.raises(StorageError, match=rf"{path} was cut or lengthened") as caught:
        model(*batch(2))
    assert "\n" not in str(caught.value)
    engine.abandon_step()
    with pytest.raises(StorageError, match=rf"{path} was cut or lengthened"):
        engine.save()
    engine.close()


def test_a_base_that_is_removed_is_not_committed_by_its_name(tmp_path: Path) -> None:
    plain, path = plain_and_file(tmp_path / "checkpoint")
    model, optimizer = prepared(settings(tmp_path), path)
    with optimizer.engine as engine:
        train(model, optimizer, range(2))
        engine.save("before")
        kept = path.rename(tmp_path / "kept")
        with pytest.raises(
            StorageError, match=rf"looking at {path}: No such file.* save model\.state_dict\(\)"
        ) as gone:
            engine.save()
        assert "\n" not in str(gone.value)
        path.write_bytes(kept.read_bytes())
        with pytest.raises(StorageError, match=rf"{path} was replaced since .* save model\.state_dict\(\) elsewhere"):
            engine.save()
        values = model.state_dict()
        assert all(torch.equal(value, values[name]) for name, value in plain.base.state_dict(prefix="base.").items())
        path.unlink()
        assert train(model, optimizer, range(2, 4))
        kept.rename(path)
        engine.save("after")
