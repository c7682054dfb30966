"""Launching a small run as the command does, and reading what it leaves."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import launch_data
import torch
from rich.console import Console

from offload.cli import main
from offload.config_loading import load_config
from offload.launch.train import launch

HERE = launch_data.__name__
STEPS, ROWS, SEQ = 12, 2, 32
MODEL = {"d_model": 64, "n_layer": 2, "n_head": 4, "seq": SEQ}


def small_launch(folder: Path, steps: int, **sections: Any) -> dict[str, Any]:
    """The configuration of a run in ``folder`` whose states do not fit in its RAM, with these sections besides."""
    return {
        "seed": 5,
        "memory": {"ram": "768KiB", "page": "64KiB"},
        "ssd": {"paths": [str(folder / "pages")], "threads": 1},
        "model": {"factory": "examples.byte_gpt:byte_gpt", "arguments": MODEL},
        "data": {"factory": f"{HERE}:sentence_text"},
        "train": {"steps": steps, "batch": ROWS, "seq": SEQ, "evaluate_batches": 0, "threads": 1},
        "output": {"run": str(folder / "run")},
    } | sections


@contextmanager
def threads_put_back() -> Iterator[None]:
    """Launched runs set torch's compute threads to one: more cost a model this small more than they bring."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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
