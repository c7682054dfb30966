"""transformers' Trainer with a paged model and optimizer, where it is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "accelerate")),
    reason="transformers or accelerate is not installed",
)
def test_a_trainer_has_the_bits_of_plain_pytorch(tmp_path: Path) -> None:
    """In one process, which imports transformers once."""
    scripts = [str(ROOT / "tests" / "support" / "models" / name) for name in ("trainer_run.py", "trainer_resume.py")]
    code = "import runpy, sys\nfor script in sys.argv[2:]:\n    runpy.run_path(script, run_name='__main__')"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *scripts],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert [line for line in ran.stdout.splitlines() if line == "equal"] == ["equal"] * 2
