"""Launching a small run as the command does, and reading what it leaves."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import launch_data
from rich.console import Console

from offload.cli import main
from offload.config import load_config
from offload.launch.train import launch

HERE = launch_data.__name__
STEPS, ROWS, SEQ = 12, 2, 32
MODEL = {"d_model": 64, "n_layer": 2, "n_head": 4, "seq": SEQ}


def run(raw: dict[str, Any], *, terminal: bool = False) -> tuple[int, str]:
    """Launch; returns the exit code and what was printed."""
    out = io.StringIO()
    code = launch(load_config(raw), Console(file=out, force_terminal=terminal, width=200))
    return code, out.getvalue()


def run_command(raw: dict[str, Any], tmp_path: Path) -> int:
    """Launch as the command does, from a file."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return main(["launch", str(tmp_path / "config.json")])


def metrics(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of the run."""
    lines = (Path(raw["output"]["run"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def table(text: str) -> dict[str, str]:
    """The closing table of a run in a pipe."""
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in text.splitlines() if re.search(r"\S {2,}\S", line))  # type: ignore[misc]
