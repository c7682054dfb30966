"""Handlers of others that raise in the middle of the engine's code, and programs that end without closing it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import adamw
from raising_signal import Raised, raising
from small_runs import batches, built, config

import offload
from offload.checkpoint.committer import Committer
from pagemem.errors import OffloadError

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "lock-free": {"update": {"mode": "lock-free", "max_staleness": 2}, "memory": {"ram": "8MiB"}},
    "device": {"device": "cpu-emulated", "memory": {"device": "1MiB"}},
}


def settings(folder: Path, mode: str) -> dict[str, Any]:
    made = config(folder)
    for section, value in MODES[mode].items():
        made[section] = {**made.get(section, {}), **value} if isinstance(value, dict) else value
    return made


def interrupted(folder: Path, mode: str, at: int, *, while_closing: bool) -> int:
    """Train, with an exception at one instant of a step or of `close`; returns how many instants there were."""
    engine = offload.initialize(built(), settings(folder, mode), adamw)
    data = batches(4)

    def step(number: int) -> None:
        engine.backward(engine(*data[number]))
        engine.step()

    for number in range(3):
        step(number)
    engine.save(wait=False)
    last: Callable[[], None] = engine.close if while_closing else lambda: step(3)
    with raising(at) as instants:
        try:
            last()
        except Raised:
            pass
        except (
            OffloadError,
            RuntimeError,
        ) as error:  # the step may be what the exception has made it; hanging is what it may not
            assert not while_closing, error
    try:
        engine.close()
    except (OffloadError, AssertionError, RuntimeError) as error:
        assert not while_closing, error
    assert not list(folder.rglob("pagemem.lock")), at
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(("pagemem", "offload", "optim"))]
    assert not left, (at, left)
    return instants.count


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.timeout(120)
def test_close_comes_to_its_end(tmp_path: Path, mode: str) -> None:
    n_instants = interrupted(tmp_path / "all", mode, 0, while_closing=True)
    assert n_instants > 50
    for number, at in enumerate(random.Random(3).sample(range(1, n_instants), 6)):
        interrupted(tmp_path / str(number), mode, at, while_closing=True)


@pytest.mark.long
@pytest.mark.parametrize("while_closing", [False, True], ids=["step", "close"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.timeout(1800)
def test_at_random_instants(tmp_path: Path, tally: Callable[..., None], mode: str, while_closing: bool) -> None:
    n_instants = interrupted(tmp_path / "all", mode, 0, while_closing=while_closing)
    chosen = random.Random(4).sample(range(1, n_instants), min(50, n_instants - 1))
    failures = []
    for number, at in enumerate(chosen):
        try:
            interrupted(tmp_path / str(number), mode, at, while_closing=while_closing)
        except AssertionError as error:
            failures.append(f"instant {at}: {error}")
    what = "close" if while_closing else "a step"
    tally(
        f"a handler that raises in {what}: {mode}",
        trials=len(chosen),
        failures=len(failures),
        detail=f"of {n_instants} instants, seed 4",
    )
    assert not failures, failures[:3]


@pytest.mark.timeout(120)
def test_ctrl_c_in_close_is_raised_when_all_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = offload.initialize(built(), settings(tmp_path, "exact"), adamw)
    batch = batches(1)[0]
    engine.backward(engine(*batch))
    engine.step()
    engine.save(wait=False)
    close = Committer.close

    def pressed(committer: Committer) -> None:
        for _ in range(6):
            signal.raise_signal(signal.SIGINT)
        close(committer)

    monkeypatch.setattr(Committer, "close", pressed)
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert engine.debug.closed and engine.debug.store.given_back
    assert not list(tmp_path.rglob("pagemem.lock"))
    assert [path.name for path in (tmp_path / "pages" / "commits").iterdir()] == ["commit-00000001.json"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.timeout(120)
def test_ctrl_c_while_a_save_is_waited_for_leaves_the_commit_to_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with offload.initialize(built(), settings(tmp_path, "exact"), adamw) as engine:
        hold, sync = threading.Event(), engine.debug.page_files.sync
        monkeypatch.setattr(engine.debug.page_files, "sync", lambda: (hold.wait(60), sync()))
        wait = Committer.wait

        def pressed(committer: Committer) -> None:
            if committer.busy:
                signal.raise_signal(signal.SIGINT)
            wait(committer)

        monkeypatch.setattr(Committer, "wait", pressed)
        with pytest.raises(KeyboardInterrupt):
            engine.save()
        assert engine.debug.committer.busy
        hold.set()
    assert [path.name for path in (tmp_path / "pages" / "commits").iterdir()] == ["commit-00000001.json"]


ENDINGS = {
    "the end": ("", 0),
    "an exception": ("raise ValueError('nobody catches it')", 1),
    "sys.exit": ("sys.exit(7)", 7),
    "os._exit": ("os._exit(8)", 8),
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(30)", -signal.SIGINT),
}

#: Forks once for each ending, before any engine or thread: so the imports are paid for once. A child ends as the
#: program itself would, by the end of its text or what the statement does; the parent prints how each ended.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
import torch, offload
torch.set_num_threads(1)
from parity import adamw
from small_runs import batches, built, config
from test_raising_handlers import ENDINGS, settings

folder, mode = Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGINT, signal.default_int_handler)
statement, children = None, {}
for ending, (text, _) in ENDINGS.items():
    child = os.fork()
    if child == 0:
        statement = text
        os.dup2(os.open(folder / f"{ending}.txt", os.O_WRONLY | os.O_CREAT), 2)
        break
    children[ending] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if statement is None:
    print(json.dumps(children))
else:
    engine = offload.initialize(built(), settings(folder / ending, mode), adamw)
    for batch in batches(3):
        engine.backward(engine(*batch))
        engine.step()
    engine.save(wait=False)
    engine.backward(engine(*batches(1)[0]))
    engine.step()
    exec(statement)
"""


@pytest.mark.parametrize("mode", [pytest.param("lock-free", marks=pytest.mark.long), "device"])
@pytest.mark.timeout(120)
def test_programs_that_end_without_closing(tmp_path: Path, mode: str) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), mode],
        timeout=100,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {ending: code for ending, (_, code) in ENDINGS.items()}
    for ending in ENDINGS:
        said = (tmp_path / f"{ending}.txt").read_text()
        assert not any(word in said for word in ("Fatal", "terminate", "Exception ignored")), said
        offload.initialize(built(), settings(tmp_path / ending, mode), adamw).close()
