"""A run over a frozen base that is killed comes to the end of one that is not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import origin_run
import pytest

SUPPORT = Path(origin_run.__file__).resolve().parents[1]


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    """The run of so many steps, or the rest of it."""
    path = os.pathsep.join(
        [str(SUPPORT / "models"), str(SUPPORT), str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, origin_run.__file__, str(folder), str(steps)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def rest(run: subprocess.Popen[str], told: dict[str, str]) -> None:
    """Take what a run says until it ends; what was said before must be said again."""
    assert run.stdout is not None
    for line in run.stdout:
        if line.endswith("\n"):
            what, value = line.split()
            assert told.setdefault(what, value) == value, what
    run.wait()
    run.stdout.close()


@pytest.mark.parametrize(
    ("runs", "kills", "steps"),
    [(1, 1, 14), pytest.param(20, 2, 40, marks=[pytest.mark.long, pytest.mark.timeout(1200)])],
)
def test_killed_runs_go_on_with_the_same_bits(tmp_path: Path, runs: int, kills: int, steps: int) -> None:
    told: dict[str, str] = {}
    rest(start(tmp_path / "whole", steps), told)
    assert "end" in told
    chance = random.Random(runs)
    for number in range(runs):
        folder = tmp_path / str(number)
        for _ in range(kills):
            run = start(folder, steps)
            assert run.stdout is not None
            for _ in range(chance.randrange(1, 10)):
                line = run.stdout.readline()
                if line:
                    what, value = line.split()
                    assert told[what] == value
            time.sleep(chance.random() * 0.02)
            run.kill()
            rest(run, told)
        run = start(folder, steps)
        rest(run, told)
        assert run.returncode == 0
