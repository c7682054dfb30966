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
@pytest.mark.parametrize("script", ["trainer_run.py", "trainer_resume.py"])
def test_a_trainer_has_the_bits_of_plain_pytorch(tmp_path: Path, script: str) -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "models" / script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines()[-1] == "equal"
