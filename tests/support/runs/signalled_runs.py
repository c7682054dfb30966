"""Runs in forked processes that get signals at random instants, and what became of each.

The process that forks has torch and the engine imported and no thread, so a run costs a fraction of a second and is a
process all the same, with an exit code. What a run says goes to a file in its folder; it tells through a pipe when
signals may come.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from launch_data import sentence_text
from torch import Tensor, nn

import offload
from examples.byte_corpus import ByteCorpus

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "step": {"update": {"start": "step"}},
    "lock-free": {"update": {"mode": "lock-free", "max_staleness": 2}},
    "device": {"device": "cpu-emulated", "memory": {"device": "512KiB"}},
}
HANGS_AFTER_S = 60.0
LOST_AFTER_S = 30.0
MODULE = __name__


def _no_more() -> None:
    """The run has told that it is ready."""


_ready: Callable[[], None] = _no_more


@dataclass(frozen=True)
class Outcome:
    """A run that has ended, or was ended because it hung.

    Attributes:
        code: as `os.waitstatus_to_exitcode` says; None: it hung. sent_s: after it was ready. said: all it has written.
    """

    code: int | None
    sent_s: list[float]
    said: str
    folder: Path

    @property
    def left(self) -> list[str]:
        """Locks that the run has not given back."""
        return [str(lock) for lock in self.folder.rglob("pagemem.lock")]


def forked(folder: Path, run: Callable[[Path], int], signals: Sequence[tuple[int, float]]) -> Outcome:
    """Fork a process that runs ``run(folder)`` and exits with what it returns.

    Args:
        signals: number, and seconds after the one before or, for the first, after the run said that it is ready.
    """
    folder.mkdir()
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        _child(folder, run, tell)
    os.close(tell)
    ended_s = time.monotonic() + HANGS_AFTER_S
    os.read(told, 1)
    os.close(told)
    started_s, sent_s = time.monotonic(), []
    for number, after_s in signals:
        time.sleep(after_s)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        os.kill(pid, number)
        sent_s.append(round(time.monotonic() - started_s, 4))
    code: int | None = None
    while time.monotonic() < ended_s:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.005)
    else:
        os.kill(pid, signal.SIGUSR1)  # where it hangs
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return Outcome(code, sent_s, (folder / "said").read_text(errors="replace"), folder)


def _child(folder: Path, run: Callable[[Path], int], tell: int) -> None:
    global _ready
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - until the process ends
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - until the process ends
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)

    def ready() -> None:
        global _ready
        _ready = _no_more
        os.write(tell, b"!")

    _ready = ready
    code = 1
    try:
        code = run(folder)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 99  # out of what was to catch it
    except BaseException:
        traceback.print_exc()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is the test's own
    os.close(tell)
    sys.stdout.flush()
    os._exit(code)


# ---- a loop of one's own -------------------------------------------------------------------------------------------


def own_loop(mode: str) -> Callable[[Path], int]:
    """Train until Ctrl-C comes, then close."""

    def run(folder: Path) -> int:
        settings = {
            "memory": {"ram": "768KiB", "page": "64KiB"},
            "ssd": {"paths": [str(folder / "pages")], "threads": 2},
            "commit": {"every_steps": 3},
        }
        for section, value in MODES[mode].items():
            settings[section] = {**settings.get(section, {}), **value} if isinstance(value, dict) else value
        if mode == "lock-free":
            settings["memory"]["ram"] = "2MiB"
        unraisable: list[Any] = []
        sys.unraisablehook = unraisable.append
        torch.manual_seed(0)
        plain = nn.Sequential(*[nn.Linear(128, 128) for _ in range(6)])
        x, engine = torch.randn(8, 128), None
        caught = False
        try:
            _ready()
            engine = offload.initialize(plain, settings, lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))
            end_s = time.monotonic() + LOST_AFTER_S
            while time.monotonic() < end_s:
                engine.backward(engine(x).square().mean())
                engine.step()
                engine.save_if_due()
        except KeyboardInterrupt:
            caught = True
        if engine is not None:
            engine.close()
        left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        print(json.dumps({"caught": caught, "left": left, "unraisable": [repr(one.exc_value) for one in unraisable]}))
        return 0 if caught and not left and not unraisable else 3

    return run


# ---- offload launch ------------------------------------------------------------------------------------------------


class ReadyText(ByteCorpus):
    """Says that signals may come when the first batch is made."""

    def batch(self, step: int, rows: int, seq: int) -> tuple[Tensor, Tensor]:
        """As any corpus."""
        _ready()
        return super().batch(step, rows, seq)


def early_text(folder: Path, seed: int) -> ByteCorpus:
    """Says that signals may come before the model is built."""
    made = sentence_text(folder, seed)
    _ready()
    return made


def late_text(folder: Path, seed: int) -> ByteCorpus:
    """Says that signals may come when there is a first step."""
    sentence_text(folder, seed)
    return ReadyText(folder, seed=seed)


def launched(mode: str, *, steps: int, data: str = "early_text") -> Callable[[Path], int]:
    """The `offload launch` command, as in a process of its own."""

    def run(folder: Path) -> int:
        settings: dict[str, Any] = {
            "memory": {"ram": "3MiB", "page": "64KiB"},
            "ssd": {"paths": [str(folder / "pages")], "threads": 2},
            "commit": {"every_steps": 3},
            "model": {
                "factory": "examples.byte_gpt:byte_gpt",
                "arguments": {"d_model": 64, "n_layer": 2, "n_head": 4, "seq": 32},
            },
            "data": {"factory": f"{MODULE}:{data}"},
            "output": {"run": str(folder / "run")},
            "train": {"steps": steps, "batch": 2, "seq": 32, "evaluate_batches": 1, "log_every": 100000},
        }
        for section, value in MODES[mode].items():
            settings[section] = {**settings.get(section, {}), **value} if isinstance(value, dict) else value
        (folder / "run.json").write_text(json.dumps(settings))
        sys.argv = ["offload", "launch", str(folder / "run.json")]
        from offload.cli import main

        return main()

    return run


def warm() -> None:
    """Import what a launched run would import in each of its processes."""
    importlib.import_module("offload.cli")
    importlib.import_module("matplotlib.backends.backend_agg")
    importlib.import_module("matplotlib.figure")
    with torch.device("meta"):
        nn.init.normal_(torch.empty(1))


def instants(seed: int, longest_s: float) -> Callable[[], float]:
    """Random instants, more of them early, where more happens."""
    chosen = random.Random(seed)
    return lambda: longest_s * chosen.random() ** 1.5
