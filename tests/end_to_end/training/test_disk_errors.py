"""A disk that is full, fails, or returns other bytes than were written: it is named, and nothing is trained on it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from faulty_disk import FaultyDisk
from parity import adamw
from small_runs import PAGE_BYTES, assert_closed, assert_equal, built, config, engine_of, train

import offload
from pagemem.files.page_file import PAGE_FILE_NAME


@pytest.mark.parametrize("kind", ["allocate", "write"])
def test_a_full_disk_at_the_start_says_how_much_was_wanted_and_is_free(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, model = FaultyDisk.install(monkeypatch), built()
    disk.errors[kind] = errno.ENOSPC
    message = rf"{PAGE_FILE_NAME} at offset \d+, \d+ bytes.*wanted \d+ bytes.*free are \d+.*ssd\.paths"
    with pytest.raises(offload.DiskFullError, match=message):
        offload.prepare(model, adamw, config(tmp_path))
    disk.errors.clear()
    with engine_of(built(), tmp_path) as engine:
        train(engine, 2)
    assert_closed(engine)


def test_a_full_disk_at_the_start_leaves_the_weights_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, model = FaultyDisk.install(monkeypatch), built()
    disk.errors["allocate"] = errno.ENOSPC
    with pytest.raises(offload.DiskFullError):
        offload.prepare(model, adamw, config(tmp_path))
    assert_equal(model, built())


@pytest.mark.parametrize(
    ("kind", "code", "expected", "message"),
    [
        (
            "write",
            errno.ENOSPC,
            offload.DiskFullError,
            r"writing .*pages\.bin at offset \d+.*wanted \d+ bytes.*free are \d+",
        ),
        (
            "write",
            errno.EIO,
            offload.StorageError,
            r"writing .*pages\.bin at offset \d+, \d+ bytes: Input/output error",
        ),
        ("read", errno.EIO, offload.StorageError, r"reading .*pages\.bin at offset \d+, \d+ bytes: Input/output error"),
    ],
)
@pytest.mark.parametrize("steps", [1, 4], ids=["on_demand", "planned"])
def test_a_disk_that_fails_in_training_is_named_and_the_engine_closes(
    kind: str,
    code: int,
    expected: type[Exception],
    message: str,
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = FaultyDisk.install(monkeypatch)
    engine = engine_of(built(), tmp_path)
    train(engine, steps)
    disk.errors[kind] = code
    with pytest.raises(expected, match=message):
        train(engine, 2)
    assert_closed(engine)


def test_a_flipped_byte_is_named_and_nothing_is_trained_on_it(tmp_path: Path) -> None:
    engine = engine_of(built(), tmp_path)
    train(engine, 4)
    engine.drain()
    unit = next(unit for unit in engine.debug.units if unit.parameters.state.value in ("absent", "stored"))
    assert unit.parameters.copy is not None
    placement = unit.parameters.copy.placement
    assert placement is not None
    frame = placement.extents(PAGE_BYTES)[0].frame
    file = tmp_path / "pages" / PAGE_FILE_NAME
    with open(file, "r+b") as pages:
        pages.seek(frame * PAGE_BYTES + 100)
        flipped = bytes([pages.read(1)[0] ^ 1])
        pages.seek(-1, os.SEEK_CUR)
        pages.write(flipped)
    version, steps = unit.version, engine.stats().steps
    with pytest.raises(offload.ChecksumError, match=rf"{file}: frame {frame} .*was written with xxh3 \w+ and reads as"):
        train(engine, 1)
    assert (unit.version, engine.stats().steps) == (version, steps)
    assert_closed(engine)


def test_a_background_failure_that_nobody_was_told_of_is_raised_by_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk.install(monkeypatch)
    engine = engine_of(built(), tmp_path)
    train(engine, 2)
    engine.drain()
    dirty = next(t for t in engine.debug.mover.tensors.values() if t.state.value == "dirty")
    disk.errors["write"] = errno.EIO
    engine.debug.mover.start_store(dirty)
    engine.debug.mover.monitor.settle()
    with pytest.raises(offload.StorageError, match="Input/output error"):
        engine.close()
    assert_closed(engine)
