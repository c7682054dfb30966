"""SIGKILL at random instants, in a loop of one's own and under `offload launch`, metrics and exports included: nothing
is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
#: Kills of each kind; 200 in all.
KILLS = {"exact": 70, "lock-free, staleness 0": 25, "lock-free": 25, "launch": 80}


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", KILLS)
def test_a_run_that_is_killed_again_and_again_goes_on_from_its_last_commit(
    kind: str, tmp_path: Path, tally: Any
) -> None:
    """In exact mode, and lock-free with no staleness, to the bits of a run that never was, with one line of metrics a
    step."""
    script = ROOT / "tests" / "support" / "runs" / "killed_runs.py"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, str(script), kind, str(KILLS[kind]), "1", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    detail = ", ".join(f"{number} {what}" for what, number in record["counts"].items())
    tally(f"kill -9, {kind}", trials=record["counts"]["kills"], failures=len(record["failures"]), detail=detail)
    assert record["failures"] == [] and record["counts"]["kills"] == KILLS[kind] and record["counts"]["runs"] >= 2
