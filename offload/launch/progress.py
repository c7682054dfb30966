"""What a run shows while it trains: a live line on a terminal, one plain line every few steps in a pipe."""

from __future__ import annotations

import time
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from offload.callbacks import Callback, Evaluation, RunEnded, RunStarted, StepMetrics
from offload.config import TrainConfig
from offload.console.live_bar import LiveBar
from offload.console.tables import print_line

#: Seconds between two plain lines of an evaluation.
_VALIDATING_EVERY_S: Final = 5.0


class Progress(Callback):
    """Shows steps and evaluations on a console."""

    def __init__(self, console: Console, train: TrainConfig) -> None:
        self._console, self._train, self._steps = console, train, train.steps
        self._told_s = 0.0
        self._bar = LiveBar(
            console,
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("starting", total=train.steps)

    def on_start(self, run: RunStarted) -> None:
        """Begin the live line."""
        self._bar.start()

    def on_step(self, metrics: StepMetrics) -> None:
        """Move the live line, or print a plain one when it is time."""
        line = metrics.line(self._steps)
        self._bar.move(self._task, completed=metrics.step, description=line.split("  ", 1)[1])
        is_last = metrics.step == self._steps
        if not self._console.is_terminal and (is_last or metrics.step % self._train.log_every == 0):
            print_line(self._console, line)

    def validating(self, done: int) -> None:
        """Show how many validation batches are evaluated; also before `on_start`."""
        text = f"validating, {done} of {self._train.evaluate_batches} batches"
        if self._bar.live.is_started:
            self._bar.move(self._task, description=text)
        elif not done or time.monotonic() - self._told_s >= _VALIDATING_EVERY_S:
            print_line(self._console, text)
            self._told_s = time.monotonic()

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Print the validation loss of an evaluation during training."""
        if 0 < evaluation.step < self._steps:
            text = f"step {evaluation.step}/{self._steps}  validation loss {evaluation.loss:.4f}"
            print_line(self._console, text + ("  (best)" if evaluation.best else ""))

    def on_end(self, end: RunEnded) -> None:
        """End the live line."""
        self._bar.stop()
