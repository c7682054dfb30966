"""What a run shows while it trains: a live line on a terminal, one plain line every few steps in a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from offload.callbacks import Callback, Evaluation, RunEnded, RunStarted, StepMetrics
from offload.console.live_bar import LiveBar
from offload.console.tables import print_line


class Progress(Callback):
    """Shows the steps on a console.

    Args:
        steps: steps in all.
        log_every: steps between two plain lines.
    """

    def __init__(self, console: Console, steps: int, log_every: int) -> None:
        self._console = console
        self._steps = steps
        self._log_every = log_every
        self._bar = LiveBar(
            console,
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("starting", total=steps)

    def on_start(self, run: RunStarted) -> None:
        """Begin the live line."""
        self._bar.start()

    def on_step(self, metrics: StepMetrics) -> None:
        """Move the live line, or print a plain one when it is time."""
        line = metrics.line(self._steps)
        self._bar.move(self._task, completed=metrics.step, description=line.split("  ", 1)[1])
        is_last = metrics.step == self._steps
        if not self._console.is_terminal and (is_last or metrics.step % self._log_every == 0):
            print_line(self._console, line)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Print the validation loss of an evaluation during training."""
        if 0 < evaluation.step < self._steps:
            text = f"step {evaluation.step}/{self._steps}  validation loss {evaluation.loss:.4f}"
            print_line(self._console, text + ("  (best)" if evaluation.best else ""))

    def on_end(self, end: RunEnded) -> None:
        """End the live line."""
        self._bar.stop()
