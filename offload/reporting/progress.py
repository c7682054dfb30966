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
from offload.reporting.summary import in_measure, measure_of
from pagemem.units import format_bytes

#: Seconds between two plain lines of an evaluation.
_VALIDATING_EVERY_S: Final = 5.0


class Progress(Callback):
    """Shows steps and evaluations on a console.

    Args:
        unit: of the data, see `offload.callbacks.RunStarted`.
    """

    def __init__(self, console: Console, train: TrainConfig, unit: str | None) -> None:
        self._console, self._train, self._steps, self._unit = console, train, train.steps, unit
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
        line = self._line(metrics)
        self._bar.move(self._task, completed=metrics.step, description=line)
        is_last = metrics.step == self._steps
        if not self._console.is_terminal and (is_last or metrics.step % self._train.log_every == 0):
            print_line(self._console, f"step {metrics.step}/{self._steps}  {line}")

    def _line(self, metrics: StepMetrics) -> str:
        speed = (
            f"{metrics.samples_per_s:,.1f} samples/s"
            if metrics.tokens_per_s is None
            else f"{metrics.tokens_per_s:,.0f} tokens/s"
        )
        return (
            f"loss {self._loss(metrics.loss)}  {speed}  RAM {format_bytes(metrics.host_bytes)}  "
            f"SSD {format_bytes(metrics.ssd_bytes)}  {metrics.ssd_mb_per_s:,.0f} MB/s  "
            f"waiting {metrics.wait_share:.1%}" + (f"  staleness {metrics.staleness}" if metrics.staleness else "")
        )

    def _loss(self, nats: float) -> str:
        return f"{in_measure(nats, self._unit):.4f} {measure_of(self._unit)}"

    def validating(self, done: int) -> None:
        """Show how many validation batches are evaluated, in plain lines only where that takes long; also before
        `on_start`."""
        text = f"validating, {done} of {self._train.evaluate_batches} batches"
        if self._bar.live.is_started:
            self._bar.move(self._task, description=text)
        elif not done:
            self._told_s = time.monotonic()
        elif time.monotonic() - self._told_s >= _VALIDATING_EVERY_S:
            print_line(self._console, text)
            self._told_s = time.monotonic()

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Print the validation loss."""
        text = f"step {evaluation.step}/{self._steps}  validation loss {self._loss(evaluation.loss)}"
        print_line(self._console, text + ("  (best)" if evaluation.best else ""))

    def on_end(self, end: RunEnded) -> None:
        """End the live line."""
        self._bar.stop()
