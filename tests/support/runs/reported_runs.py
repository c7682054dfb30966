"""Callbacks told of a run that nobody trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from offload.callbacks import Callback, RunStarted
from offload.config_loading import load_config
from offload.reporting.reporter import Reporter


@contextmanager
def reported(folder: Path, *callbacks: Callback) -> Iterator[Reporter]:
    """A reporter to callbacks of the engine, inside its run."""
    config = load_config({"memory": {"ram": "64MiB"}, "ssd": {"paths": [str(folder / "pages")]}})
    reporter = Reporter([("", callback) for callback in callbacks])
    with reporter.running(RunStarted(config, folder, 0, 1000, "byte", nn.Identity())):
        yield reporter
