"""The system starts no more threads, from any one on: one error in one line, nothing left running, no lock, and no
hang."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from parity import adamw
from small_runs import batches, built, config

import offload

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "lock-free": {"update": {"mode": "lock-free", "max_staleness": 2}, "memory": {"ram": "8MiB"}},
    "device": {"device": "cpu-emulated", "memory": {"device": "1MiB"}},
    "aiofiles": {"ssd": {"direct": False}},
}


class Limit:
    """Lets so many threads start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
        self.left, self.refused = allowed, 0
        start = threading.Thread.start

        def limited(thread: threading.Thread) -> None:
            if not self.left:
                self.refused += 1
                raise RuntimeError("can't start new thread")
            self.left -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)


def run(folder: Path, mode: str) -> None:
    """Two steps and a commit."""
    settings = config(folder)
    for section, value in MODES[mode].items():
        settings[section] = {**settings.get(section, {}), **value} if isinstance(value, dict) else value
    model = built()
    with offload.initialize(model, settings, adamw) as engine:
        for batch in batches(2):
            engine.backward(engine(*batch))
            engine.step()
        engine.save()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.timeout(120)
def test_none_is_started_from_one_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    allowed = 0
    while True:
        with monkeypatch.context() as patched:
            limit = Limit(patched, allowed)
            try:
                run(tmp_path / "run", mode)
            except offload.OffloadError as error:
                assert "could not be started (can't start new thread)" in str(error) and "\n" not in str(error), error
        assert not list(tmp_path.rglob("pagemem.lock"))
        left = [
            thread.name for thread in threading.enumerate() if thread.name.startswith(("pagemem", "offload", "optim"))
        ]
        assert not left, f"after {allowed}: {left}"
        if not limit.refused:
            break
        allowed += 1
    assert allowed >= 5
    run(tmp_path / "run2", mode)


def test_a_commit_that_cannot_begin_can_be_made_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with offload.initialize(built(), config(tmp_path), adamw) as engine:
        with monkeypatch.context() as patched:
            Limit(patched, 0)
            with pytest.raises(offload.StorageError, match="the thread offload-commit could not be started"):
                engine.save()
        assert engine.save() == 1
