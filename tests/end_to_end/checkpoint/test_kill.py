"""SIGKILL at any instant: the run goes on from its last commit to the same bits. The killing is `benchmarks.soak`'s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.long)])
def test_runs_that_are_killed_again_and_again_end_with_the_bits_of_one_that_never_was(
    kills: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--kills", str(kills), "--dir", str(tmp_path), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["equal"] and sum(tally["kills"] for tally in record["modes"].values()) == kills
    for tally in record["modes"].values():
        assert tally["runs"] >= 1 and tally["repeated_steps"] > 0
        if kills == 60:
            assert tally["last_said"].get("committing", 0) > 0, "no kill came near a commit"
    assert list(tmp_path.iterdir()) == []
