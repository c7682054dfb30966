"""The model of the runs that tests profile with `offload profile`, and the profile of one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from offload.config_loading import load_config
from offload.launch.profile_run import profile_run

MODEL = {"d_model": 64, "n_layer": 2, "n_head": 4, "seq": 32}


def profile(raw: dict[str, Any], to: Path, steps: int = 3, *, terminal: bool = False) -> tuple[dict[str, Any], str]:
    """Profile; returns the summary and what was printed."""
    out = io.StringIO()
    summary = profile_run(load_config(raw), steps, to, Console(file=out, force_terminal=terminal, width=200))
    return summary, out.getvalue()
